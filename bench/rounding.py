"""How far does rounding alone move a run?

    python bench/rounding.py sentences --data trec:FOLDER --teacher NAME@FILE --runs FOLDER [--out results/bench/rounding_sentences.json]
    python bench/rounding.py pictures --data 'cifar100:FOLDER?limit=100' --teacher NAME@FILE --runs FOLDER [--out results/bench/rounding_pictures.json]

Each seed is repeated with one weight of the student's classifier moved by its last bit before the first step; nothing else changes. All
runs lie below `--runs`; a second call goes on. One row per run: variant, seed, repetition (0 is the unchanged run), accuracy in
percent, hash of the student, which tells whether the change was lost.
"""
import argparse
from pathlib import Path
import torch
from fastai.callback.core import Callback
from diffkd_nb.recipes import get_recipe
from diffkd_nb.run import run_setup
from diffkd_nb.setup import Job, Setup, Sources
from diffkd_nb.tasks import open_data
from rows import Rows

SETTINGS = { # Student, recipe, seeds, runs of each seed
    'sentences': ('bigru', get_recipe('text'), range(720, 725), 4),
    'pictures': ('resnet8_s', get_recipe('A1').scaled(8), range(725, 728), 3)}
METHODS = {'KD': 'kd', 'KD + DiffKD': 'kd+diffkd:taps=feature'}


class LastBit(Callback):
    "Moves one weight of the classifier to the next number before the first step; none for repetition 0"
    def __init__(self, repetition): self.repetition = repetition
    def before_train(self):
        if self.repetition and not self.epoch: nudge(self.model, self.repetition)


@torch.no_grad()
def nudge(model, i):
    "Weight `i` of the last matrix becomes the next larger float"
    w = [p for p in model.parameters() if p.ndim == 2][-1].view(-1)[i]
    w.copy_(torch.nextafter(w, torch.full_like(w, torch.inf)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('setting', choices=list(SETTINGS))
    p.add_argument('--data', required=True); p.add_argument('--teacher', required=True); p.add_argument('--runs', type=Path, required=True)
    p.add_argument('--out', type=Path); p.add_argument('--redo', action='store_true', help='measure all rows again')
    a = p.parse_args()
    torch.set_num_threads(1)
    student, recipe, seeds, n = SETTINGS[a.setting]
    data, sources = open_data(a.data), Sources()
    rows = Rows(a.out, __file__, a.redo, bench='rounding', setting=a.setting, data=data.name, data_hash=data.hash(),
                teacher=a.teacher.partition('@')[0], student=student, recipe=recipe.to_dict(), seeds=list(seeds), repetitions=n)
    known = {(r['variant'], r['seed'], r['repetition']) for r in rows}
    for seed in seeds:
        for variant,method in METHODS.items():
            for i in range(n):
                if (variant, seed, i) in known: continue
                out = a.runs/variant.replace(' ', '')/f'seed{seed}'/f'{i}'
                m = run_setup(Setup(recipe, a.data, student, (a.teacher,), method, seed),
                              Job(out, cache=a.runs/'cache', progress=False, keep_student=False), sources, [LastBit(i)])
                rows.add(variant=variant, seed=seed, repetition=i, accuracy=100*m['result']['accuracy'], student=m['student_hash'])


if __name__ == '__main__': main()
