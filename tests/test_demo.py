"The command `diffkd_demo`: real runs, small; resume; one line for each mistake"
import json, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from sklearn.datasets import load_digits
import workers
from diffkd_nb import demo
from diffkd_nb.data import cifar_data
from diffkd_nb.verify import verify

MAIN = 'diffkd_nb.demo:main'

QUICK = ['--seeds', '1', '--epochs', '1', '--teacher-epochs', '1', '--teacher', 'small:4', '--student', 'small:2', '--batch-size', '16', '--share', '1', '--threads', '1']
FEW = [*QUICK, '--share', '0.1'] # of the digits


@pytest.fixture
def folders(tmp_path):
    "Forty digits of two classes as PNG files"
    x, y = load_digits(return_X_y=True)
    for c in (0, 1):
        (tmp_path/'data'/f'digit{c}').mkdir(parents=True)
        for i,im in enumerate(x[y == c][:40]): Image.fromarray((im.reshape(8, 8)*15.9).astype(np.uint8)).save(tmp_path/'data'/f'digit{c}'/f'{i:02}.png')
    return tmp_path/'data'


@pytest.fixture
def binaries(tmp_path):
    "CIFAR-100's layout, 5 classes"
    d, rng = tmp_path/'bin', np.random.RandomState(0)
    d.mkdir()
    for f,n in (('train.bin', 60), ('test.bin', 20)):
        rows = rng.randint(0, 256, (n, 3074)).astype(np.uint8); rows[:, 1] = np.arange(n) % 5
        rows.tofile(d/f)
    (d/'fine_label_names.txt').write_text('\n'.join(f'c{i}' for i in range(5)))
    return d


def logs(out): return {f.parent.relative_to(out).as_posix(): f.read_text() for f in sorted((out/'students').rglob('log.csv'))}


def check_output(out, methods=('alone', 'kd', 'diffkd'), seeds=1, epochs=1):
    "The table is the last epochs of the logs; all that is written stands checking"
    table = pd.read_csv(out/'students'/'table.csv').set_index('method')
    assert list(table.index) == list(methods) and (table.n == seeds).all()
    found = {f.parent.relative_to(out).as_posix(): pd.read_csv(f) for f in sorted((out/'students').rglob('log.csv'))}
    assert len(found) == len(methods)*seeds and all(len(log) == epochs for log in found.values())
    for m in methods: assert abs(np.mean([100*log.accuracy.iloc[-1] for f, log in found.items() if f'/{m}/' in f]) - table.accuracy[m]) < 1e-3
    made = [json.loads(f.read_text()) for f in out.rglob('manifest.json')]
    assert len(made) == len(found) + 1 and all({'settings', 'environment', 'student_hash', 'hash'} <= set(m) and m['environment']['torch'] for m in made)
    for f in ('maps.png', 'training.png'): assert Image.open(out/f).size[0] > 300
    report = verify(out, trust=True)    # images of one's own lie elsewhere
    assert report and all(c.ok for c in report), report
    assert json.loads((out/'settings.json').read_text())['epochs'] == epochs and not list(out.rglob('*.part'))


