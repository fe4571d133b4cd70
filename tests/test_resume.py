"A run that is killed at any moment and started again ends bit for bit as one that was left alone"
import json, os, random, signal, time
from pathlib import Path
import pytest, torch
from diffkd_nb.experiment import run
from diffkd_nb.recipes import get_recipe
from workers import Worker

EPOCHS, RECIPE = 4, get_recipe('tiny').replace(batch_size=64)


def train(teacher, method, out):
    run(RECIPE.replace(epochs=EPOCHS, ema=.9), 'digits', teacher, 'small:4', method, 1, out, progress=False)


def work(teacher, method, out, slow_write=False):
    "What a process does that may be killed"
    if slow_write:                       # makes the moment of writing a checkpoint long enough to be hit
        real = os.replace
        def replace(a, b):
            if str(b).endswith('checkpoint.pt'): print('writing', flush=True); time.sleep(.5)
            return real(a, b)
        os.replace = replace
    train(teacher, method, out)
    print('finished')


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run(RECIPE.replace(epochs=1), 'digits', None, 'small:8', 'alone', 0, out, progress=False)
    return f"small:8@{out/'student.safetensors'}"


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
    "The folder of a run that was left alone, in this process: the others are in processes with another order of hashes"
    made = {}
    def get(method):
        if method not in made: made[method] = tmp_path_factory.mktemp(method)/'whole'; train(teacher, method, made[method])
        return made[method]
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield get
    torch.set_num_threads(n)


def start(*args, **kw): return Worker(work, *args, **kw)


def finish(*args):
    p = start(*args)
    assert p.wait() == 0 and 'finished' in p.output[0], p.output


def files(out): return {f.name: f.read_bytes() for f in out.iterdir() if f.name in ('student.safetensors', 'log.csv')}


@pytest.mark.parametrize('method', ['diffkd', *[pytest.param(m, marks=pytest.mark.slow) for m in ('crd', 'pskd', 'taid', 'meal', 'dskd', 'diffkd:pretrain=20')]])
def test_killed_at_random_steps(teacher, whole, method, tmp_path):
    rng, kills, out = random.Random(0 if method == 'diffkd' else 1), 0, tmp_path/'killed'
    while kills < 2:
        p = start(teacher, method, out)
        target = kills            # wait until that many epochs are on record, then a random moment more
        while p.poll() is None and not (target == 0 or (out/'log.csv').is_file() and len((out/'log.csv').read_text().splitlines()) > target): time.sleep(.005)
        if target == 0:
            while not out.is_dir(): time.sleep(.005)
        time.sleep(rng.uniform(0, .15))
        assert p.poll() is None, 'the run ended before it could be killed'
        p.send_signal(signal.SIGKILL); p.wait(); kills += 1
        assert not (out/'manifest.json').is_file()
    finish(teacher, method, out)
    assert files(out) == files(whole(method))
    a, b = (json.loads((d/'manifest.json').read_text()) for d in (whole(method), out))
    assert a['student_hash'] == b['student_hash'] and b['cost']['resumed_at_epoch'] and a['cost']['resumed_at_epoch'] is None
    assert not list(out.glob('.*')), 'something half-written stayed behind'


def test_killed_while_writing_a_checkpoint(teacher, whole, tmp_path):
    out = tmp_path/'killed'
    for n in (1, 2):
        p = start(teacher, 'diffkd', out, True)
        p.wait_for('writing', n)
        p.send_signal(signal.SIGKILL); p.wait()
        assert list(out.glob('.checkpoint.pt.*.part')), 'the checkpoint was not being written'
    finish(teacher, 'diffkd', out)
    assert files(out) == files(whole('diffkd'))
    assert not list(out.glob('.*'))


def test_two_processes_in_one_folder(teacher, tmp_path):
    p = start(teacher, 'diffkd', tmp_path/'a', True)
    p.wait_for('writing')
    with pytest.raises(ValueError, match='another process is at work'):
        train(teacher, 'diffkd', tmp_path/'a')
    p.kill(); p.wait()
