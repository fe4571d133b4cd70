"Layouts of data, downloads, damaged files, and one run through each kind of loader"
import functools, hashlib, http.server, io, json, pickle, random, tarfile, threading
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torchvision.transforms import v2
from diffkd_nb import data, transforms
from diffkd_nb.data import InputError, STATS, cifar_data, data_hash, make_dls, open_data
from diffkd_nb.experiment import evaluate, run, verify
from diffkd_nb.loaders import FileDataset
from diffkd_nb.models import make_model
from diffkd_nb.recipes import get_recipe
from diffkd_nb.rng import seeded
from diffkd_nb.transforms import image_transform, make_augmentation, read_pixels
from diffkd_nb.weights import load_weights, save_weights


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


@pytest.fixture
def wave():
    "A smooth picture, in which every place looks different"
    rows, cols = np.mgrid[:120, :160]
    return Image.fromarray(np.stack([rows*2, cols*1.5, 127 + 100*np.sin(rows/9)*np.cos(cols/7)], 2).astype(np.uint8))


def as_bytes(im): return torch.from_numpy(np.array(im)).permute(2, 0, 1)


@pytest.mark.parametrize('crop', ['crop', 'crop:bicubic'])
def test_the_box_and_the_flip_are_torchvisions(crop, wave, tmp_path):
    wave.save(tmp_path/'a.jpg', quality=95)
    im, how = Image.open(tmp_path/'a.jpg').convert('RGB'), v2.InterpolationMode(crop.partition(':')[2] or 'bilinear')
    files = FileDataset([str(tmp_path/'a.jpg')]*40, torch.zeros(40).long(), image_transform(64, (crop, 'flip'), STATS['imagenet'], True))
    files.epoch_seed, flips = 2**59 + 17, 0
    for n in range(40):
        torch.manual_seed(files.epoch_seed + 1_000_003*n)
        top, left, h, w = v2.RandomResizedCrop.get_params(im, (.08, 1.), (3/4, 4/3))
        want = v2.functional.resized_crop(im, top, left, h, w, [64, 64], how)
        if flip := torch.rand(1).item() < .5: want = v2.functional.horizontal_flip(want)
        far = (files[n][0].float() - as_bytes(want).float()).abs()
        assert far.mean() < .25 and far.max() <= 2, (n, far.mean(), far.max())     # a shift by one pixel is more than 1 on average
        flips += flip
    assert 10 < flips < 30


def test_validation_is_resize_and_centre_crop(photos):
    for spec,how in (('crop', 'bilinear'), ('crop:bicubic', 'bicubic')):
        dls = make_dls(open_data(f'folder:{photos}?size=32'), 4, (spec,), num_workers=0)
        x, y = next(iter(dls.valid))
        for got,f in zip(x, dls.valid.dataset.files):
            im = v2.functional.center_crop(v2.functional.resize(Image.open(f).convert('RGB'), 37, v2.InterpolationMode(how)), [32, 32])
            want = v2.functional.normalize(as_bytes(im)/255, *STATS['imagenet'])
            assert (got - want).abs().mean() < .25/255/.22


def test_batches_are_normalised_floats_and_travel_as_bytes(photos):
    d = open_data(f'folder:{photos}?size=32')
    dls = make_dls(d, 4, num_workers=0)
    for dl in (dls.train, dls.valid, dls.train.new(bs=2), dls.valid.new()):
        x, y = dl.one_batch()
        assert x.dtype == torch.float32 and x.is_contiguous() and y.dtype == torch.int64 and x.shape[1:] == (3, 32, 32) and x.device == dls.device
        assert dl.create_batch([dl.dataset[0]])[0].dtype == torch.uint8
    dl = make_dls(d, 4, (), num_workers=0).train.new(shuffle=False, drop_last=False)
    for i,row in enumerate(torch.cat([x for x,_ in dl])):
        assert torch.allclose(row, v2.functional.normalize(dl.dataset[i][0]/255, *STATS['imagenet']), atol=1e-6)


STRONG = [('crop', 'flip', 'randaugment:rand-m9-mstd0.5', 'random_erasing:0.5'), ('crop:bicubic', 'flip', 'randaugment:9', 'color_jitter', 'random_erasing:0.5')]


