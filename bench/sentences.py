"""What a step of a sentence student costs, each saving beside the same step without it, in one process.

    python bench/sentences.py --data sst2:FOLDER [--steps 40] [--out results/bench/sentences_cpu.json]

Batches of similar length against batches at random, the TextCNN's kernels as one product against three convolutions,
Adam in one pass against PyTorch's default, and matrix products against convolutions on maps of one position (KD + DiffKD,
with a teacher as large as the student). Seconds are those of the process. Both sides are measured in turns; ratios are
medians over the rounds.
"""
import argparse, json, statistics, time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch
import torch
from fastai.basics import Callback, CancelTrainException, CancelValidException, CrossEntropyLossFlat, Learner, OptimWrapper
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import write_whole
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.noise_adapter import MapConv
from diffkd_nb.recipes import get_recipe
from diffkd_nb.tasks import open_data, task_of
from diffkd_nb.text import Convolutions


class Steps(Callback):
    "Ends the epoch after `n` steps, of which the first are not timed"
    order, warm = 100, 3      # after the optimiser
    def __init__(self, n): self.n = n
    def after_batch(self):
        if not self.training: return
        if self.iter + 1 == self.warm: self.begin = time.process_time()
        if self.iter + 1 == self.n + self.warm:
            self.ms = 1000*(time.process_time() - self.begin)/self.n
            raise CancelTrainException
    def before_validate(self): raise CancelValidException


def step(data, model, steps, method=None, opt=None):
    "Milliseconds of a step"
    torch.manual_seed(0)
    student, teacher, timed = *(task_of(data).model(model, data) for _ in range(2)), Steps(steps)
    cbs = [timed, *([DistillCallback(teacher, method, verbose=False)] if method else [])]
    learn = Learner(data.dls(128, seed=0), student, lr=1e-3, loss_func=CrossEntropyLossFlat(), cbs=cbs,
                    opt_func=opt or get_recipe('text').opt_func())
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return timed.ms


def three_convolutions(self, x, n):
    "What `Convolutions` computes, a kernel at a time"
    x = (x*(torch.arange(x.shape[1], device=n.device) < n[:, None])[..., None]).transpose(1, 2)
    pads = [((k - 1)//2, k//2) for k in (3, 4, 5)]
    return torch.cat([c(torch.nn.functional.pad(x, p)) for c,p in zip(self.convs, pads)], 1).relu().transpose(1, 2)


def savings(data, steps):
    "Name to a function that takes whether to save"
    random, bucketed = (replace(data, bucket=b) for b in (0, 50))
    plain = partial(OptimWrapper, opt=torch.optim.Adam)
    def convolved(save):
        with patch.object(MapConv, 'forward', MapConv.forward if save else torch.nn.Conv2d.forward):
            return step(bucketed, 'bigru', steps, 'kd+diffkd:taps=feature')
    def one_product(save):
        with patch.object(Convolutions, 'forward', Convolutions.forward if save else three_convolutions): return step(bucketed, 'textcnn', steps)
    return {**{f'similar lengths, {m}': lambda save, m=m: step(bucketed if save else random, m, steps) for m in ('bigru', 'textcnn')},
            'one product, textcnn': one_product, 'Adam in one pass, bigru': lambda save: step(bucketed, 'bigru', steps, opt=None if save else plain),
            'matrix products, KD + DiffKD': convolved}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--steps', type=int, default=60); p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    data, result = open_data(a.data), {}
    for name,f in savings(data, a.steps).items():
        times = [(f(False), f(True)) for _ in range(a.rounds)]
        result[name] = dict(ms=[[round(t, 2) for t in ts] for ts in zip(*times)], times_as_fast=round(statistics.median(o/n for o,n in times), 2))
        print(f"{name:30} {statistics.median(t[0] for t in times):6.1f} ms -> {statistics.median(t[1] for t in times):6.1f} ms", flush=True)
    if a.out: write_whole(a.out, json.dumps(dict(bench='sentences', data=data.name, batch=128, threads=1, clock='process', steps=a.steps, result=result,
                                                 code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
