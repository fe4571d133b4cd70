"""`bench/table9.py` on a made-up CIFAR-100: it goes on where it stands, and it decides the rates by its rule."""
import importlib.util, json
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
import workers
from diffkd_nb.data import open_data
from diffkd_nb.experiment import Comparison, evaluate, verify
from diffkd_nb.models import make_model
from diffkd_nb.weights import load_weights, state_hash

HERE = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location('table9', HERE/'bench'/'table9.py')
table9 = importlib.util.module_from_spec(spec); spec.loader.exec_module(table9)


@pytest.fixture(scope='module')
def cifar(tmp_path_factory):
    "Two training images and one test image of each class, in the binary layout"
    folder, rng = tmp_path_factory.mktemp('cifar'), np.random.RandomState(0)
    for name,n in (('train.bin', 2), ('test.bin', 1)):
        labels = np.repeat(np.arange(100), n)
        np.concatenate([(labels//5)[:, None], labels[:, None], rng.randint(0, 256, (100*n, 3072))], 1).astype(np.uint8).tofile(folder/name)
    return folder


def call(cifar, tmp, *args):
    return workers.file(HERE/'bench'/'table9.py', '--data', f'cifar100:{cifar}', '--out', tmp/'out', '--teachers', tmp/'teachers', '--device', 'cpu',
                        '--threads', '1', '--epochs', '1', '--seeds', '1', '--pairs', 'resnet56-resnet20', *args)


@pytest.mark.slow
def test_it_goes_on_where_it_stands(cifar, tmp_path):
    p = call(cifar, tmp_path, '--minutes', '0')
    assert p.returncode == 0 and 'Left: 1 of teachers, 5 of grid, 14 of controls.' in p.stdout, p.stderr
    assert not list(tmp_path.rglob('*.safetensors')) and not list(tmp_path.rglob('manifest.json'))

    p = call(cifar, tmp_path, '--stages', 'teachers', 'rates', 'grid')
    assert p.returncode == 0 and p.stdout.endswith('Nothing is left to run.\n'), p.stderr
    record, data = json.loads((tmp_path/'teachers'/'resnet56'/'manifest.json').read_text()), open_data(f'cifar100:{cifar}')
    model = load_weights(make_model('resnet56', 100), tmp_path/'teachers'/'resnet56'/'weights.safetensors')
    assert record['hash'] == state_hash(model) and record['accuracy'] == evaluate(model, data)[0] and record['in_repository']
    assert (tmp_path/'teachers'/'resnet56'/'weights.safetensors').stat().st_size < 2*2**20      # half precision

    grid = Comparison(tmp_path/'out'/'grid')
    assert sorted(grid.runs.method) == sorted(table9.METHODS) and set(grid.grid['cells']) == set(grid.manifests)
    assert {m['settings']['teacher_hash'] for m in grid.manifests.values()} == {record['hash'], None}
    assert all(m['settings']['channels_last'] for m in grid.manifests.values())
    assert verify(tmp_path/'out'/'grid', teacher=tmp_path/'teachers'/'resnet56'/'weights.safetensors')
    paper = grid.against_published(table9.PAIRS, table9.METHODS)
    assert len(paper) == 30 and (paper.verdict == 'not run').sum() == 25 and (paper.verdict == 'other data').sum() == 5

    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('manifest.json')}
    p = call(cifar, tmp_path, '--stages', 'teachers', 'grid')
    assert 'Nothing is left to run.' in p.stdout and {f: f.stat().st_mtime_ns for f in tmp_path.rglob('manifest.json')} == before


def test_wrong_data_is_one_line(tmp_path):
    p = call(tmp_path/'nowhere', tmp_path)
    assert p.returncode == 1 and p.stderr.strip().count('\n') == 0 and 'is not a folder' in p.stderr


@pytest.mark.parametrize('at_05,at_01,chosen', [(.30, .31, .01), (.31, .30, .05), (.30, .30, .05)])
def test_rule_of_the_rates(tmp_path, at_05, at_01, chosen):
    a = SimpleNamespace(pairs=[('resnet32x4', 'shufflenetv2'), ('resnet56', 'resnet20')], data='cifar100:x', holdout=50, out=tmp_path, epochs=240, threads=1, options={}, left=lambda: 0, failed=0)
    for lr,acc in ((.05, at_05), (.01, at_01)):
        f = tmp_path/'rates'/'shufflenetv2'/f'lr{lr:g}'/'manifest.json'; f.parent.mkdir(parents=True); f.write_text(json.dumps(dict(result=dict(accuracy=acc))))
    assert table9.rates(a) == 0
    assert table9.rate_of('shufflenetv2', a) == chosen and table9.rate_of('resnet20', a) == .05 and table9.rate_of('shufflenetv1', a) is None
    assert table9.recipe_of(a, chosen).lr == chosen


def test_a_student_without_a_rate_waits(tmp_path, capsys):
    a = SimpleNamespace(pairs=[('resnet32x4', 'shufflenetv2')], data='cifar100:x', holdout=50, out=tmp_path, epochs=240, threads=1, jobs=1, options={}, left=lambda: 0, failed=0)
    assert table9.rates(a) == 2 and table9.rate_of('shufflenetv2', a) is None
    assert '2 of 2 runs left' in capsys.readouterr().out
