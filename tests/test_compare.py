"Grids of runs: workers, failures, interruptions, a Ray cluster"
import importlib.util, json, multiprocessing, os, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from torch import nn
from diffkd_nb.experiment import Comparison, compare, run, verify
from diffkd_nb.files import InputError
from diffkd_nb.recipes import get_recipe
from diffkd_nb.setup import Job, Setup

RECIPE = get_recipe('tiny').replace(epochs=1)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run(get_recipe('tiny').replace(epochs=3), 'digits', None, 'small:8', 'alone', 0, out, progress=False)
    return f"small:8@{out/'student.safetensors'}"


def grid(teacher, out, **kw):
    return compare(**{**dict(pairs=[(teacher, 'small:4')], methods=['alone', 'dkd'], seeds=2, recipe=RECIPE, data='digits?limit=30', out=out, executor='process', jobs=2, threads=1, progress=False), **kw})


def mlp(n_classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, n_classes))


def workers(pid):
    "Process ids of a grid's workers: children of the server that it started"
    children = lambda p, *how: subprocess.run(['pgrep', '-P', str(p), *how], capture_output=True, text=True).stdout.split()
    return [int(w) for server in children(pid, '-f', 'multiprocessing.forkserver') for w in children(server)]


def a_worker(p, out):
    "Wait for the first one at work, which has opened its file of messages"
    while not (list(out.rglob('*.err')) and (found := workers(p.pid))): assert p.poll() is None, p.communicate(); time.sleep(.02)
    return found[0]


def hashes(c): return {k: m['student_hash'] for k,m in c.manifests.items()}


@pytest.fixture(scope='module')
def here(teacher, tmp_path_factory): return grid(teacher, tmp_path_factory.mktemp('here'), executor='here')


def test_processes_give_what_one_process_gives(teacher, here, tmp_path):
    c = grid(teacher, tmp_path)
    assert not c.failed and hashes(c) == hashes(here) and len(c.manifests) == 4
    assert not list(tmp_path.rglob('*.err')) and not list(tmp_path.rglob('*.part')) and verify(tmp_path)


def test_methods_of_a_seed_start_alike_and_see_the_same(teacher, tmp_path):
    # a method of weight 0 changes nothing: the run equals the one alone bit for bit, so all that differs between methods is the method
    c = grid(teacher, tmp_path, methods=['alone', 'dkd:weight=0', 'fitnet:weight=0', 'diffkd:kd_weight=0,diffusion_weight=0,reconstruction_weight=0'], seeds=1, executor='here')
    assert len(set(hashes(c).values())) == 1


def test_a_failed_cell_stops_no_other(teacher, tmp_path, capsys):
    c = grid(teacher, tmp_path, methods=['alone', 'dkd:beta=-1'], seeds=1)
    assert list(c.failed) == ['small_4-from-small_8/dkd_beta=-1/seed0'] and 'beta must be' in c.failed['small_4-from-small_8/dkd_beta=-1/seed0']
    assert list(c.manifests) == ['small_4-from-small_8/alone/seed0'] and 'FAILED' in capsys.readouterr().err
    assert 'Not run: 1 of 2' in c.markdown()


