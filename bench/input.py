"""Images per second of the input pipeline alone: JPEG files to normalised batches of 64 crops, by worker processes.

    python bench/input.py (--data FOLDER | --enlarge FOLDER) [--workers 2] [--rounds 7] [--out results/bench/input_cpu.json]

Sides: torchvision's reference loader, fastai's own, ours, ours as it was with Pillow and float32 in the workers, and candidates for single
parts. Each gives batches of float32 on the CPU; `ours, bytes` ends before the normalisation, which a GPU would do. All sides alternate, medians
over rounds are kept. Where a machine has other work too, the processor time per image says more than the images per second. `difference` is the
mean distance in grey levels from torchvision's Pillow result with the same draws.

`--data` is a folder of ImageNet's layout, taken as it is. `--enlarge` is any folder of small images: some are enlarged to 500 x 375 JPEGs in a
temporary folder. Enlarging makes a picture smooth, so some grain is added; a file then has about 75 kB, one of ImageNet's about 110. Libraries
that are not installed are named in the result and left out.
"""
import argparse, functools, importlib, importlib.metadata, json, multiprocessing, os, random, statistics, tempfile, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from torch.utils.data import DataLoader as TorchDL
from torchvision import datasets
from torchvision.io import decode_jpeg
from torchvision.transforms import v2
from fastai.basics import DataLoader, set_seed
from diffkd_nb.data import STATS, ImageFolder, folder_dls
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.files import write_whole
from diffkd_nb.rng import seeded

MEAN, STD = STATS['imagenet']
FLOAT = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
CHW = lambda a: torch.from_numpy(a).permute(2, 0, 1)


# Decoders: path to Pillow image or bytes (3, H, W)
def pillow(f):
    with Image.open(f) as im: return im.convert('RGB')

def torchvision_io(f): return decode_jpeg(torch.from_numpy(np.fromfile(f, np.uint8)), mode='RGB')
def simplejpeg(f): return CHW(lib('simplejpeg').decode_jpeg(Path(f).read_bytes(), 'RGB'))
def opencv(f): return CHW(lib('cv2').imdecode(np.fromfile(f, np.uint8), lib('cv2').IMREAD_COLOR_RGB))
def pyturbojpeg(f): return CHW(turbo().decode(Path(f).read_bytes(), pixel_format=lib('turbojpeg').TJPF_RGB))


@functools.lru_cache(None)
def lib(name):
    m = importlib.import_module(name)
    if name == 'cv2': m.setNumThreads(1)
    return m

@functools.lru_cache(None)
def turbo(): return lib('turbojpeg').TurboJPEG()


# Crops: path and side to the crop; `box` draws as torchvision does
def box(h, w): return v2.RandomResizedCrop.get_params(torch.empty(3, h, w, device='meta'), (.08, 1.), (3/4, 4/3))

def cropped(decode):
    def crop(f, size): return v2.functional.to_image(v2.RandomResizedCrop(size)(decode(f)))
    return crop

