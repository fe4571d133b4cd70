"The trained teachers on real images, where the files are present (folder in DIFFKD_DATA, by default ../shared/data)"
import os
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from diffkd_nb.models import TEACHERS, load_teacher

DATA = Path(os.environ.get('DIFFKD_DATA', Path(__file__).parents[2]/'shared'/'data'))
needs = lambda *names: pytest.mark.skipif(not all((DATA/n).exists() for n in names), reason=f"{', '.join(names)} not in {DATA}: set DIFFKD_DATA")
IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def mosaics(folder):
    "Images of 32 x 32 from one mosaic per class"
    xs, ys = [], []
    for y,f in enumerate(sorted(folder.glob('*.webp'))):
        m = np.asarray(Image.open(f).convert('RGB'))
        tiles = m.reshape(m.shape[0]//32, 32, m.shape[1]//32, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
        xs.append(torch.from_numpy(tiles.copy())); ys += [y]*len(tiles)
    return torch.cat(xs), torch.tensor(ys)


def accuracy(name, x, y, classes=None):
    model, (mean, std) = load_teacher(DATA/'teachers'/f'{name}.safetensors'), (torch.tensor(s)[:, None, None] for s in TEACHERS[name]['stats'])
    hits = 0
    with torch.no_grad():
        for a,b in zip(x.split(100), y.split(100)):
            z = model((a.float()/255 - mean)/std)
            hits += ((z if classes is None else z[:, list(classes)]).argmax(1) == b).sum().item()
    return 100*hits/len(y)


@needs('cifar10', 'teachers')
def test_cifar10_resnet56():
    x, y = mosaics(DATA/'cifar10'/'test')
    assert len(y) == 2000 and accuracy('cifar10_resnet56', x, y) == pytest.approx(93.05, abs=.001)


@needs('cifar100', 'teachers')
@pytest.mark.parametrize('name,want', [pytest.param('cifar100_resnet32', 71.69, marks=pytest.mark.slow), ('cifar100_resnet8', 64.11)])
def test_cifar100(name, want):
    x, y = mosaics(DATA/'cifar100'/'test')
    assert len(y) == 10000 and accuracy(name, x, y) == pytest.approx(want, abs=.001)


@needs('cifar100', 'teachers')
def test_cifar100_resnet32_on_a_part():
    x, y = mosaics(DATA/'cifar100'/'test')
    assert accuracy('cifar100_resnet32', x[::10], y[::10]) == pytest.approx(71.69, abs=4.5)    # three standard errors of 1,000 images


@pytest.mark.slow
@needs('imagenette128', 'teachers')
def test_imagenet_mobilenetv1():
    folders = sorted((DATA/'imagenette128'/'val').iterdir())
    files = [(f, i) for i,d in enumerate(folders) for f in sorted(d.glob('*.JPEG'))]
    x = torch.stack([torch.from_numpy(np.array(Image.open(f).convert('RGB').resize((224, 224), Image.BICUBIC))).permute(2, 0, 1) for f,_ in files])
    got = accuracy('imagenet_mobilenetv1_075', x, torch.tensor([i for _,i in files]), IMAGENETTE)
    print(f'{got:.2f} % of {len(files)} images')
    assert got > 95     # 98.7 to 99.0 on sharper images; these are enlarged from 128 pixels


@needs('cifar10', 'teachers')
def test_a_teacher_of_another_normalisation_keeps_its_accuracy():
    from diffkd_nb.data import ImageArrays, Renormalise, STATS
    from diffkd_nb.experiment import _Shifted, evaluate
    x, y = mosaics(DATA/'cifar10'/'test')
    data = ImageArrays(x[:20], y[:20], x, y, [str(i) for i in range(10)], 'part', stats=STATS['cifar10'])
    model = load_teacher(DATA/'teachers'/'cifar10_resnet56.safetensors')
    assert 100*evaluate(_Shifted(model, Renormalise(data.stats, STATS['imagenet'])), data)[0] == pytest.approx(93.05, abs=.051)
    scale = lambda k: (x[:50].float()/255 - torch.tensor(STATS[k][0])[:, None, None])/torch.tensor(STATS[k][1])[:, None, None]
    with torch.no_grad(): mapped, right, wrong = model(Renormalise(STATS['cifar10'], STATS['imagenet'])(scale('cifar10'))), model(scale('imagenet')), model(scale('cifar10'))
    assert (mapped - right).abs().max() < 1e-3 < .1 < (wrong - right).abs().max()
