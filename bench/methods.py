"""Time of a training step with each method, through a fastai Learner, live teacher, one process, methods alternating.

    python bench/methods.py [--teacher resnet32_s] [--student resnet8_s] [--steps 12] [--rounds 5] [--threads 1] [--out results/bench/methods_cpu.json]
    python bench/methods.py --pairs resnet56,resnet20 wrn_40_2,wrn_40_1 --batch 16 --steps 2 --rounds 3 --out results/bench/cost_cpu.json

Random images of 32 x 32 and random weights: they do not change the time. The ratio is to training alone in the same round.
With --clock cpu the milliseconds are those of the process. Methods that compare class maps alone are left out; one that refuses a pair says why.
`memory_mb` is what the first step keeps for its backward pass, the network's own weights left out. With --pairs all pairs are measured in one run,
one after the other, and with --out each is on disk as soon as it is done.
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
    "Times the training part of an epoch; the first steps only warm up"
    order = 90
    def __init__(self, now, warm=1): self.now, self.warm = now, warm
    def before_train(self): self.n = 0
    def after_batch(self):
        if not self.training: return
        self.n += 1
        if self.n == self.warm: self.start = self.now()
        if self.n >= self.warm: self.seconds = self.now() - self.start


class Kept(Callback):
    "Megabytes that the first training step keeps for its backward pass"
    order = 90        # after the plan has been made, which runs both models
    def before_train(self): self.mb, self.seen = None, {}
    def before_batch(self):
        if not self.training or self.mb is not None: return
        def pack(x): self.seen[x.untyped_storage().data_ptr()] = x; return x
        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        self.hooks.__enter__()
    def before_backward(self):
        if not self.training or self.mb is not None: return
        self.hooks.__exit__()
        own = {p.untyped_storage().data_ptr() for p in self.learn.model.parameters()}
        self.mb, self.seen = sum(x.untyped_storage().nbytes() for k,x in self.seen.items() if k not in own)/1e6, {}


def measured(teacher, student, a):
    "A row a method"
    n = a.batch*(a.steps + 1)
    x, y = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 100
    data = ImageArrays(x, y, x[:2], y[:2], [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    large, recipe = make_model(teacher, 100), get_recipe('A1')
    times, added, kept, refused = {m: [] for m in a.methods}, {}, {}, {}
    for r in range(a.rounds):
        for m in a.methods:
            if m in refused: continue
            clock, memory = Clock(NOW[a.clock]), [] if r else [Kept()]
            try:
                cb = [] if m == 'alone' else [DistillCallback(None if is_teacherless(Method.parse(m)) else large, m, verbose=False)]
                learn = Learner(array_dls(data, a.batch), make_model(student, 100), lr=1e-4, loss_func=CrossEntropyLossFlat(), opt_func=recipe.opt_func(),
                                cbs=[clock, *memory, *cb])
                learn._do_epoch_validate = lambda *args, **kw: None
                with learn.no_bar(), learn.no_logging(): learn.fit(1)
            except ValueError as e: refused[m] = str(e); continue
            times[m].append(1000*clock.seconds/(clock.n - 1)); added[m] = n_parameters(cb[0].distiller) if cb else 0
            if memory: kept[m] = memory[0].mb
    def row(m):
        if m in refused: return dict(refused=refused[m])
        t = times[m]
        ratio = {'to_alone': round(statistics.median(v/w for v,w in zip(t, times['alone'])), 2)} if 'alone' in times else {}
        return dict(ms=round(statistics.median(t), 1), low=round(min(t), 1), high=round(max(t), 1), added_parameters=added[m], memory_mb=round(kept[m], 1), **ratio)
    return {m: row(m) for m in a.methods}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', nargs='+', metavar='TEACHER,STUDENT', help='several pairs in one run')
    p.add_argument('--teacher', default='resnet32_s'); p.add_argument('--student', default='resnet8_s')
    p.add_argument('--batch', type=int, default=64); p.add_argument('--steps', type=int, default=12); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=1); p.add_argument('--methods', nargs='+', default=['alone', *(m for m in METHODS if m not in DENSE)]); p.add_argument('--out', type=Path)
    p.add_argument('--clock', choices=list(NOW), default='wall')
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    pairs, done = [p.split(',') for p in a.pairs or [f'{a.teacher},{a.student}']], []
    for teacher,student in pairs:
        rows = measured(teacher, student, a)
        print(f'{teacher} -> {student}')
        for m,r in rows.items():
            print(f"{m:9} refused: {r['refused']}" if 'refused' in r else f"{m:9} {r['ms']:7.1f} ms a step ({r['low']} to {r['high']}), {r.get('to_alone', float('nan')):.2f} of alone, "
                  f"{r['added_parameters']:,} parameters added, {r['memory_mb']} MB kept", flush=True)
        done.append(dict(teacher=teacher, student=student, rows=rows))
        if not a.out: continue
        how = dict(batch=a.batch, steps=a.steps, rounds=a.rounds, clock=a.clock, threads=a.threads)
        write_whole(a.out, json.dumps(dict(bench='methods', **(dict(pairs=done) if a.pairs else done[0]), **how, code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