@pytest.mark.parametrize('augmentation', STRONG)
def test_a_sample_depends_on_epoch_seed_and_index_alone(augmentation, photos):
    d, seen = open_data(f'folder:{photos}?size=32'), []
    for workers in (0, 1, 2):
        random.seed(workers); np.random.seed(workers); torch.manual_seed(workers)      # what else was drawn changes nothing
        train = make_dls(d, 4, augmentation, seed=3, num_workers=workers).train
        train.set_epoch(2); seen.append([x for x,_ in train] + [x for x,_ in train])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a,b,c in zip(*seen)) and not torch.equal(seen[0][0], seen[0][6])
    ds = make_dls(d, 4, augmentation, num_workers=0).train.dataset
    ds.epoch_seed = 5
    forth, back = [ds[i] for i in range(6)], [ds[i] for i in reversed(range(6))][::-1]
    assert all(torch.equal(p, q) for a,b in zip(forth, back) for p,q in zip(a, b))


def test_loading_leaves_the_generators_alone(photos):
    draw = lambda: (torch.rand(1).item(), random.random(), np.random.rand())
    def seed(): torch.manual_seed(1); random.seed(1); np.random.seed(1)
    seed(); want = draw(), draw()
    train = make_dls(open_data(f'folder:{photos}?size=32'), 4, STRONG[0], num_workers=0).train
    seed(); first = draw(); [train.dataset[i] for i in range(6)]
    assert (first, draw()) == want
    bad = Path(train.dataset.files[0]); bad.write_text('no picture')
    seed(); draw()
    with pytest.raises(InputError): train.dataset[0]
    assert draw() == want[1]


def test_erasing_is_torchvisions_on_normalised_values(photos):
    d = open_data(f'folder:{photos}?size=32')
    dl = make_dls(d, 4, ('random_erasing:0.6',), num_workers=0).train.new(shuffle=False, drop_last=False, bs=7)
    got, changed = torch.cat([x for x,_ in dl]), 0
    for i,row in enumerate(got):
        x = v2.functional.normalize(dl.dataset[i][0]/255, *STATS['imagenet'])
        torch.manual_seed(dl.dataset.epoch_seed + 1_000_003*i)
        want = v2.RandomErasing(.6, value='random')(x)
        assert torch.allclose(row, want, atol=1e-6)
        changed += not torch.equal(want, x)
    assert 6 < changed < 22                     # of 24
    assert torch.equal(*(next(iter(make_dls(d, 4, a, num_workers=0).valid))[0] for a in (('random_erasing:1',), ())))


def test_randaugment_by_its_value():
    t = make_augmentation('randaugment:rand-m9-mstd0.5', 160, ((.5, 0., 1.), (1., 1., 1.)))
    assert isinstance(t, RandAugment) and {o.hparams['translate_const'] for o in t.ops} == {72} and t.ops[0].hparams['img_mean'] == (128, 0, 255)
    want = rand_augment_transform('rand-m9-mstd0.5', dict(translate_const=72, img_mean=(128, 0, 255)))
    im = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
    for s in range(20):
        with seeded(s): a = np.array(t(im))
        with seeded(s): b = np.array(want(im))
        assert (a == b).all()
    assert isinstance(make_augmentation('randaugment:7'), v2.RandAugment) and make_augmentation('randaugment:7').magnitude == 7 and make_augmentation('randaugment').magnitude == 9
    assert make_augmentation('random_erasing:0.2').p == .2 and make_augmentation('random_erasing:0.2').value is None      # None: noise for each pixel


@pytest.mark.parametrize('name', ['randaugment:strong', 'randaugment:rand-q9', 'random_erasing:x', 'color_jitter:x', 'crop:nearest', 'random_erasings'])
def test_augmentation_that_is_not_understood(name, photos):
    with pytest.raises(InputError, match=name): make_dls(open_data(f'folder:{photos}?size=32'), 4, (name,))


@pytest.mark.parametrize('name,mode,kind', [('a.jpg', 'RGB', 'JPEG'), ('a.jpg', 'L', 'JPEG'), ('a.jpg', 'CMYK', 'JPEG'), ('a.png', 'P', 'PNG'), ('a.png', 'RGBA', 'PNG'), ('a.png', 'LA', 'PNG'), ('a.png', '1', 'PNG'),
                                            ('a.png', 'I;16', 'PNG'), ('a.jpeg', 'RGB', 'PNG'), ('a.png', 'RGB', 'JPEG'), ('a.gif', 'P', 'GIF'), ('a.webp', 'RGB', 'WEBP'), ('a.tif', 'CMYK', 'TIFF')])