def test_digits_end_to_end(tmp_path):
    r = workers.command(MAIN, '--out', tmp_path/'o', *FEW, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    check_output(tmp_path/'o')
    assert 'last epoch' in r.stdout and str((tmp_path/'o').resolve()) in r.stdout and 'diffkd - kd' in r.stdout and 'Traceback' not in r.stderr


@pytest.mark.slow
def test_class_folders_with_timm_models(folders, tmp_path, capsys):
    assert demo.main(['--data', str(folders), '--out', str(tmp_path/'o'), '--size', '32', *QUICK, '--student', 'resnet10t', '--methods', 'diffkd', '--batch-size', '8']) == 0
    check_output(tmp_path/'o', ['diffkd'])
    assert '64 training images, 64 of them for the student, 16 for validation, 2 classes' in capsys.readouterr().out


@pytest.mark.slow
def test_cifar_layout(binaries, tmp_path, capsys):
    assert demo.main(['--data', str(binaries), '--out', str(tmp_path/'o'), *QUICK]) == 0
    check_output(tmp_path/'o')
    assert '60 training images, 60 of them for the student, 20 for validation, 100 classes' in capsys.readouterr().out
    d = cifar_data('cifar100', binaries, limit=2)
    assert len(d.y) == 10 and d.classes[:6] == [*(f'c{i}' for i in range(5)), '5']


def wait_for(p, found):
    "Wait until `found` gives something"
    end = time.time() + 120
    while not found(): assert p.poll() is None and time.time() < end, p.output; time.sleep(.02)


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    "A finished run is not run again; the result is that of an undisturbed run"
    args = [*FEW, '--seeds', '1', '--epochs', '3']
    whole = workers.command(MAIN, '--out', tmp_path/'whole', *args)
    assert whole.returncode == 0, whole.stderr
    p = workers.start_command(MAIN, '--out', tmp_path/'o', *args)
    wait_for(p, lambda: list((tmp_path/'o'/'students').rglob('manifest.json')))
    p.send_signal(signal.SIGKILL); p.wait(); time.sleep(.5)     # what it started ends, too
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path/'o'/'students').rglob('manifest.json')}
    assert 1 <= len(kept) < 3
    again = workers.command(MAIN, '--out', tmp_path/'o', *args)
    assert again.returncode == 0 and f'{len(kept)} of them already in' in again.stdout, again.stderr
    assert all(f.stat().st_mtime_ns == t for f,t in kept.items())
    assert logs(tmp_path/'o') == logs(tmp_path/'whole')


@pytest.mark.slow
def test_interrupt_is_one_line(tmp_path):
    p = workers.start_command(MAIN, '--out', tmp_path/'o', *FEW, '--epochs', '2000')
    wait_for(p, lambda: list((tmp_path/'o'/'students').rglob('log.csv')))
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1
    assert not list((tmp_path/'o').rglob('*.part')) and not list((tmp_path/'o').rglob('*.err'))


# each: a function of tmp_path, the folders and the binaries that gives arguments
def empty(t, f, b): (t/'empty').mkdir(); return ['--data', t/'empty']
def one_class(t, f, b): [p.unlink() for p in (f/'digit1').iterdir()]; return ['--data', f]
def one_fine_label(t, f, b):
    for n in ('train.bin', 'test.bin'): rows = np.fromfile(b/n, np.uint8).reshape(-1, 3074); rows[:, 1] = 3; rows.tofile(b/n)
    return ['--data', b]
def short_file(t, f, b): (b/'test.bin').write_bytes(b'x'*5000); return ['--data', b]
def no_test_file(t, f, b): (b/'test.bin').unlink(); return ['--data', b]
def wrong_label(t, f, b): rows = np.fromfile(b/'train.bin', np.uint8).reshape(-1, 3074); rows[5, 1] = 200; rows.tofile(b/'train.bin'); return ['--data', b]
def broken_image(t, f, b): (f/'digit0'/'05.png').write_bytes(b'no image'); (f/'digit1'/'07.png').write_bytes((f/'digit1'/'08.png').read_bytes()[:40]); return ['--data', f]
def other_settings(t, f, b): assert demo.main(['--out', str(t/'o'), *QUICK, '--methods', 'alone']) == 0; return ['--epochs', '2']
def out_in_use(t, f, b): (t/'o').mkdir(); (t/'o'/'thesis.txt').write_text('precious'); return []
def out_is_a_file(t, f, b): (t/'o').write_text('precious'); return []
def other_weights(t, f, b):
    from safetensors.torch import save_file; import torch
    save_file({'a': torch.ones(1)}, t/'w.safetensors'); return ['--teacher-weights', t/'w.safetensors']
