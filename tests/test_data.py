"Layouts of data, downloads, damaged files, and one run through each kind of loader"
import functools, hashlib, http.server, io, json, pickle, tarfile, threading
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from diffkd_nb import data
from diffkd_nb.data import InputError, STATS, cifar_data, data_hash, make_dls, open_data
from diffkd_nb.experiment import run, verify
from diffkd_nb.models import make_model, save_weights
from diffkd_nb.recipes import get_recipe


def pixels(n, seed=0): return np.random.RandomState(seed).randint(0, 256, (n, 3072)).astype(np.uint8)


def as_image(row): return Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize('kind,n,nested', [('cifar10', 10, False), ('cifar100', 100, True)])
def test_folders_as_fastai_ships_them(kind, n, nested, tmp_path):
    x, names = pixels(2*n), [f'class{i:03}' for i in range(n)]
    for split in ('train', 'test'):
        for i,row in enumerate(x):
            d = tmp_path/split/(f'group{i % 7}' if nested else '')/names[i % n]     # cifar100/train/coarse/fine/*.png
            d.mkdir(parents=True, exist_ok=True); as_image(row).save(d/f'{i:04}.png')
    d = cifar_data(kind, tmp_path)
    assert d.classes == names and d.n_train == d.n_valid == 2*n and d.stats == STATS[kind]
    order = sorted(range(2*n), key=lambda i: (i % n, i))
    assert d.y.tolist() == [i % n for i in order] or sorted(d.y.tolist()) == sorted(i % n for i in range(2*n))
    by_label = {int(y): {t.numpy().tobytes() for t,l in zip(d.x, d.y) if l == y} for y in d.y.unique()}
    assert all(by_label[c] == {x[i].reshape(3, 32, 32).tobytes() for i in range(2*n) if i % n == c} for c in range(n))
    (tmp_path/'train'/names[0]/'x.png' if not nested else next((tmp_path/'train').rglob('*.png'))).write_text('no picture')
    with pytest.raises(InputError, match='1 image cannot be read'): cifar_data(kind, tmp_path)


@pytest.fixture
def served(tmp_path, monkeypatch):
    "An archive in CIFAR-10's layout on a server of our own, and torchvision's reader told its address and sums"
    site, x = tmp_path/'site', pixels(6)
    site.mkdir()
    batch = lambda rows: pickle.dumps({'data': rows, 'labels': [0, 1, 2, 0, 1, 2][:len(rows)]})
    files = {f'cifar-10-batches-py/{k}': v for k,v in {'data_batch_1': batch(x), 'test_batch': batch(x[:3]), 'batches.meta': pickle.dumps({'label_names': list('abcdefghij')})}.items()}
    with tarfile.open(site/'c.tar.gz', 'w:gz') as t:
        for name,raw in files.items(): info = tarfile.TarInfo(name); info.size = len(raw); t.addfile(info, io.BytesIO(raw))
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    md5 = {Path(k).name: hashlib.md5(v).hexdigest() for k,v in files.items()}
    class Ours(data._CIFAR['cifar10']['cls']):
        url, filename, tgz_md5 = f'http://127.0.0.1:{server.server_port}/c.tar.gz', 'c.tar.gz', hashlib.md5((site/'c.tar.gz').read_bytes()).hexdigest()
        train_list, test_list, meta = [['data_batch_1', md5['data_batch_1']]], [['test_batch', md5['test_batch']]], dict(filename='batches.meta', key='label_names', md5=md5['batches.meta'])
    monkeypatch.setitem(data._CIFAR['cifar10'], 'cls', Ours)
    yield Ours, x
    server.shutdown()


def test_download_checks_its_sum(served, tmp_path, monkeypatch):
    Ours, x = served
    with pytest.raises(InputError, match='holds no cifar10'): cifar_data('cifar10', tmp_path/'d')
    d = open_data(f"cifar10:{tmp_path/'d'}", download=True)
    assert (d.x.numpy().reshape(6, -1) == x).all() and d.y.tolist() == [0, 1, 2, 0, 1, 2] and d.classes == list('abcdefghij')
    assert data_hash(open_data(f"cifar10:{tmp_path/'d'}")) == data_hash(d)          # there now, without a network
    monkeypatch.setattr(Ours, 'tgz_md5', '0'*32)
    with pytest.raises(InputError): open_data(f"cifar10:{tmp_path/'e'}", download=True)
    monkeypatch.setattr(Ours, 'url', 'http://127.0.0.1:9/c.tar.gz')
    with pytest.raises(InputError, match='cannot be downloaded'): open_data(f"cifar10:{tmp_path/'f'}", download=True)


@pytest.fixture
def photos(tmp_path):
    for split,n in (('train', 12), ('val', 4)):
        for i,c in enumerate('ab'):
            (tmp_path/'photos'/split/c).mkdir(parents=True)
            for j in range(n): Image.fromarray(np.random.RandomState(j + 50*i).randint(0, 128 + 100*i, (40, 36, 3)).astype(np.uint8)).save(tmp_path/'photos'/split/c/f'{j}.jpg')
    return tmp_path/'photos'


@pytest.mark.parametrize('kind', ['folder', 'arrays'])
def test_a_run_on_own_images(kind, photos, tmp_path):
    save_weights(make_model('small:8', 2, 3, 32), tmp_path/'t.safetensors')
    recipe = get_recipe('small').scaled(2).replace(batch_size=8, augmentation=('crop', 'flip', 'color_jitter') if kind == 'folder' else ('crop', 'flip'))
    loader = dict(num_workers=1) if kind == 'folder' else {}
    m = run(recipe, f'{kind}:{photos}?size=32', f"small:8@{tmp_path/'t.safetensors'}", 'resnet8', 'diffkd', 0, tmp_path/'o', teacher_stats='cifar10', progress=False, **loader)
    assert m['data']['n_train'] == 24 and m['data']['n_valid'] == 8 and m['settings']['data_hash'].startswith('content:' if kind == 'folder' else 'pixels:')
    report = verify(tmp_path/'o', data=f'{kind}:{photos}?size=32')
    assert report and all(c.ok for c in report), str(report)
    if kind == 'folder':            # other content, same names and sizes: found
        f = next((photos/'val').rglob('*.jpg')); raw = bytearray(f.read_bytes()); raw[-3] ^= 1; f.write_bytes(raw)
        assert [c.what for c in verify(tmp_path/'o', data=f'{kind}:{photos}?size=32') if c.ok is False] == ['the data is the same']


def test_an_image_that_cannot_be_read_is_named(photos):
    bad = next((photos/'train').rglob('*.jpg')); bad.write_text('no picture')
    with pytest.raises(InputError, match=str(bad)): list(make_dls(open_data(f'folder:{photos}?size=32'), 4, num_workers=0).train)


def test_what_memory_cannot_do_is_refused(photos):
    with pytest.raises(InputError, match="'randaugment'.*folder:PATH"): make_dls(open_data('digits'), 8, ('crop', 'randaugment'))
    with pytest.raises(InputError, match="'crop', 'flip', 'randaugment'"): list(make_dls(open_data(f'folder:{photos}?size=32'), 4, ('crop', 'blur'), num_workers=0).train)
    with pytest.raises(InputError, match='fewer than one batch of 5000'): make_dls(open_data('digits'), 5000)