def test_every_mode_reads_as_pillow_reads_it(name, mode, kind, wave, tmp_path, monkeypatch):
    (Image.fromarray((np.asarray(wave.convert('L')).astype(np.uint16)*200)) if mode == 'I;16' else wave.convert(mode)).save(tmp_path/name, kind)
    want = as_bytes(Image.open(tmp_path/name).convert('RGB'))
    if mode == 'I;16': want = torch.from_numpy(np.rint(np.asarray(wave.convert('L')).astype(int)*200/257)).to(torch.uint8).repeat(3, 1, 1)     # Pillow would clip
    assert torch.equal(read_pixels(tmp_path/name), want)
    def none(*a, **kw): raise RuntimeError('no such operator')
    monkeypatch.setattr(transforms, 'decode_jpeg', none)                  # a torchvision without its image library
    assert torch.equal(read_pixels(tmp_path/name), want)


@pytest.mark.parametrize('kw', [dict(progressive=True), dict(subsampling=0), dict(subsampling=1, quality=20), dict(restart_marker_rows=1), dict(keep_rgb=True), dict(exif=True)], ids=str)
def test_every_jpeg_reads_as_pillow_reads_it(kw, wave, tmp_path):
    if 'exif' in kw: kw = dict(exif=Image.Exif()); kw['exif'][0x0112] = 6         # a turn that is not made
    wave.save(tmp_path/'a.jpg', **kw)
    got = read_pixels(tmp_path/'a.jpg')
    assert got.shape == (3, 120, 160) and torch.equal(got, as_bytes(Image.open(tmp_path/'a.jpg').convert('RGB')))


@pytest.mark.parametrize('damage,workers', [*((d, 0) for d in ('cut', 'empty', 'header', 'gone')), ('cut', 1),
    *(pytest.param(d, 1, marks=pytest.mark.slow) for d in ('empty', 'header', 'gone'))])
