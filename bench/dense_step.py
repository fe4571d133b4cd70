"""CPU time of a training step of segmentation: DiffKD beside KD per pixel and CWD, through a fastai Learner, methods alternating in one process.

    python bench/dense_step.py [--height 96 --width 128] [--batch 4] [--steps 3] [--rounds 3] [--threads 1] [--out results/bench/dense_step_cpu.json]

DeepLabV3 with a ResNet-50 teaches DeepLabV3 with a ResNet-18, both with class maps at 1/8 (pip install 'diffkd_nb[dense]'). Random pictures and weights:
they do not change the time. It is the time of the process, so that other work on the machine counts less. Ratios are medians over rounds, each to the
other method in the same round. `memory_mb` is what the backward pass keeps of the method itself, from one call.
"""
import argparse, json, statistics, time
from pathlib import Path
import torch
from fastai.basics import Learner
from fastai.data.core import DataLoaders
import fastai.callback.progress
from diffkd_nb.callback import DistillCallback
from diffkd_nb.distiller import toy_tap
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.files import InputError, write_whole
from diffkd_nb.losses import PixelCrossEntropy
from diffkd_nb.methods import Method
from diffkd_nb.segmentation_models import segmentation_model
from methods import Clock

METHODS = ['alone', 'kd', 'cwd', 'dist', 'diffkd', 'diffkd:dense_form=pointwise', 'diffkd:denoiser=identity']


def kept(method, classes, size, batch):
    "Megabytes that autograd keeps of a method on a class map, its inputs left out"
    if method == 'alone': return 0.
    d, shape, seen = Method.parse(method).make([toy_tap((classes, *size), (classes, *size), 'logits')]), (batch, classes, *size), {}
    s, t = torch.randn(shape, requires_grad=True), torch.randn(shape)
    def pack(x): seen[x.untyped_storage().data_ptr()] = x; return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): d({'logits': s}, {'logits': t})
    return sum(x.untyped_storage().nbytes() for x in seen.values() if x.untyped_storage().data_ptr() not in (s.data_ptr(), t.data_ptr()))/1e6


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--student', default='resnet18'); p.add_argument('--teacher', default='resnet50'); p.add_argument('--classes', type=int, default=19)
    p.add_argument('--height', type=int, default=96); p.add_argument('--width', type=int, default=128); p.add_argument('--batch', type=int, default=4)
    p.add_argument('--steps', type=int, default=3); p.add_argument('--rounds', type=int, default=3); p.add_argument('--threads', type=int, default=1)
    p.add_argument('--methods', nargs='+', default=METHODS); p.add_argument('--note', default='', help='what else ran on the machine'); p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    try: net = lambda name: segmentation_model(f'smp:DeepLabV3?encoder={name}&output_stride=8', a.classes); net(a.student)
    except InputError as e: p.error(str(e))
    n, size = a.batch*(a.steps + 1), (a.height, a.width)
    data = list(zip(torch.randn(n, 3, *size), torch.randint(0, a.classes, (n, *size))))
    dls = DataLoaders.from_dsets(data, data[:a.batch], bs=a.batch, device='cpu', num_workers=0)
    teacher, times = net(a.teacher), {m: [] for m in a.methods}
    for r in range(a.rounds):
        for m in a.methods:
            clock, cb = Clock(time.process_time), [] if m == 'alone' else [DistillCallback(teacher, m, verbose=False)]
            learn = Learner(dls, net(a.student), lr=1e-4, loss_func=PixelCrossEntropy(), cbs=[clock, *cb])
            learn._do_epoch_validate = lambda *args, **kw: None
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
            times[m].append(1000*clock.seconds/(clock.n - 1))
            if cb: place = cb[0].plan[0].student
    def to(m, other): return round(statistics.median(v/w for v,w in zip(times[m], times[other])), 2) if other in times else None
    rows = {m: dict(ms=round(statistics.median(t), 1), low=round(min(t), 1), high=round(max(t), 1), to_alone=to(m, 'alone'), to_kd=to(m, 'kd'), to_cwd=to(m, 'cwd'),
                    memory_mb=round(kept(m, a.classes, place.shape[1:], a.batch), 2)) for m,t in times.items()}
    for m,r in rows.items(): print(f"{m:28} {r['ms']:8.1f} ms a step ({r['low']} to {r['high']}), of alone {r['to_alone']}, of KD {r['to_kd']}, of CWD {r['to_cwd']}, {r['memory_mb']} MB kept")
    print('class map:', place.name, place.shape)
    if a.out:
        given = {k: v for k,v in vars(a).items() if k not in ('out', 'methods')}
        write_whole(a.out, json.dumps(dict(bench='dense_step', **given, class_map=list(place.shape), rows=rows, code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
