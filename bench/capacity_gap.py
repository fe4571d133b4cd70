"""Is a smaller student's state a noisier one, and does the noise adapter know? Questions 5(a) and 5(b) on sentences.

    python bench/capacity_gap.py --data trec:FOLDER?holdout=1500 --teacher hf:NAME_OR_FOLDER --runs FOLDER [--jobs 2] [--out results/bench/capacity_gap.json]

Two teachers of one recipe are trained (seeds 0 and 1; the second is a control), then students of five widths below the first, all in
`--runs`; a second call goes on. One row per model: accuracy on the held-out sentences, class signal of its pooled state, linear CKA with
the first teacher's, the share of the teacher's variance that the best linear map leaves, the entropy of that residual, and gamma, the
adapter's mean share of the student's state in the last epoch.
"""
import argparse
from pathlib import Path
import pandas as pd
import torch
from diffkd_nb.comparison import compare
from diffkd_nb.feature_measures import class_signal, linear_cka, linear_residual, spectrum_entropy
from diffkd_nb.methods import parse_method
from diffkd_nb.rng import same_rng
from diffkd_nb.run import run
from diffkd_nb.tasks import open_data
from diffkd_nb.text import text_model
from diffkd_nb.weights import load_weights
from rows import Rows

WIDTHS = 4, 8, 16, 32, 64 # Units of the GRU each way
METHODS = {'alone': 'alone', 'DiffKD': 'diffkd:taps=feature', 'identity': 'diffkd:denoiser=identity,taps=feature'}
SEEDS = 800, 801, 802, 803, 804


@torch.no_grad()
def states(model, data, batch=500):
    "Pooled states of the held-out sentences (N, C)"
    found = []
    hook = model.eval().get_submodule('state').register_forward_hook(lambda m, x, y: found.append(y.flatten(1)))
    for rows in data.rows_valid.split(batch): model(rows)
    hook.remove()
    return torch.cat(found)


def measures(x, teacher, y):
    "All numbers of a state"
    share, left = linear_residual(x, teacher)
    return {'class signal': class_signal(x, y), 'entropy': spectrum_entropy(x), 'CKA': linear_cka(x, teacher), 'left': share,
            'entropy of what is left': spectrum_entropy(left) if share > 1e-6 else None}


def teachers(data, name, folder):
    "Files of two teachers and their accuracies in percent"
    made = [run('tune', data, None, name, 'alone', seed, folder/f'teacher{seed}') for seed in (0, 1)]
    return [folder/f'teacher{seed}'/'student.safetensors' for seed in (0, 1)], [100*m['result']['accuracy'] for m in made]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--teacher', required=True); p.add_argument('--runs', type=Path, required=True)
    p.add_argument('--jobs', type=int, default=1); p.add_argument('--out', type=Path); p.add_argument('--redo', action='store_true', help='measure all rows again')
    a = p.parse_args()
    data = open_data(a.data)
    files, accuracy = teachers(a.data, a.teacher, a.runs)
    found = compare([(f'{a.teacher}@{files[0]}', f'bigru:{w}') for w in WIDTHS], list(METHODS.values()), list(SEEDS), 'text', a.data, a.runs/'students',
                    jobs=a.jobs, threads=1, cache=a.runs/'cache')
    rows = Rows(a.out, __file__, a.redo, bench='capacity_gap', data=data.name, data_hash=data.hash(), teacher=a.teacher, n=data.n_valid)
    known = {(r['model'], r['width'], r['seed']) for r in rows}
    loaded = lambda name, f: load_weights(text_model(name, data), f)
    with same_rng(): target, other = (states(loaded(a.teacher, f), data) for f in files)
    def add(model, width, seed, state, **more):
        if (model, width, seed) not in known: rows.add(model=model, width=width, seed=seed, **more, **measures(state(), target, data.yv))
    for seed,(x,acc) in enumerate(zip((target, other), accuracy)): add('teacher', x.shape[1], seed, lambda: x, accuracy=acc)
    for width in WIDTHS:
        for seed in SEEDS:
            def untrained(): torch.manual_seed(seed); return text_model(f'bigru:{width}', data)
            add('untrained', width, seed, lambda: states(untrained(), data))
    names = {str(parse_method(m)): n for n,m in METHODS.items()}
    for r in found.runs.itertuples():
        f, student = found.folder/r.folder, r.student
        last = pd.read_csv(f/'log.csv').iloc[-1]
        add(names[r.method], int(student.partition(':')[2]), r.seed, lambda: states(loaded(student, f/'student.safetensors'), data),
            accuracy=r.accuracy, gamma=float(last.gamma) if 'gamma' in last else None)


if __name__ == '__main__': main()
