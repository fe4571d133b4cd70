"""CPU time of a training step of a detector: DiffKD beside FGD, PKD and plain training, through a fastai Learner, methods alternating in one process.

    python bench/detection_step.py [--min-size 240] [--batch 4] [--steps 3] [--rounds 3] [--threads 1] [--out results/bench/detection_step_cpu.json]

Random pictures of 3:4 with four boxes each, and random weights: they hardly change the time. It is the time of the process, so that other work on the
machine counts less. Ratios are medians over rounds, each to the other method in the same round.
"""
import argparse, json, statistics, time
from pathlib import Path
import torch
from fastai.basics import Learner
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
import fastai.callback.progress
from diffkd_nb.callback import DistillCallback
from diffkd_nb.detection import DetectionLoss
from diffkd_nb.detection_data import make_target
from diffkd_nb.detection_models import detection_model
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.files import write_whole
from methods import Clock

SHOWN = ['alone', 'fitnet', 'pkd', 'cwd', 'fgd', 'heads', 'diffkd', 'diffkd:levels=shared', 'diffkd:denoiser=identity', 'diffkd:denoiser=unet']


class Pictures(DataLoader):
    n_inp = 2
    def create_batch(self, b): x, t, i = zip(*b); return list(x), list(t), torch.tensor(i)


def pictures(n, h, w):
    "Random pictures with four boxes each"
    for i in range(n):
        a = torch.rand(4, 2)*torch.tensor([w/2, h/2])
        boxes = torch.cat([a, a + torch.rand(4, 2)*torch.tensor([w/3, h/3]) + 8], 1)
        yield torch.rand(3, h, w), make_target(boxes, torch.randint(1, 4, (4,)), torch.zeros(4, dtype=torch.long)), i


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--student', default='detector:retinanet?encoder=small:8&width=64&anchor=16'); p.add_argument('--batch', type=int, default=4)
    p.add_argument('--teacher', default='detector:retinanet?encoder=mobilenetv1_075_tf&width=64&anchor=16'); p.add_argument('--min-size', type=int, default=240)
    p.add_argument('--steps', type=int, default=3); p.add_argument('--rounds', type=int, default=3); p.add_argument('--threads', type=int, default=1)
    p.add_argument('--methods', nargs='+', default=SHOWN); p.add_argument('--note', default='', help='what else ran on the machine'); p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    net = lambda name: detection_model(f'{name}&min_size={a.min_size}', 4)
    data = list(pictures(a.batch*(a.steps + 1), a.min_size, a.min_size*4//3))
    dls = DataLoaders(*(Pictures(data, bs=a.batch, num_workers=0, drop_last=True) for _ in range(2)), device=torch.device('cpu'))
    teacher, times, added = net(a.teacher), {m: [] for m in a.methods}, {}
    for r in range(a.rounds):
        for m in a.methods:
            clock, cb = Clock(time.process_time), [] if m == 'alone' else [DistillCallback(teacher, m, verbose=False)]
            learn = Learner(dls, net(a.student), lr=1e-4, loss_func=DetectionLoss(), cbs=[clock, *cb])
            learn._do_epoch_validate = lambda *args, **kw: None
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
            times[m].append(1000*clock.seconds/(clock.n - 1))
            added[m] = sum(x.numel() for x in cb[0].distiller.parameters()) if cb else 0
    def to(m, other): return round(statistics.median(v/w for v,w in zip(times[m], times[other])), 2) if other in times else None
    rows = {m: dict(ms=round(statistics.median(t), 1), low=round(min(t), 1), high=round(max(t), 1), to_alone=to(m, 'alone'), to_fgd=to(m, 'fgd'), added=added[m])
            for m,t in times.items()}
    for m,v in rows.items(): print(f"{m:28} {v['ms']:8.1f} ms  x{v['to_alone'] or 0:5.2f} alone  x{v['to_fgd'] or 0:5.2f} fgd  {v['added']:>10,} parameters")
    if a.out:
        given = {k: v for k,v in vars(a).items() if k not in ('out', 'methods')}
        write_whole(a.out, json.dumps(dict(bench='detection_step', **given, rows=rows, code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
