"Grids of runs: workers, failures, interruptions, a Ray cluster"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from diffkd_nb.experiment import Comparison, compare, run, verify
from diffkd_nb.recipes import get_recipe

RECIPE = get_recipe('tiny').replace(epochs=1)


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run(get_recipe('tiny').replace(epochs=3), 'digits', None, 'small:8', 'alone', 0, out, progress=False)
    return f"small:8@{out/'student.safetensors'}"


def grid(teacher, out, **kw):
    return compare(**{**dict(pairs=[(teacher, 'small:4')], methods=['alone', 'dkd'], seeds=2, recipe=RECIPE, data='digits', out=out, executor='process', jobs=2, threads=1, progress=False), **kw})


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


def test_a_killed_worker_is_named_and_taken_up_again(teacher, here, tmp_path):
    code = f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_compare import grid, get_recipe
from pathlib import Path
c = grid({teacher!r}, Path({str(tmp_path)!r}))
print(list(c.failed.values()))
'''
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while True:
        kids = subprocess.run(['pgrep', '-P', str(p.pid), '-f', '_cell_main'], capture_output=True, text=True).stdout.split()
        if kids: break
        assert p.poll() is None; time.sleep(.02)
    os.kill(int(kids[0]), signal.SIGKILL)
    out = p.communicate(timeout=200)[0]
    assert 'killed by signal 9' in out and out.count('signal') == 1
    c = grid(teacher, tmp_path)
    assert not c.failed and hashes(c) == hashes(here)


def test_interrupted_grid_leaves_no_worker_and_goes_on(teacher, here, tmp_path):
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'diffkd_nb.commands', 'compare', '--data', 'digits', '--recipe', 'tiny', '--epochs', '1', '--pair', teacher, 'small:4', '--methods', 'alone', 'dkd',
                          '--seeds', '2', '--jobs', '2', '--threads', '1', '--out', str(tmp_path/'c')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not subprocess.run(['pgrep', '-P', str(p.pid), '-f', '_cell_main'], capture_output=True, text=True).stdout.split():
        assert p.poll() is None, p.communicate(); time.sleep(.02)
    os.killpg(p.pid, signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err
    assert not subprocess.run(['pgrep', '-g', str(p.pid)], capture_output=True, text=True).stdout.split()
    c = grid(teacher, tmp_path/'c', recipe=get_recipe('tiny').scaled(1))
    assert hashes(c) == hashes(here)


def test_workers_do_not_outlive_a_killed_grid(teacher, tmp_path):
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'diffkd_nb.commands', 'compare', '--data', 'digits', '--recipe', 'tiny', '--epochs', '500', '--pair', teacher, 'small:4', '--methods', 'alone',
                          '--seeds', '1', '--threads', '1', '--out', str(tmp_path/'c')], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kids = lambda: subprocess.run(['pgrep', '-P', str(p.pid), '-f', '_cell_main'], capture_output=True, text=True).stdout.split()
    while not (found := kids()): assert p.poll() is None; time.sleep(.02)
    p.kill(); p.wait()
    end = time.time() + 20
    def alive():
        try: return Path(f'/proc/{found[0]}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError: return False
    while alive() and time.time() < end: time.sleep(.1)
    assert not alive()


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


def test_ray_cluster_of_two_workers(teacher, here, tmp_path):
    ray = pytest.importorskip('ray', reason="Ray is not installed: pip install ray")
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([n for n in ray.nodes() if n['Alive']]) == 2
        c = grid(teacher, tmp_path, executor='ray')
        assert not c.failed and hashes(c) == hashes(here) and not (tmp_path/'.grid').exists()
    finally: ray.shutdown(); cluster.shutdown()


def test_ray_worker_that_does_not_see_the_folder(teacher, here, tmp_path, monkeypatch):
    from diffkd_nb import experiment
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    job = dict(recipe=RECIPE.to_dict(), data='digits', teacher=teacher, student='small:4', method='alone', seed=0, out=str(tmp_path/'elsewhere'), root=str(tmp_path), threads=1, options={})
    error, files = experiment._ray_cell(job, str(tmp_path/'no such token'))
    assert error is None and set(files) == {'manifest.json', 'log.csv', 'student.safetensors'} and not (tmp_path/'elsewhere').exists()
    assert json.loads(files['manifest.json'])['student_hash'] == hashes(here)['small_4-from-small_8/alone/seed0']
