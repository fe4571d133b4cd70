"""What a look of DenoisingDiagnostics costs, as a share of the training at its default interval.

    python bench/diagnostics.py [--pair resnet56-resnet20] [--steps 40] [--device cuda] [--threads 1] [--out results/bench/diagnostics_cpu.json]

One training with a look at every second step: the steps without one and those with one alternate, so a busy machine slows both. The cost of a look is the
difference of the two medians; its share at the default interval is cost / (interval x plain step).
"""
import argparse, inspect, json, statistics, time, warnings
from pathlib import Path
import torch
from fastai.basics import Callback, Learner
import fastai.callback.progress
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb.callback import DiffKDCallback
from diffkd_nb.data import ImageArrays, STATS, array_dls, write_whole
from diffkd_nb.diagnostics import DenoisingDiagnostics
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.models import make_model
from diffkd_nb.recipes import get_recipe


class Clock(Callback):
    "Milliseconds of each training step"
    order = -30
    def __init__(self, device): self.device,self.ms = device,[]
    def sync(self):
        if self.device.startswith('cuda'): torch.cuda.synchronize()
    def before_batch(self):
        if self.training: self.sync(); self.t = time.perf_counter()
    def after_step(self):
        if self.training: self.sync(); self.ms.append(1000*(time.perf_counter() - self.t))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pair', default='resnet56-resnet20'); p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--batch', type=int, default=64); p.add_argument('--steps', type=int, default=40); p.add_argument('--threads', type=int, default=1); p.add_argument('--out', type=Path)
    a = p.parse_args()
    warnings.filterwarnings('ignore'); torch.set_num_threads(a.threads); torch.manual_seed(0)
    n = a.batch*(a.steps + 4)
    x, y = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 100
    data = ImageArrays(x, y, x[:2], y[:2], [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    t, s = (make_model(m, 100).to(a.device) for m in a.pair.split('-'))
    clock = Clock(a.device)
    learn = Learner(array_dls(data, a.batch, device=a.device), s, lr=1e-4, loss_func=CrossEntropyLossFlat(), opt_func=get_recipe('A1').opt_func(),
                    cbs=[clock, DiffKDCallback(t, verbose=False), DenoisingDiagnostics(every=2)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    ms = clock.ms[4:]
    looked, plain = (statistics.median(ms[i::2]) for i in (0, 1))
    interval = inspect.signature(DenoisingDiagnostics).parameters['every'].default
    row = dict(pair=a.pair, plain_ms=round(plain, 2), looked_ms=round(looked, 2), look_ms=round(looked - plain, 2), interval=interval, share=round((looked - plain)/(interval*plain), 4))
    print(f"step {plain:.1f} ms, with a look {looked:.1f} ms: {100*row['share']:.2f} % of the training at the default interval of {interval} steps")
    if a.out: write_whole(a.out, json.dumps(dict(bench='diagnostics', **row, batch=a.batch, steps=a.steps, threads=a.threads, code=code_version(), environment=environment(a.device)), indent=1))


if __name__ == '__main__': main()
