"""Time per epoch with the teacher running at every step against a warm cache of its outputs, in one process.

    python bench/teacher_cache.py --data cifar100:FOLDER [--limit-steps N] [--out results/bench/teacher_cache_cpu.json]
    python bench/teacher_cache.py --data trec:FOLDER --teacher hf:NAME_OR_FOLDER --student bigru --recipe text --out results/bench/text_cache_cpu.json

KD and DiffKD, ResNet-56 to ResNet-20 by recipe A1, batches of 64 with crop and flip, unless another pair and recipe are named.
The weights are random, or those a transformer comes with: they do not change the time. With --clock cpu the seconds are those of the process.
Each round times one epoch live, fills the cache with the very pictures of that epoch, and times the same epoch from the cache.
"""
import argparse, json, statistics, tempfile, time
from pathlib import Path
import torch
from fastai.basics import Learner, CancelTrainException, Callback
import fastai.callback.progress
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import write_whole
from diffkd_nb.experiment import EpochOrder, code_version, environment
from diffkd_nb.recipes import get_recipe
from diffkd_nb.tasks import open_data, task_of
from diffkd_nb.teacher_cache import TeacherCache


class FirstSteps(Callback):
    "Ends the epoch after `n` steps"
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.n and self.iter + 1 >= self.n: raise CancelTrainException
    def before_validate(self): raise __import__('fastai.basics').basics.CancelValidException


NOW = dict(wall=time.perf_counter, cpu=time.process_time)

class Clock(Callback):
    order = 100
    def __init__(self, now): self.now = now
    def before_train(self): self.t = self.now()
    def before_validate(self): self.seconds = self.now() - self.t


def epoch(data, teacher, method, cache, a):
    "Seconds of one training epoch"
    torch.manual_seed(0)
    recipe, clock = get_recipe(a.recipe), Clock(NOW[a.clock])
    learn = Learner(data.dls(a.batch, recipe.augmentation), task_of(data).model(a.student, data), lr=.05, loss_func=CrossEntropyLossFlat(),
                    opt_func=recipe.opt_func(),
                    cbs=[EpochOrder(), clock, FirstSteps(a.limit_steps), DistillCallback(teacher, method, verbose=False, cache=cache)])
    clock.order = -5
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return clock.seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--limit-steps', type=int, default=0, help='steps per epoch, 0 for all')
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--threads', type=int, default=torch.get_num_threads()); p.add_argument('--out', type=Path)
    p.add_argument('--teacher', default='resnet56'); p.add_argument('--student', default='resnet20'); p.add_argument('--recipe', default='A1')
    p.add_argument('--batch', type=int, default=64); p.add_argument('--clock', choices=list(NOW), default='wall')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    data, result = open_data(a.data), {}
    torch.manual_seed(1); teacher = task_of(data).model(a.teacher, data)
    for method in ('kd', 'diffkd'):
        times = {'live': [], 'filling': [], 'warm': []}
        for _ in range(a.rounds):
            with tempfile.TemporaryDirectory() as tmp:
                for k,cache in (('live', None), ('filling', TeacherCache(tmp, 40e9)), ('warm', TeacherCache(tmp, 40e9))): times[k].append(epoch(data, teacher, method, cache, a))
        steps = a.limit_steps or len(data.x)//a.batch
        ratios = [l/w for l,w in zip(times['live'], times['warm'])]
        result[method] = dict(seconds={k: [round(t, 2) for t in v] for k,v in times.items()}, steps=steps, live_over_warm=round(statistics.median(ratios), 3), live_over_filling=round(statistics.median(l/f for l,f in zip(times['live'], times['filling'])), 3))
        print(f"{method:7} {steps} steps: live {statistics.median(times['live']):.1f} s, filling {statistics.median(times['filling']):.1f} s, warm {statistics.median(times['warm']):.1f} s: {result[method]['live_over_warm']:.2f} times as fast", flush=True)
    if a.out: write_whole(a.out, json.dumps(dict(bench='teacher_cache', pair=f'{a.teacher} -> {a.student}', batch=a.batch, clock=a.clock, data=data.name, rounds=a.rounds, result=result, code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