def no_weights(t, f, b): return ['--teacher-weights', t/'gone.safetensors']
def stranger(t, f, b):
    for c in ('train/a', 'train/b', 'val/c'): (t/'s'/c).mkdir(parents=True); [Image.new('RGB', (8, 8)).save(t/'s'/c/f'{i}.png') for i in range(3)]
    return ['--data', t/'s']

TABLE = [(lambda t, f, b: ['--data', t/'nowhere'], ['nowhere is not a folder', 'train.bin']), (empty, ['is empty', 'class folders']),
         (one_class, ['has 1 class folders with images: digit0', 'at least two']), (one_fine_label, ['one class only']), (short_file, ['test.bin has 5000 bytes', '3074']),
         (no_test_file, ['test.bin is missing']), (wrong_label, ['label of 200', '0 to 99']), (broken_image, ['2 images cannot be read', '05.png', '07.png', '--corrupt skip']),
         (lambda t, f, b: ['--student', 'resnet81'], ["no model named 'resnet81'", 'resnet18']), (lambda t, f, b: ['--teacher', 'small:x'], ["'small:x'", 'small:4']),
         (other_settings, ['other settings', 'epochs: 1 there, 2 now', '--out']), (out_in_use, ['holds something else', '--out']), (out_is_a_file, ['holds something else']),
         (other_weights, ['does not fit the model']), (no_weights, ['gone.safetensors is not a file']), (lambda t, f, b: ['--student', 'convnext_atto'], ['student (ConvNeXt) fails', '(2, 1, 8, 8)']),
         (lambda t, f, b: ['--data', f, '--batch-size', '500'], ['64 training images are fewer', 'batch of 500']),
         (lambda t, f, b: ['--data', b, '--size', '16'], ['size=16', '32 pixels']), (stranger, ['classes that are not in', 'c'])]


@pytest.mark.parametrize('case', TABLE, ids=lambda c: c[0].__name__ if c[0].__name__ != '<lambda>' else c[1][0])
def test_mistakes(case, tmp_path, folders, binaries, capsys):
    make, says = case
    args = [str(a) for a in make(tmp_path, folders, binaries)]
    before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    capsys.readouterr()
    assert demo.main(['--out', str(tmp_path/'o'), *QUICK, *args]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith('diffkd_demo: ') and '\n' not in err
    for s in says: assert s in err, f'{s!r} not in {err!r}'
    after = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    assert after == before, 'something half-written stays behind'


def test_corrupt_images_skipped_and_counted(folders, tmp_path, capsys):
    args = broken_image(tmp_path, folders, None)
    assert demo.main([*map(str, args), '--out', str(tmp_path/'o'), *QUICK, '--methods', 'alone', '--corrupt', 'skip']) == 0
    out = capsys.readouterr()
    assert '62 training images' in out.out and 'Left out: 2 images cannot be read' in out.err


@pytest.mark.slow       # test_commands starts a script from nothing every time
def test_a_mistake_is_one_line_in_a_real_shell(tmp_path):
    "Started from nothing, as a user does"
    r = subprocess.run([sys.executable, '-m', 'diffkd_nb.demo', '--data', tmp_path/'nowhere'], capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and r.stderr.startswith('diffkd_demo: --data')


def test_help_and_wrong_options(capsys):
    with pytest.raises(SystemExit) as e: demo.main(['--help'])
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(o in out for o in ('--data', '--teacher', '--student', '--seeds', '--corrupt', '--out', 'timm'))
    with pytest.raises(SystemExit) as e: demo.main(['--epochs', '0'])
    assert e.value.code == 2 and 'must be at least 1, got 0' in capsys.readouterr().err


def test_the_readmes_picture_is_the_stored_runs():
    root = Path(__file__).parent.parent
    assert (root/'nbs'/'images'/'demo_maps.png').read_bytes() == (root/'results'/'demo'/'maps.png').read_bytes()