def pillow_draft(f, size):
    with Image.open(f) as im:
        w, h = im.size
        top, left, ch, cw = box(h, w)
        im.draft('RGB', (max(1, w*size//cw), max(1, h*size//ch)))       # halves as long as the crop keeps `size` pixels
        s = w/im.width
        return v2.functional.pil_to_tensor(im.convert('RGB').resize((size, size), Image.BILINEAR, box=(left/s, top/s, min(left + cw, w)/s, min(top + ch, h)/s)))

def opencv_resize(f, size):
    a = lib('cv2').imdecode(np.fromfile(f, np.uint8), lib('cv2').IMREAD_COLOR_RGB)
    top, left, h, w = box(*a.shape[:2])
    return CHW(lib('cv2').resize(a[top:top+h, left:left+w], (size, size), interpolation=lib('cv2').INTER_AREA if min(h, w) >= size else lib('cv2').INTER_LINEAR))

def pyvips_crop(f, size):
    "Decodes row by row and stops below the crop"
    im = lib('pyvips').Image.new_from_file(str(f), access='sequential')
    top, left, h, w = box(im.height, im.width)
    return v2.functional.resize(CHW(im.crop(left, top, w, h).numpy()), [size, size])


# name: (crop, libraries it needs, whether the workers normalise)
CANDIDATES = {
    'Pillow, bytes to the main process': (cropped(pillow), ['PIL'], False), 'Pillow with draft': (pillow_draft, ['PIL'], False),
    'Pillow, resized as a tensor': (cropped(lambda f: CHW(np.array(pillow(f)))), ['PIL'], False),
    'torchvision.io, float32 from the workers': (cropped(torchvision_io), ['torchvision'], True),
    'torchvision.io': (cropped(torchvision_io), ['torchvision'], False),
    'simplejpeg': (cropped(simplejpeg), ['simplejpeg'], False), 'OpenCV': (cropped(opencv), ['cv2'], False),
    'OpenCV, its own resize': (opencv_resize, ['cv2'], False), 'PyTurboJPEG': (cropped(pyturbojpeg), ['turbojpeg'], False),
    'pyvips, only rows down to the crop': (pyvips_crop, ['pyvips'], False)}


class Crops(torch.utils.data.Dataset):
    def __init__(self, samples, crop, size, floats): self.samples,self.crop,self.size,self.floats = samples,crop,size,v2.Compose(FLOAT) if floats else None
    def __len__(self): return len(self.samples)
    def __getitem__(self, i):
        x = self.crop(self.samples[i][0], self.size)
        if torch.rand(1) < .5: x = x.flip(-1)
        return (self.floats(x) if self.floats else x), self.samples[i][1]


class Before:
    "What our loader's dataset was: Pillow, float32, a torch generator per sample"
    def __init__(self, samples, size): self.samples,self.t = samples,v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.ToImage(), *FLOAT])
    def __len__(self): return len(self.samples)
    def __getitem__(self, i):
        im = pillow(self.samples[i][0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003*i)
            return self.t(im), torch.tensor(self.samples[i][1])


def normalised(batches):
    m, s = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    for x,y in batches: yield x.float().mul_(1/255).sub_(m).div_(s), y

def fastai_loader(folder, a):
    from fastai.vision.all import FlipItem, ImageDataLoaders, Normalize, RandomResizedCrop
    return ImageDataLoaders.from_folder(folder, train='train', valid='val', bs=a.batch, num_workers=a.workers, device='cpu',
                                        item_tfms=[RandomResizedCrop(a.size, min_scale=.08), FlipItem()],
                                        batch_tfms=Normalize.from_stats(MEAN, STD, cuda=False)).train

def sides(folder, a):
    "Name to a function that gives batches (x, y)"
    train = datasets.ImageFolder(folder/'train', v2.Compose([v2.RandomResizedCrop(a.size), v2.RandomHorizontalFlip(), v2.PILToTensor(), *FLOAT]))
    kw = dict(batch_size=a.batch, shuffle=True, drop_last=True, num_workers=a.workers)
    ready = folder_dls(ImageFolder(folder, a.size), a.batch, num_workers=a.workers).train
    as_bytes = folder_dls(ImageFolder(folder, a.size), a.batch, num_workers=a.workers).train
    as_bytes.after_batch = lambda b: b
    own = fastai_loader(folder, a)
    before = DataLoader(Before(train.samples, a.size), bs=a.batch, shuffle=True, drop_last=True, num_workers=a.workers)
    out = {'torchvision': lambda: TorchDL(train, **kw), 'fastai': lambda: own, 'ours before': lambda: before, 'ours': lambda: ready, 'ours, bytes': lambda: as_bytes}
    missing = {}
    for name,(crop, needs, floats) in CANDIDATES.items():
        try: [turbo() if n == 'turbojpeg' else lib(n) for n in needs]
        except (ImportError, RuntimeError, OSError) as e:
            missing[name] = f'not installed: {needs[0]}' + ('' if isinstance(e, ImportError) else ' (its native library)')
            continue
        dl = TorchDL(Crops(train.samples, crop, a.size, floats), **kw)
        out[name] = (lambda dl: lambda: dl)(dl) if floats else (lambda dl: lambda: normalised(dl))(dl)
    return out, missing, train.samples


def cpu_seconds():
    "Processor time of this process and its workers; None where there is no /proc"
    try: ticks = [Path(f'/proc/{p.pid}/stat').read_text().rpartition(')')[2].split()[11:13] for p in multiprocessing.active_children()]
    except OSError: return None
    return time.process_time() + sum(int(t) for pair in ticks for t in pair)/os.sysconf('SC_CLK_TCK')

def speed(batches, a):
    "Images per second, and milliseconds of processor time per image, once every worker has given its first batch"
    it, first = iter(batches), max(a.workers, 1)
    for i in range(a.batches):
        x = next(it)[0]
        if i + 1 == first: start, cpu = time.perf_counter(), cpu_seconds()
    assert x.shape == (a.batch, 3, a.size, a.size)
    n, seconds, used = a.batch*(a.batches - first), time.perf_counter() - start, cpu_seconds()
    return n/seconds, None if used is None else 1000*(used - cpu)/n


def difference(samples, crop, size):
    "Mean distance in grey levels from torchvision's Pillow crop, with the same draws"
    out = []
    for i,(f,_) in enumerate(samples[:48]):
        torch.manual_seed(i); want = cropped(pillow)(f, size)
        torch.manual_seed(i); out.append((crop(f, size).float() - want.float()).abs().mean().item())
    return round(statistics.mean(out), 3)


def parts(samples, a, missing):
    "Milliseconds of processor time per image of single steps, in one process; collation into shared memory, as a worker does it"
    files = [f for f,_ in samples[:a.batch]]
    ims, xs = [pillow(f) for f in files], [torchvision_io(f) for f in files]
    rrc, small = v2.RandomResizedCrop(a.size), [v2.Resize([a.size]*2)(pillow(f)) for f in files]
    byte, to = [v2.functional.pil_to_tensor(im) for im in small], v2.Compose(FLOAT)
    floats = [to(x) for x in byte]
    batch = torch.stack(byte)
    m, s = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    def collate(xs):
        shared = xs[0].untyped_storage()._new_shared(len(xs)*xs[0].nbytes)
        torch.stack(xs, out=xs[0].new_empty(0).set_(shared, 0, (len(xs), *xs[0].shape)))
    def reseed(i):
        with seeded(i): pass
    each = lambda f, v: lambda: [f(x) for x in v]
    steps = {'read the file': each(lambda f: Path(f).read_bytes(), files), 'decode: Pillow': each(pillow, files),
             'decode: torchvision.io': each(torchvision_io, files),
             **{f'decode: {n}': each(f, files) for n,f in (('simplejpeg', simplejpeg), ('OpenCV', opencv), ('PyTurboJPEG', pyturbojpeg)) if n not in missing},
             'crop and resize: Pillow image': each(rrc, ims), 'crop and resize: tensor': each(rrc, xs), 'flip: tensor': each(lambda x: x.flip(-1), byte),
             'seed and restore': each(reseed, range(a.batch)), 'Pillow image to tensor': each(v2.functional.pil_to_tensor, small),
             'normalise one image': each(to, byte), 'normalise a batch': lambda: batch.float().mul_(1/255).sub_(m).div_(s),
             'collate: float32': lambda: collate(floats), 'collate: bytes': lambda: collate(byte)}
    times = {k: [] for k in steps}
    for _ in range(3*a.rounds):
        for k,f in steps.items(): t = time.process_time(); f(); times[k].append(1000*(time.process_time() - t)/a.batch)
    return {k: round(statistics.median(v), 4) for k,v in times.items()}


def enlarged(source, to, a):
    "A folder of `a.images` images of 500 x 375, each under several names so that an epoch is long enough"
    files = sorted(f for f in Path(source).rglob('*') if f.suffix.lower() in ('.jpeg', '.jpg', '.png'))
    files = random.Random(0).sample(files, min(a.images, len(files)))
    for i,f in enumerate(files):
        im = pillow(f)
        w, h = (500, 375) if im.width >= im.height else (375, 500)
        x = np.asarray(im.resize((w, h), Image.BICUBIC)) + np.random.RandomState(i).normal(0, a.grain, (h, w, 3))
        first = to/('val' if i < 2 else 'train')/'ab'[i % 2]/f'{i}.jpg'
        first.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(x.clip(0, 255).astype(np.uint8)).save(first, quality=90)
        if i >= 2:
            for k in range(-(-a.batch*(a.batches + 1)//len(files))): first.with_name(f'{i}_{k}.jpg').symlink_to(first)
    return to


def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return 'not installed'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', type=Path, help='train/ and val/ with class folders of JPEGs, taken as they are')
    p.add_argument('--enlarge', type=Path, help='any folder of small images'); p.add_argument('--images', type=int, default=300, help='images to enlarge')
    p.add_argument('--grain', type=float, default=12., help='standard deviation of the noise on them'); p.add_argument('--workers', type=int, default=2)
    p.add_argument('--batch', type=int, default=64); p.add_argument('--batches', type=int, default=14, help='batches of a round')
    p.add_argument('--size', type=int, default=224); p.add_argument('--rounds', type=int, default=7); p.add_argument('--out', type=Path)
    p.add_argument('--only', nargs='+', help='sides to measure, torchvision is always one')
    a = p.parse_args()
    if (a.data is None) == (a.enlarge is None): p.error('give --data FOLDER or --enlarge FOLDER')
    torch.set_num_threads(1); set_seed(0)
    with tempfile.TemporaryDirectory() as tmp:
        folder, load = a.data or enlarged(a.enlarge, Path(tmp), a), os.getloadavg()[0]
        loaders, missing, samples = sides(folder, a)
        if a.only: loaders = {k: v for k,v in loaders.items() if k == 'torchvision' or k in a.only}
        rates, cpus = {k: [] for k in loaders}, {k: [] for k in loaders}
        for r in range(a.rounds):
            names = [*loaders]
            for k in names[r % len(names):] + names[:r % len(names)]:
                rate, cpu = speed(loaders[k](), a)
                rates[k].append(rate); cpus[k].append(cpu)
            print(f'round {r + 1}: ' + ', '.join(f'{k} {v[-1]:.0f}' for k,v in rates.items()), flush=True)
        some = random.Random(0).sample(samples, min(200, len(samples)))
        sizes = [Image.open(f).size for f,_ in some]
        images = dict(enlarged=a.data is None, source='/'.join((a.data or a.enlarge).parts[-2:]),
                      kilobytes=round(statistics.mean(os.path.getsize(f) for f,_ in some)/1000, 1),
                      width=round(statistics.mean(w for w,_ in sizes)), height=round(statistics.mean(h for _,h in sizes)),
                      **({} if a.data else dict(unique=a.images, grain=a.grain, quality=90)))
        rows = {k: dict(images_per_second=round(statistics.median(v)), range=[round(min(v)), round(max(v))],
                        to_torchvision=round(statistics.median(x/y for x,y in zip(v, rates['torchvision'])), 2),
                        cpu_ms_per_image=None if None in cpus[k] else round(statistics.median(cpus[k]), 3),
                        **(dict(difference=difference(samples, CANDIDATES[k][0], a.size)) if k in CANDIDATES else {})) for k,v in rates.items()}
        ms = parts(samples, a, missing)
    for k,v in rows.items():
        print(f"{k:42} {v['images_per_second']:6} images/s, {v['to_torchvision']:.2f} of torchvision's, {v['cpu_ms_per_image']} ms of processor time"
              + (f", difference {v['difference']}" if 'difference' in v else ''))
    for k,v in missing.items(): print(f'{k:42} {v}')
    for k,v in ms.items(): print(f'{k:42} {v:.3f} ms')
    libraries = {n: version(n) for n in ('Pillow', 'simplejpeg', 'opencv-python-headless', 'PyTurboJPEG', 'pyvips')}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    if a.out: write_whole(a.out, json.dumps(dict(
        bench='input', batch=a.batch, size=a.size, workers=a.workers, batches=a.batches, rounds=a.rounds, cores=cores,
        load_before_and_after=[round(load, 2), round(os.getloadavg()[0], 2)], images=images, sides=rows, not_measured=missing, processor_ms_per_image=ms,
        libraries=libraries, code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
