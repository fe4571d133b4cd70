"""Is a student's feature a noisy teacher feature? The numbers of question 5 of the study, in part.

    python bench/features.py --data cifar100:FOLDER --teacher resnet32_s@FILE --student resnet8_s@FILE [--study results/study/1] [--out results/bench/features.json] [--redo]

One row per model: class signal to noise and entropy of the spectrum of the last feature map's mean over positions, linear CKA with the
teacher's; the share of the teacher's variance that the best linear map from the model's channels leaves, position by position, and the entropy
of that residual. Noisy copies of the teacher's map stand beside them. A second call goes on where code, data and weights are the same.
"""
import argparse, json
from pathlib import Path
import torch
from diffkd_nb.data import open_data
from diffkd_nb.feature_measures import class_signal, linear_cka, linear_residual, spectrum_entropy
from diffkd_nb.models import make_model
from diffkd_nb.weights import load_weights, state_hash, trained_model
from rows import Rows

SAMPLES = 60_000 # Positions of the linear map, half of them to judge it
NOISE = .9, .5, .1 # Alpha-bar


@torch.no_grad()
def maps(model, pictures, stats, place, batch=500):
    "The last feature map of pictures (N, C, H, W)"
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in stats)
    found, model = [], model.eval()
    hook = model.get_submodule(place).register_forward_hook(lambda m, x, y: found.append(y))
    for x in pictures.split(batch): model((x.float()/255 - mean)/std)
    hook.remove()
    return torch.cat(found)


def row(name, f, teacher, y, chosen):
    "All measures of a map"
    flat = lambda m: m.movedim(1, -1).flatten(0, 2)[chosen]
    pooled, goal = f.mean((2, 3)), teacher.mean((2, 3))
    share, left = linear_residual(flat(f), flat(teacher))
    return {'model': name, 'class signal': class_signal(pooled, y), 'entropy': spectrum_entropy(pooled), 'CKA': linear_cka(pooled, goal),
            'left': share, 'entropy of what is left': spectrum_entropy(left) if share > 1e-6 else None}


def noisy(f, alpha_bar, g):
    "The map with white noise at a share of its variance"
    scale = f.var((0, 2, 3)).mean().sqrt()
    return alpha_bar**.5*f + (1 - alpha_bar)**.5*scale*torch.randn(f.shape, generator=g)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--teacher', required=True); p.add_argument('--student', required=True)
    p.add_argument('--study', type=Path, default=Path('results/study/1')); p.add_argument('--place', default='layer3'); p.add_argument('--out', type=Path)
    p.add_argument('--redo', action='store_true', help='measure all rows again')
    a = p.parse_args()
    data, g = open_data(a.data), torch.Generator().manual_seed(0)
    model = lambda spec: trained_model(spec, data.classes, data.channels, data.size)
    seen = lambda m: maps(m, data.xv, data.stats, a.place)
    t, long = model(a.teacher), model(a.student)
    name = a.student.partition('@')[0]
    rows = Rows(a.out, __file__, a.redo, bench='features', data=data.name, data_hash=data.hash(), teacher=a.teacher.partition('@')[0], teacher_hash=state_hash(t.state_dict()),
                student=name, student_hash=state_hash(long.state_dict()), place=a.place, samples=SAMPLES)
    teacher = seen(t)
    chosen = torch.randperm(teacher[:, 0].numel(), generator=g)[:SAMPLES]
    def add(name, get):
        if name not in {r['model'] for r in rows}: rows.add(**row(name, get(), teacher, data.yv, chosen))
    add('teacher', lambda: teacher)
    for i,n in enumerate(NOISE): add(f'teacher, alpha-bar {n}', lambda: noisy(teacher, n, torch.Generator().manual_seed(1 + i)))
    add('student, long training', lambda: seen(long))
    torch.manual_seed(0); new = make_model(name, len(data.classes))
    add('student, untrained', lambda: seen(new))
    for f in sorted(a.study.rglob('student.safetensors')):
        s = make_model(name, len(data.classes)); load_weights(s, f)
        add(json.loads((f.parent/'manifest.json').read_text())['settings']['method'], lambda: seen(s))


if __name__ == '__main__': main()
