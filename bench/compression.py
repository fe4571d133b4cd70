"""Does a feature have to learn its compression? Question 5(c) of the study: the linear autoencoder against PCA and random projections of equal width.

    python bench/compression.py --data cifar100:FOLDER --teacher resnet32_s@FILE [--out results/bench/compression.json] [--redo]

Fitted on the teacher's last map of training pictures, judged on the test pictures. One row per variant, width and seed: relative squared error of the
feature that comes back, on both; class signal of the latent's mean over positions and its linear CKA with the whole feature's; accuracy of the teacher's
classifier on the feature that comes back, as a share of that on the feature. The row `whole` keeps all channels. A second call goes on where code, data and weights are the same.
"""
import argparse, time
from pathlib import Path
from typing import NamedTuple
import torch
from torch import Tensor
from diffkd_nb.autoencoder import LinearAutoencoder
from diffkd_nb.data import open_data
from diffkd_nb.feature_measures import class_signal, linear_cka
from diffkd_nb.study import SETTINGS
from diffkd_nb.weights import state_hash, trained_model
from features import maps
from rows import Rows

WIDTHS, SEEDS, PICTURES = (32, 16, 8), (700, 701, 702), 20_000


class Affine(NamedTuple):
    "To a latent and back, for samples in rows"
    to:Tensor; shift:Tensor; back:Tensor; origin:Tensor     # z = (x - shift) to, x' = z back + origin
    def latent(self, x): return (x - self.shift) @ self.to
    def __call__(self, x): return self.latent(x) @ self.back + self.origin


def moments(x):
    "Mean and covariance of samples in rows, in double precision"
    mean = x.mean(0, dtype=torch.float64); n = len(x)
    total = sum((part.double() - mean).T @ (part.double() - mean) for part in x.split(100_000))
    return mean, total/n


def pca(mean, cov, width):
    q = torch.linalg.eigh(cov).eigenvectors[:, -width:]
    return Affine(q, mean, q.T, mean)


def random_projection(mean, width, seed, cov=None):
    "An orthogonal projection and its transpose; with a covariance the best linear way back"
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(mean), width, generator=g, dtype=torch.float64)).Q
    back = q.T if cov is None else torch.linalg.solve(q.T @ cov @ q, q.T @ cov)
    return Affine(q, mean, back, mean)


@torch.no_grad()
def as_affine(ae):
    "What a trained autoencoder does in eval mode"
    conv, norm, decoder = *ae.encoder, ae.decoder
    scale = (norm.weight/(norm.running_var + norm.eps).sqrt()).double()
    to = (conv.weight.flatten(1).double()*scale[:, None]).T
    add = (conv.bias.double() - norm.running_mean.double())*scale + norm.bias.double()
    back = decoder.weight.flatten(1).double().T
    return Affine(to, torch.zeros(len(to), dtype=torch.float64), back, add @ back + decoder.bias.double())


def train(x, width, seed, recipe, steps=None):
    "The autoencoder as a run trains it, and its loss at the end of each epoch"
    torch.manual_seed(seed)
    ae, n = LinearAutoencoder(x.shape[1], width), 50_000//recipe.batch_size
    opt = torch.optim.SGD(ae.parameters(), recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay)
    course, left = [], 0.
    for i in range(steps or recipe.epochs*n):
        for g in opt.param_groups: g['lr'] = recipe.lr_at(i/n)
        loss = ae(x[torch.randint(len(x), (recipe.batch_size,))])[1]
        opt.zero_grad(); loss.backward(); opt.step()
        left += loss.item()/n
        if (i + 1) % n == 0: course.append(left); left = 0.
    return as_affine(ae.eval()), course


def error(f, x):
    "Squared error as a share of the variance, of samples in rows"
    mean, wrong, all_ = x.mean(0, dtype=torch.float64), 0., 0.
    for part in x.split(100_000):
        part = part.double()
        wrong, all_ = wrong + (f(part) - part).square().sum(), all_ + (part - mean).square().sum()
    return float(wrong/all_)


def judge(f, fitted, held_out, maps, y, classify):
    "All measures of a compression, of held-out samples as they are and as maps (N, C, h, w) that the classifier reads; an affine map and a mean change places"
    through = lambda m: f(m.movedim(1, -1)).movedim(-1, 1)
    right = lambda m: float((classify(m.flatten(1).float()).argmax(1) == y).double().mean())
    z, pooled, accuracy = f.latent(maps.mean((2, 3))), maps.mean((2, 3)), right(through(maps))
    return dict(error=error(f, held_out), fit_error=error(f, fitted), class_signal=class_signal(z, y), cka=linear_cka(z, pooled),
                accuracy=100*accuracy, kept=100*accuracy/right(maps))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--teacher', required=True); p.add_argument('--place', default='layer3')
    p.add_argument('--widths', type=int, nargs='+', default=WIDTHS); p.add_argument('--seeds', type=int, nargs='+', default=SEEDS)
    p.add_argument('--pictures', type=int, default=PICTURES); p.add_argument('--steps', type=int, help='of the autoencoder, those of setting S1 by default')
    p.add_argument('--out', type=Path); p.add_argument('--redo', action='store_true', help='measure all rows again')
    a = p.parse_args()
    torch.set_num_threads(1)
    data, recipe = open_data(a.data), SETTINGS['S1'].recipe
    teacher = trained_model(a.teacher, data.classes, data.channels, data.size)
    rows = Rows(a.out, __file__, a.redo, bench='compression', data=data.name, data_hash=data.hash(), teacher=a.teacher.partition('@')[0], teacher_hash=state_hash(teacher),
                place=a.place, pictures=a.pictures, steps=a.steps or recipe.epochs*(50_000//recipe.batch_size))
    x, held_out = (maps(teacher, pictures, data.stats, a.place) for pictures in (data.x[:a.pictures], data.xv))
    flat = lambda m: m.movedim(1, -1).reshape(-1, m.shape[1])
    classify = [m for m in teacher.modules() if isinstance(m, torch.nn.Linear)][-1].requires_grad_(False)
    f, g, side = flat(x), flat(held_out), round((classify.in_features/x.shape[1])**.5)
    seen = torch.nn.functional.adaptive_avg_pool2d(held_out, side).double()       # what the classifier reads
    mean, cov = moments(f)
    def add(variant, width, seed, make):
        if (variant, width, seed) in {(r['variant'], r['width'], r['seed']) for r in rows}: return
        t = time.process_time(); made, *more = make(); seconds = time.process_time() - t
        with torch.no_grad(): found = judge(made, f, g, seen, data.yv, classify)
        rows.add(variant=variant, width=width, seed=seed, channels=len(mean), **found, seconds=seconds, course=more[0] if more else [])
    add('whole', len(mean), None, lambda: [pca(mean, cov, len(mean))])
    for w in a.widths:
        add('PCA', w, None, lambda: [pca(mean, cov, w)])
        for s in a.seeds:
            add('random', w, s, lambda: [random_projection(mean, w, s)])
            add('random, fitted back', w, s, lambda: [random_projection(mean, w, s, cov)])
    for w in a.widths:
        for s in a.seeds: add('autoencoder', w, s, lambda: train(x, w, s, recipe, a.steps))


if __name__ == '__main__': main()
