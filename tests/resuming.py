"""A run that stops half-way and is taken up again"""
import pytest
from diffkd_nb.run import Checkpoint


def cut_and_resumed(run, tmp_path, monkeypatch):
    """Manifests of an undisturbed run and of one that stopped after its second epoch and went on, with equal students and logs;
    `run` trains in a folder"""
    whole, real = run(tmp_path/'whole'), Checkpoint.after_epoch
    def stop(self):
        real(self)
        if self.epoch == 1: raise RuntimeError('stopped here')
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'after_epoch', stop)
        with pytest.raises(RuntimeError, match='stopped here'): run(tmp_path/'cut')
    again = run(tmp_path/'cut')
    assert again['student_hash'] == whole['student_hash'] and again['cost']['resumed_at_epoch'] == 2
    assert (tmp_path/'cut'/'log.csv').read_bytes() == (tmp_path/'whole'/'log.csv').read_bytes()
    return whole, again
