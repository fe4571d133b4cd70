"""Time of a training step with each method, through a fastai Learner, live teacher, one process, methods alternating.

    python bench/methods.py [--teacher resnet32_s] [--student resnet8_s] [--steps 12] [--rounds 5] [--threads 1] [--out results/bench/methods_cpu.json]

Random images of 32 x 32 and random weights: they do not change the time. The ratio is to training alone in the same round.
With --clock cpu the milliseconds are those of the process. Methods that compare class maps alone are left out.
"""
import argparse, json, statistics, time
from pathlib import Path
import torch
from fastai.basics import Callback, Learner
import fastai.callback.progress
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import ImageArrays, STATS, array_dls, write_whole
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.distillation import is_teacherless
from diffkd_nb.methods import METHODS, Method
from diffkd_nb.models import make_model, n_parameters
from diffkd_nb.recipes import get_recipe


DENSE = 'cirkd', 'maskd' # They compare class maps
NOW = dict(wall=time.perf_counter, cpu=time.process_time)

class Clock(Callback):
    "Times the training part of an epoch; the first step only warms up"
    order = 90
    def __init__(self, now): self.now = now
    def before_train(self): self.n = 0
    def after_batch(self):
        if not self.training: return
        self.n += 1
        if self.n == 1: self.start = self.now()
        self.seconds = self.now() - self.start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--teacher', default='resnet32_s'); p.add_argument('--student', default='resnet8_s')
    p.add_argument('--batch', type=int, default=64); p.add_argument('--steps', type=int, default=12); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=1); p.add_argument('--methods', nargs='+', default=['alone', *(m for m in METHODS if m not in DENSE)]); p.add_argument('--out', type=Path)
    p.add_argument('--clock', choices=list(NOW), default='wall')
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    n = a.batch*(a.steps + 1)
    x, y = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 100
    data = ImageArrays(x, y, x[:2], y[:2], [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    teacher, recipe = make_model(a.teacher, 100), get_recipe('A1')
    times, added = {m: [] for m in a.methods}, {}
    for r in range(a.rounds):
        for m in a.methods:
            clock = Clock(NOW[a.clock])
            cb = [] if m == 'alone' else [DistillCallback(None if is_teacherless(Method.parse(m)) else teacher, m, verbose=False)]
            learn = Learner(array_dls(data, a.batch), make_model(a.student, 100), lr=1e-4, loss_func=CrossEntropyLossFlat(), opt_func=recipe.opt_func(), cbs=[clock, *cb])
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
            times[m].append(1000*clock.seconds/(clock.n - 1)); added[m] = n_parameters(cb[0].distiller) if cb else 0
    rows = {m: dict(ms=round(statistics.median(t), 1), low=round(min(t), 1), high=round(max(t), 1), added_parameters=added[m],
                    **({'to_alone': round(statistics.median(v/w for v,w in zip(t, times['alone'])), 2)} if 'alone' in times else {})) for m,t in times.items()}
    for m,r in rows.items(): print(f"{m:9} {r['ms']:7.1f} ms a step ({r['low']} to {r['high']}), {r.get('to_alone', float('nan')):.2f} of alone, {r['added_parameters']:,} parameters added")
    if a.out:
        write_whole(a.out, json.dumps(dict(bench='methods', teacher=a.teacher, student=a.student, batch=a.batch, steps=a.steps, rounds=a.rounds, clock=a.clock, rows=rows,
                                           code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