@pytest.mark.slow
def test_a_killed_worker_is_named_and_taken_up_again(teacher, here, tmp_path):
    script = tmp_path/'script.py'           # with no guard: workers must not run it again
    script.write_text(f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_compare import grid, get_recipe
from pathlib import Path
print('begins')
c = grid({teacher!r}, Path({str(tmp_path/'c')!r}))
print(list(c.failed.values()))
''')
    p = subprocess.Popen([sys.executable, '-W', 'ignore', str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    os.kill(a_worker(p, tmp_path), signal.SIGKILL)
    out = p.communicate(timeout=200)[0]
    assert 'killed by signal 9' in out and out.count('signal') == 1 and out.count('begins') == 1
    c = grid(teacher, tmp_path/'c')
    assert not c.failed and hashes(c) == hashes(here)


@pytest.mark.slow
def test_interrupted_grid_leaves_no_worker_and_goes_on(teacher, here, tmp_path):
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'diffkd_nb.commands', 'compare', '--data', 'digits', '--recipe', 'tiny', '--epochs', '1', '--pair', teacher, 'small:4', '--methods', 'alone', 'dkd',
                          '--seeds', '2', '--jobs', '2', '--threads', '1', '--out', str(tmp_path/'c')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    a_worker(p, tmp_path)
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err
    left, end = ['?'], time.time() + 10         # the server ends by itself once it is alone
    while left and time.time() < end: left = subprocess.run(['pgrep', '-g', str(p.pid)], capture_output=True, text=True).stdout.split(); time.sleep(.05)
    assert not left and not list((tmp_path/'c').rglob('*.err'))
    c = grid(teacher, tmp_path/'c', recipe=get_recipe('tiny').scaled(1))
    assert hashes(c) == hashes(here)


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_grid(teacher, tmp_path):
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'diffkd_nb.commands', 'compare', '--data', 'digits', '--recipe', 'tiny', '--epochs', '500', '--pair', teacher, 'small:4', '--methods', 'alone',
                          '--seeds', '1', '--threads', '1', '--out', str(tmp_path/'c')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = a_worker(p, tmp_path)
    p.kill(); p.wait()
    end = time.time() + 20
    def alive():
        try: return Path(f'/proc/{found}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError: return False
    while alive() and time.time() < end: time.sleep(.1)
    assert not alive()


@pytest.mark.slow
def test_workers_that_are_no_copies_give_the_same(teacher, here, tmp_path, monkeypatch):
    "On a machine with a GPU, and where there is no fork"
    monkeypatch.setattr('diffkd_nb.grid._context', lambda: multiprocessing.get_context('spawn'))
    c = grid(teacher, tmp_path, seeds=1)
    assert not c.failed and hashes(c) == {k: v for k,v in hashes(here).items() if k.endswith('seed0')}


def test_a_pair_without_feature_maps_is_compared_on_methods_that_need_none(tmp_path):
    t = run(RECIPE, 'digits', None, 'test_compare:mlp', 'alone', 0, tmp_path/'teacher', progress=False, keep_student=True)
    pair = f"test_compare:mlp@{tmp_path/'teacher'/'student.safetensors'}", 'test_compare:mlp'
    assert t['status'] == 'finished' and run(RECIPE, 'digits', *pair, 'kd', 0, tmp_path/'kd', progress=False)['taps'][0]['kind'] == 'logits'
    c = grid(None, tmp_path/'c', pairs=[pair], methods=['alone', 'kd'], seeds=1, executor='here', keep_student={'kd': [0]})
    assert not c.failed and len(c.manifests) == 2 and [f.parts[-3] for f in (tmp_path/'c').rglob('student.safetensors')] == ['kd']
    with pytest.raises(InputError, match='keep_student names dkd: expected methods that are compared, alone, kd'):
        grid(None, tmp_path/'e', pairs=[pair], methods=['alone', 'kd'], seeds=1, executor='here', keep_student={'dkd': [0]})
    assert not (tmp_path/'e'/'grid.json').exists()
    with pytest.raises(ValueError, match='no module that gives a feature map'): grid(None, tmp_path/'d', pairs=[pair], methods=['alone', 'fitnet'], seeds=1, executor='here')


def test_one_place_decides_the_device(teacher, tmp_path, monkeypatch):
    "What a run trains on is what its teacher is measured on"
    from diffkd_nb import run as runs, setup
    from diffkd_nb.task import Classification
    asked, seen, evaluate, learner = [], [], Classification.evaluate, runs.learner
    monkeypatch.setattr(setup, 'choose_device', lambda device=None: asked.append(device) or torch.device('cpu:0'))
    monkeypatch.setattr(Classification, 'evaluate', lambda self, model, data, device='cpu', *a, **k: seen.append(device) or evaluate(self, model, data, device, *a, **k))
    monkeypatch.setattr(runs, 'learner', lambda *a: (l := learner(*a), seen.append(l.dls.device))[0])
    grid(teacher, tmp_path, methods=['dkd'], seeds=1, executor='here')
    assert len(seen) == 2 and set(seen) == {torch.device('cpu:0')} and set(asked) == {None}


def test_no_module_of_unix_is_needed_to_record_a_run(monkeypatch):
    from diffkd_nb import record
    monkeypatch.setitem(sys.modules, 'resource', None)
    spec = importlib.util.spec_from_file_location('diffkd_nb.record_again', record.__file__)
    again = importlib.util.module_from_spec(spec); spec.loader.exec_module(again)
    again.re = SimpleNamespace(search=lambda *a: None)
    assert again.peak_memory() is None


def test_a_finished_cell_of_other_settings_is_not_taken(teacher, tmp_path):
    grid(teacher, tmp_path, executor='here', seeds=1)
    with pytest.raises(ValueError, match='recipe.*name another folder'): grid(teacher, tmp_path, executor='here', seeds=2, recipe=RECIPE.replace(lr=.5))
    with pytest.raises(ValueError, match='data_hash'): grid(teacher, tmp_path, executor='here', data='digits?size=10', methods=['alone'])


def test_several_pairs_and_another_reference(teacher, tmp_path):
    c = grid(teacher, tmp_path, pairs=[(teacher, 'small:4'), (teacher, 'small:6')], executor='here')
    t = c.table('dkd')
    assert list(zip(t.student, t.method)) == [(s, m) for s in ('small:4', 'small:6') for m in ('alone', 'dkd')]
    for s in ('small:4', 'small:6'):
        runs = c.runs[c.runs.student == s].pivot(index='seed', columns='method', values='accuracy')
        row = t[(t.student == s) & (t.method == 'alone')].iloc[0]
        assert row.difference == pytest.approx((runs.alone - runs.dkd).mean()) and row.pairs == 2
    text = c.markdown('dkd')
    assert text.count('| method |') == 2 and '**small:6** from **small:8**' in text and 'differences to dkd' in text
    assert len(c.verdicts('dkd')) == 2 and len(c.plot(reference='dkd').get_yticks()) == 2


def test_methods_joined_by_plus(teacher, tmp_path):
    c = grid(teacher, tmp_path, methods=['alone', 'kd+crd:k=64'], seeds=1)
    m = c.manifests['small_4-from-small_8/kd_crd_k=64/seed0']
    assert not c.failed and m['options']['crd']['k'] == 64 and m['options']['kd']['temperature'] == 4. and [t['name'] for t in m['taps']] == ['logits', 'feature']
    assert {'kd.kd', 'crd.crd'} <= set((tmp_path/'small_4-from-small_8/kd_crd_k=64/seed0/log.csv').read_text().splitlines()[0].split(','))


def test_the_published_figure_stands_beside_ours(here, tmp_path):
    "Only on the data that the paper used; the runs are made up"
    one = json.loads(json.dumps(next(iter(here.manifests.values()))))
    for method,data in (('kd', 'cifar100 (50,000 for training)'), ('diffkd', 'cifar100 (50,000 for training)'), ('dkd', 'cifar100 (50,000 for training)')):
        one['settings'].update(student='resnet20', teacher='resnet56', method=method, data=data)
        one['data'].update(n_train=50_000, n_valid=10_000)
        d = tmp_path/'resnet20-from-resnet56'/method/'seed0'; d.mkdir(parents=True); (d/'manifest.json').write_text(json.dumps(one))
    t = Comparison(tmp_path).table('kd').set_index('method')
    assert t.published['kd'] == 70.66 and t.published['diffkd'] == 71.92 and np.isnan(t.published['dkd']) and t.source['kd'] == 'Huang et al. 2023, table 9'
    assert '70.66 (Huang et al. 2023, table 9)' in Comparison(tmp_path).markdown('kd')
    assert here.table().published.isna().all()


def test_verify_finds_an_edited_table(teacher, tmp_path):
    c = grid(teacher, tmp_path, executor='here', seeds=1)
    f = tmp_path/'table.csv'; f.write_text(f.read_text().replace('dkd', 'kdd', 1))
    report = verify(tmp_path)
    assert [r.what for r in report if r.ok is False] == ['the table is what the runs give']


@pytest.mark.slow
def test_ray_cluster_of_two_workers(teacher, here, tmp_path):
    ray = pytest.importorskip('ray', reason="Ray is not installed: pip install ray")
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([n for n in ray.nodes() if n['Alive']]) == 2
        c = grid(teacher, tmp_path, executor='ray')
        assert not c.failed and hashes(c) == hashes(here) and not list(tmp_path.rglob('.grid'))
    finally: ray.shutdown(); cluster.shutdown()


def test_ray_worker_that_does_not_see_the_folder(teacher, here, tmp_path, monkeypatch):
    from diffkd_nb.grid import _ray_cell
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    setup, job = Setup(RECIPE, 'digits?limit=30', 'small:4'), Job(tmp_path/'elsewhere', threads=1)
    error, files = _ray_cell(setup.to_dict(), job.to_dict(), str(tmp_path/'no such token'))
    assert error is None and set(files) == {'manifest.json', 'log.csv', 'student.safetensors'} and not (tmp_path/'elsewhere').exists()
    assert json.loads(files['manifest.json'])['student_hash'] == hashes(here)['small_4-from-small_8/alone/seed0']