def test_a_damaged_jpeg_is_named(damage, workers, photos):
    dls = make_dls(open_data(f'folder:{photos}?size=32'), 4, num_workers=workers)
    bad = next((photos/'train').rglob('*.jpg')); raw = bad.read_bytes()
    if damage == 'gone': bad.unlink()
    else: bad.write_bytes({'cut': raw[:len(raw)//2], 'empty': b'', 'header': raw[:3]}[damage])
    with pytest.raises(InputError, match=f'image {bad} cannot be read'): list(dls.train)


def test_verify_resizes_as_the_run_did(photos, tmp_path):
    recipe = get_recipe('small').scaled(1).replace(batch_size=8, augmentation=('crop:bicubic', 'flip', 'randaugment:rand-m9-mstd0.5', 'random_erasing:0.2'))
    run(recipe, f'folder:{photos}?size=32', None, 'resnet8', 'alone', 0, tmp_path/'o', progress=False, num_workers=0)
    report = verify(tmp_path/'o', data=f'folder:{photos}?size=32')
    assert report and all(c.ok for c in report), str(report)
    model, d = load_weights(make_model('resnet8', 2, 3, 32), tmp_path/'o'/'student.safetensors'), open_data(f'folder:{photos}?size=32')
    assert evaluate(model, d, num_workers=0) != evaluate(model, d, augmentation=recipe.augmentation, num_workers=0)


@pytest.mark.parametrize('kind', ['digits', 'arrays', 'folder'])
def test_an_example_is_what_validation_shows_and_draws_nothing(kind, photos):
    d = open_data('digits' if kind == 'digits' else f'{kind}:{photos}?size=32')
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    x, = d.example(3)
    assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all() and torch.equal(torch.get_rng_state(), state[2])
    assert x.shape == (3, d.channels, d.size, d.size) and torch.equal(x, next(iter(make_dls(d, 2, ()).valid))[0][:3])
    assert d.task == 'classification' and isinstance(d, data.Data)


def png(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (16, 16), (value, 0, 0)).save(path)


def tree(root, *splits, n=10):
    for s in splits or ('',):
        for c in ('ant', 'bee'):
            for i in range(n): png(root/s/c/f'{i}.png', i)
    return root


KINDS = pytest.mark.parametrize('kind', ['folder', 'arrays'])


@KINDS
@pytest.mark.parametrize('junk', ['train/.ipynb_checkpoints/1-checkpoint.png', 'train/ant/.ipynb_checkpoints/1.png', '__MACOSX/train/ant/1.png', 'train/__MACOSX/ant/1.png', 'train/ant/._1.png', '.git/1.png', 'train/.thumbs/deep/1.png'])
def test_hidden_folders_are_no_classes(kind, junk, tmp_path):
    for root,name,n in ((tree(tmp_path/'a', 'train', 'val'), junk, (20, 20)), (tree(tmp_path/'b'), junk.replace('train/', ''), (16, 4))):
        (root/name).parent.mkdir(parents=True, exist_ok=True); (root/name).write_bytes(b'\0\5\x16\7')
        d = open_data(f'{kind}:{root}?size=16')
        assert d.classes == ['ant', 'bee'] and (d.n_train, d.n_valid) == n


@KINDS
@pytest.mark.parametrize('train,valid', [('train', 'val'), ('train', 'valid'), ('train', 'validation'), ('train', 'test'), ('Train', 'Val'), ('training', 'testing')])
def test_splits_are_known_by_their_names(kind, train, valid, tmp_path):
    d = open_data(f'{kind}:{tree(tmp_path/"a", train, valid)}?size=16')
    assert d.classes == ['ant', 'bee'] and (d.n_train, d.n_valid) == (20, 20)


def test_of_several_splits_the_validation_is_taken(tmp_path):
    root = tree(tree(tmp_path/'a', 'train', 'test'), 'validation', n=3)
    assert open_data(f'folder:{root}').n_valid == 6


@KINDS
@pytest.mark.parametrize('splits', [('train', 'dev'), ('train',), ('test', 'val'), ('train1', 'train2'), ('validation', 'training_2')])
def test_splits_of_other_names_are_one_error(kind, splits, tmp_path):
    with pytest.raises(InputError, match='expected train/ and one of val/, valid/, validation/, test/, or class folders alone'): open_data(f'{kind}:{tree(tmp_path/"a", *splits)}?size=16')


def test_a_train_may_be_a_class(tmp_path):
    for c in ('train', 'bus', 'test'):
        for i in range(5): png(tmp_path/'vehicles'/('test_drive' if c == 'test' else c)/f'{i}.png')
    assert open_data(f'folder:{tmp_path/"vehicles"}').classes == ['bus', 'test_drive', 'train']


@KINDS
def test_links_to_folders_are_followed_and_circles_end(kind, tmp_path):
    root, store = tree(tmp_path/'a', 'train', 'val'), tmp_path/'store'
    for i in range(4): png(store/'cat'/f'{i}.png', i)
    (root/'train'/'cat').symlink_to(store/'cat'); (root/'train'/'dog').symlink_to(store/'cat')      # twice is no circle
    (store/'cat'/'up').symlink_to(root); (root/'train'/'ant'/'self').symlink_to(root/'train'/'ant')
    d = open_data(f'{kind}:{root}?size=16')
    assert d.classes == ['ant', 'bee', 'cat', 'dog'] and d.hash()
    whole = tmp_path/'whole'; whole.symlink_to(tree(tmp_path/'b', 'train', 'val'))
    assert open_data(f'{kind}:{whole}?size=16').n_train == 20


@KINDS
@pytest.mark.parametrize('ending', ['png', 'tif'])
def test_sixteen_bits_are_scaled(kind, ending, tmp_path):
    values = [0, 128, 129, 257, 12345, 32768, 60000, 65535]
    for c in 'ab':
        for i in range(10):
            (tmp_path/'x'/c).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((16, 16), values[i % 8], np.uint16)).save(tmp_path/'x'/c/f'{i}.{ending}')
    d = open_data(f'{kind}:{tmp_path/"x"}?size=16')
    x = d.xv[0] if kind == 'arrays' else read_pixels(d.split(1)[0][0])
    assert (x == round(values[4]/65535*255)).all() and x.dtype == torch.uint8
    for f,v in zip(sorted((tmp_path/'x'/'a').iterdir())[:8], values): assert (read_pixels(f) == round(v/65535*255)).all()
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path/'f.tif')
    with pytest.raises(ValueError, match='no known range'): read_pixels(tmp_path/'f.tif')


@KINDS
@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_picture_is_one_line_by_command(kind, workers, tmp_path, capfd):
    from diffkd_nb.commands import train_main
    root = tree(tmp_path/'a')
    (root/'ant'/'3.png').write_text('no picture')
    args = ['--data', f'{kind}:{root}?size=16', '--recipe', 'tiny', '--epochs', '1', '--batch-size', '16', '--student', 'small:4', '--method', 'alone', '--device', 'cpu', '--out', tmp_path/'o', *(['--workers', workers] if kind == 'folder' else [])]
    assert train_main(list(map(str, args))) == 2
    lines = [l for l in capfd.readouterr().err.splitlines() if l.strip()]
    assert len(lines) == 1 and str(root/'ant'/'3.png') in lines[0] and 'cannot be read' in lines[0] and 'emove or repair it' in lines[0]
    assert 'diffkd_train --corrupt' not in lines[0] and 'Traceback' not in lines[0]
