"The command `diffkd_demo`: real runs, small; resume; one line for each mistake"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from sklearn.datasets import load_digits
from diffkd_nb import demo

QUICK = ['--seeds', '1', '--epochs', '1', '--teacher-epochs', '1', '--teacher', 'small:4', '--student', 'small:2', '--batch-size', '16', '--share', '1', '--threads', '1']


def command(*args, **kw): return subprocess.run([sys.executable, '-m', 'diffkd_nb.demo', *map(str, args)], capture_output=True, text=True, **kw)


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


def check_output(out, methods=('alone', 'kd', 'diffkd'), seeds=1, epochs=1):
    table = [r.split(',') for r in (out/'table.csv').read_text().split()]
    assert [r[0] for r in table] == ['method', 'teacher', *methods]
    log = [r.split(',') for r in (out/'runs.csv').read_text().split()]
    assert len(log) == 1 + len(methods)*seeds*epochs
    i = log[0].index('accuracy')
    for row in table[2:]:
        last = [100*float(r[i]) for r in log[1:] if r[0] == row[0] and int(r[2]) == epochs]
        assert len(last) == seeds and abs(np.mean(last) - float(row[1])) < .06
    manifest = json.loads((out/'manifest.json').read_text())
    assert {'settings', 'data_hash', 'teacher_hash', 'environment'} <= set(manifest) and manifest['environment']['torch']
    for f in ('maps.png', 'training.png'): assert Image.open(out/f).size[0] > 300
    assert not list(out.rglob('*.part'))


def test_digits_end_to_end(tmp_path):
    r = command('--out', tmp_path/'o', *QUICK, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    check_output(tmp_path/'o')
    assert 'last epoch' in r.stdout and str((tmp_path/'o').resolve()) in r.stdout and 'diffkd - kd' in r.stdout and 'Traceback' not in r.stderr


def test_class_folders_with_timm_models(folders, tmp_path, capsys):
    assert demo.main(['--data', str(folders), '--out', str(tmp_path/'o'), '--size', '32', *QUICK, '--student', 'resnet10t', '--methods', 'diffkd', '--batch-size', '8']) == 0
    check_output(tmp_path/'o', ['diffkd'])
    assert '64 training images, 64 of them for the student, 16 for validation, 2 classes' in capsys.readouterr().out


def test_cifar_layout(binaries, tmp_path, capsys):
    assert demo.main(['--data', str(binaries), '--out', str(tmp_path/'o'), *QUICK]) == 0
    check_output(tmp_path/'o')
    assert '60 training images, 60 of them for the student, 20 for validation, 100 classes' in capsys.readouterr().out
    d = demo.cifar_data('cifar100', binaries, limit=2)
    assert len(d.y) == 10 and d.classes[:6] == [*(f'c{i}' for i in range(5)), '5']


def test_killed_and_started_again(tmp_path):
    "A finished run is not run again; the result is that of an undisturbed run"
    args = [*QUICK, '--seeds', '2', '--epochs', '3']
    whole = command('--out', tmp_path/'whole', *args)
    assert whole.returncode == 0, whole.stderr
    p = subprocess.Popen([sys.executable, '-m', 'diffkd_nb.demo', '--out', str(tmp_path/'o'), *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, end = tmp_path/'o'/'runs'/'alone-0.json', time.time() + 60
    while not first.exists() and time.time() < end: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path/'o'/'runs').glob('*.json')}
    assert 1 <= len(kept) < 6
    again = command('--out', tmp_path/'o', *args)
    assert again.returncode == 0 and f'{len(kept)} of them already in' in again.stdout
    assert all(f.stat().st_mtime_ns == t for f,t in kept.items())
    assert (tmp_path/'o'/'runs.csv').read_text() == (tmp_path/'whole'/'runs.csv').read_text()


def test_interrupt_is_one_line(tmp_path):
    p = subprocess.Popen([sys.executable, '-m', 'diffkd_nb.demo', '--out', str(tmp_path/'o'), *QUICK, '--epochs', '500'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while not (tmp_path/'o'/'teacher.safetensors').exists() and time.time() < end: time.sleep(.02)
    time.sleep(.3); p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=30)[1]
    assert p.returncode == 130 and 'interrupted' in err and 'Traceback' not in err and not list((tmp_path/'o').rglob('*.part'))


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
         (lambda t, f, b: ['--data', f, '--batch-size', '500'], ['64 training images for the student', 'batch of 500']),
         (lambda t, f, b: ['--data', b, '--size', '16'], ['--size 16', '32 pixels']), (stranger, ['classes that are not in', 'c'])]


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


def test_a_mistake_is_one_line_in_a_real_shell(tmp_path):
    r = command('--data', tmp_path/'nowhere')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and r.stderr.startswith('diffkd_demo: --data')


def test_help_and_wrong_options():
    r = command('--help')
    assert r.returncode == 0 and all(o in r.stdout for o in ('--data', '--teacher', '--student', '--seeds', '--corrupt', '--out', 'timm'))
    r = command('--epochs', '0')
    assert r.returncode == 2 and 'must be at least 1, got 0' in r.stderr


def test_the_readmes_picture_is_the_stored_runs():
    root = Path(__file__).parent.parent
    assert (root/'nbs'/'images'/'demo_maps.png').read_bytes() == (root/'results'/'demo'/'maps.png').read_bytes()
