"One teacher for several students: each ends bit for bit as it would alone"
import json, os, signal, subprocess, sys, time
import pytest
from fastai.basics import Callback
from diffkd_nb.experiment import compare, run, verify
from diffkd_nb.files import InputError
from diffkd_nb.recipes import Recipe, get_recipe
from test_compare import a_worker, hashes

METHODS = ['alone', 'kd', 'dist', 'diffkd']
RECIPE = get_recipe('tiny').replace(epochs=2)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run(RECIPE.replace(epochs=3), 'digits', None, 'small:8', 'alone', 0, out, progress=False)
    return f"small:8@{out/'student.safetensors'}"


def grid(teacher, out, **kw):
    return compare(**{**dict(pairs=[(teacher, 'small:4')], methods=METHODS, seeds=2, recipe=RECIPE, data='digits?limit=30', out=out, executor='here',
                             threads=1, progress=False, share_teacher=True), **kw})


@pytest.fixture(scope='module')
def apart(teacher, tmp_path_factory): return grid(teacher, tmp_path_factory.mktemp('apart'), share_teacher=False)


def logs(c): return {k: (c.folder/k/'log.csv').read_text() for k in c.manifests}


@pytest.mark.parametrize('executor', ['here', pytest.param('process', marks=pytest.mark.slow)])
def test_students_are_those_of_separate_runs(teacher, apart, tmp_path, executor):
    "alone, KD, DIST and DiffKD at two seeds; settings too, and the others' time is not in a run's own"
    start = time.perf_counter()
    c = grid(teacher, tmp_path, executor=executor, jobs=2)
    wall = time.perf_counter() - start
    assert not c.failed and hashes(c) == hashes(apart) and len(hashes(c)) == 8 and logs(c) == logs(apart) and verify(tmp_path)
    assert not list(tmp_path.rglob('*.err'))
    for k, m in c.manifests.items():
        assert m['settings'] == apart.manifests[k]['settings']
        if '/alone/' in k: assert 'shared_teacher' not in m['cost']; continue
        shared = m['cost']['shared_teacher']
        assert shared['methods'] == ['kd', 'dist', 'diffkd'] and shared['forwards'] == (2*m['cost']['steps_per_epoch'] if '/kd/' in k else 0)
    if executor == 'here': assert sum(m['cost']['seconds'] for m in c.manifests.values()) <= wall + .5


def test_bf16_and_mixed_batches(teacher, tmp_path):
    recipe = RECIPE.replace(mixup=.5, epochs=1)
    kw = dict(recipe=recipe, precision='bf16', seeds=1, methods=['kd', 'diffkd'])
    a, b = grid(teacher, tmp_path/'a', **kw), grid(teacher, tmp_path/'b', share_teacher=False, **kw)
    assert hashes(a) == hashes(b) and a.manifests['small_4-from-small_8/diffkd/seed0']['cost']['shared_teacher']['forwards'] == 0


@pytest.mark.parametrize('level', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_interrupted_group_goes_on(teacher, apart, tmp_path, monkeypatch, level):
    "Also where one of the runs is further than the others"
    class Stop(Callback):
        def after_step(self):
            if self.epoch == 1 and self.iter == 3: raise KeyboardInterrupt
    own = Recipe.callbacks
    monkeypatch.setattr(Recipe, 'callbacks', lambda self: [*own(self), Stop()])
    with pytest.raises(KeyboardInterrupt): grid(teacher, tmp_path, methods=METHODS[1:], seeds=1)
    monkeypatch.undo()
    assert len(list(tmp_path.rglob('checkpoint.pt'))) == 3 and not list(tmp_path.rglob('manifest.json')) and not list(tmp_path.rglob('.lock'))
    if not level: next(tmp_path.rglob('dist/seed0/checkpoint.pt')).unlink()
    c = grid(teacher, tmp_path, methods=METHODS[1:], seeds=1)
    assert not c.failed and hashes(c) == {k: h for k, h in hashes(apart).items() if k in c.manifests} and len(c.manifests) == 3
    assert c.manifests['small_4-from-small_8/kd/seed0']['cost']['resumed_at_epoch'] == 1


@pytest.mark.slow
def test_a_killed_group_goes_on(teacher, apart, tmp_path):
    script = tmp_path/'script.py'
    script.write_text(f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nfrom pathlib import Path\nfrom test_shared_teacher import grid\n'
                      f"grid({teacher!r}, Path({str(tmp_path/'c')!r}), executor='process', seeds=1)\n")
    p = subprocess.Popen([sys.executable, '-W', 'ignore', str(script)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while a_worker(p, tmp_path) and not list(tmp_path.rglob('kd/seed0/checkpoint.pt')) and p.poll() is None: pass
    p.send_signal(signal.SIGKILL); p.wait()
    c = grid(teacher, tmp_path/'c', executor='process', seeds=1)
    assert not c.failed and hashes(c) == {k: h for k, h in hashes(apart).items() if k.endswith('seed0')}


@pytest.mark.parametrize('executor', ['here', pytest.param('process', marks=pytest.mark.slow)])
def test_a_failed_cell_stops_no_other(teacher, apart, tmp_path, executor):
    c = grid(teacher, tmp_path, methods=['kd', 'dkd:beta=-1', 'dist'], seeds=1, executor=executor)
    assert list(c.failed) == ['small_4-from-small_8/dkd_beta=-1/seed0'] and 'beta must be' in c.failed['small_4-from-small_8/dkd_beta=-1/seed0']
    assert hashes(c) == {k: hashes(apart)[k] for k in c.manifests} and len(c.manifests) == 2


def test_what_does_not_go_together(teacher, tmp_path):
    for kw, says in ((dict(cache=str(tmp_path/'x')), 'cache'), (dict(graph=True), 'graph'), (dict(teacher_engine='auto'), 'teacher_engine'), (dict(executor='ray'), "'ray'")):
        with pytest.raises(InputError, match=says): grid(teacher, tmp_path/'c', **kw)
    assert not (tmp_path/'c').exists()


def test_the_command_has_a_flag(teacher, tmp_path, capsys):
    from diffkd_nb.commands import compare_main
    assert compare_main(['--data', 'digits', '--recipe', 'tiny', '--epochs', '1', '--pair', teacher, 'small:4', '--methods', 'kd', 'dist', '--seeds', '1',
                         '--executor', 'here', '--share-teacher', '--out', str(tmp_path)]) == 0
    m = json.loads(next(tmp_path.rglob('dist/seed0/manifest.json')).read_text())
    assert m['cost']['shared_teacher'] == dict(methods=['kd', 'dist'], forwards=0)
