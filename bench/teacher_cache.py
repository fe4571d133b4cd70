"""Time per epoch with the teacher running at every step against a warm cache of its outputs, in one process.

    python bench/teacher_cache.py --data cifar100:FOLDER [--limit-steps N] [--out results/bench/teacher_cache_cpu.json]

KD and DiffKD, ResNet-56 to ResNet-20, batches of 64 with crop and flip. The weights are random: they do not change the time.
Each round times one epoch live, fills the cache with the very pictures of that epoch, and times the same epoch from the cache.
"""
import argparse, json, statistics, tempfile, time
from pathlib import Path
import torch
from fastai.basics import Learner, CancelTrainException, Callback
import fastai.callback.progress
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import array_dls, open_data, write_whole
from diffkd_nb.experiment import EpochOrder, code_version, environment
from diffkd_nb.models import make_model
from diffkd_nb.recipes import get_recipe
from diffkd_nb.teacher_cache import TeacherCache


class FirstSteps(Callback):
    "Ends the epoch after `n` steps"
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.n and self.iter + 1 >= self.n: raise CancelTrainException
    def before_validate(self): raise __import__('fastai.basics').basics.CancelValidException


class Clock(Callback):
    order = 100
    def before_train(self): self.t = time.perf_counter()
    def before_validate(self): self.seconds = time.perf_counter() - self.t


def epoch(data, teacher, method, cache, steps, threads):
    "Seconds of one training epoch"
    torch.manual_seed(0)
    recipe, clock = get_recipe('A1'), Clock()
    learn = Learner(array_dls(data, 64), make_model('resnet20', 100), lr=.05, loss_func=CrossEntropyLossFlat(), opt_func=recipe.opt_func(),
                    cbs=[EpochOrder(), clock, FirstSteps(steps), DistillCallback(teacher, method, verbose=False, cache=cache)])
    clock.order = -5
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return clock.seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--limit-steps', type=int, default=0, help='steps per epoch, 0 for all')
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--threads', type=int, default=torch.get_num_threads()); p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    data, result = open_data(a.data), {}
    torch.manual_seed(1); teacher = make_model('resnet56', 100)
    for method in ('kd', 'diffkd'):
        times = {'live': [], 'filling': [], 'warm': []}
        for _ in range(a.rounds):
            with tempfile.TemporaryDirectory() as tmp:
                for k,cache in (('live', None), ('filling', TeacherCache(tmp, 40e9)), ('warm', TeacherCache(tmp, 40e9))): times[k].append(epoch(data, teacher, method, cache, a.limit_steps, a.threads))
        steps = a.limit_steps or len(data.x)//64
        ratios = [l/w for l,w in zip(times['live'], times['warm'])]
        result[method] = dict(seconds={k: [round(t, 2) for t in v] for k,v in times.items()}, steps=steps, live_over_warm=round(statistics.median(ratios), 3), live_over_filling=round(statistics.median(l/f for l,f in zip(times['live'], times['filling'])), 3))
        print(f"{method:7} {steps} steps: live {statistics.median(times['live']):.1f} s, filling {statistics.median(times['filling']):.1f} s, warm {statistics.median(times['warm']):.1f} s: {result[method]['live_over_warm']:.2f} times as fast", flush=True)
    if a.out: write_whole(a.out, json.dumps(dict(bench='teacher_cache', pair='resnet56 -> resnet20', batch=64, data=data.name, rounds=a.rounds, result=result, code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
