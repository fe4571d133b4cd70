"""Time of a training step of KD and DiffKD on the pairs of the paper's table 9: ours, our own plain loop, and the released program.

    python bench/step.py [--pairs resnet56-resnet20 ...] [--released CHECKOUT] [--device cuda] [--threads 2] [--out results/bench/step_cpu.json]

`ours` is what `run(channels_last=True, graph=True, amp='bf16')` does: on a CPU that leaves channels last in float32. `plain` is the same
Learner without any of it. `released` is the authors' own KDLoss around their models (CHECKOUT: hunto/image_classification_sota), with the body
of their training loop; it exists for WRN-40-2 -> WRN-40-1. All sides alternate in one process, each on random images that lie where the models
are, so none of them waits for data. A row is stored as soon as it is measured.
"""
import argparse, importlib, json, statistics, sys, time, types, warnings
from pathlib import Path
import torch
from torch import nn
from fastai.basics import Callback, Learner
import fastai.callback.progress, fastai.callback.fp16
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import ImageArrays, STATS, array_dls, write_whole
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.fast import CudaGraphStep
from diffkd_nb.models import make_model
from diffkd_nb.recipes import get_recipe

PAIRS = [('resnet56', 'resnet20'), ('wrn_40_2', 'wrn_40_1'), ('resnet32x4', 'resnet8x4'), ('resnet32x4', 'shufflenetv2'), ('resnet32x4', 'shufflenetv1'),
         ('resnet50_cifar', 'mobilenetv2_cifar')]
METHODS = ('kd', 'diffkd')
WARM = 5 # Steps before the clock starts: the graph is recorded in the fourth


def sync(device):
    if device.startswith('cuda'): torch.cuda.synchronize()


class Clock(Callback):
    "Milliseconds of a step, the first few left out"
    order = 90
    def __init__(self, device): self.device = device
    def before_train(self): self.n = 0
    def after_batch(self):
        if not self.training: return
        self.n += 1
        if self.n == WARM: sync(self.device); self.start = time.perf_counter()
    def after_train(self): sync(self.device); self.ms = 1000*(time.perf_counter() - self.start)/(self.n - WARM)


def through_learner(teacher, student, method, data, a, fast):
    "A function that trains some steps and gives the milliseconds of one"
    torch.manual_seed(0)
    layout = dict(memory_format=torch.channels_last) if fast else {}
    t, s, clock = make_model(teacher, 100).to(a.device, **layout), make_model(student, 100).to(a.device, **layout), Clock(a.device)
    graph = [CudaGraphStep(verbose=False)] if fast and a.device.startswith('cuda') else []
    learn = Learner(array_dls(data, a.batch, device=a.device), s, lr=1e-4, loss_func=CrossEntropyLossFlat(), opt_func=get_recipe('A1').opt_func(),
                    cbs=[clock, DistillCallback(t, method, verbose=False, inputs=torch.zeros(2, 3, 32, 32)), *graph])
    if fast: learn.distill.distiller.to(**layout)
    if fast and a.device.startswith('cuda'): learn.to_bf16()
    def train():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        if graph and graph[0].reason: raise SystemExit(f'{teacher} -> {student}, {method}: no graph, since {graph[0].reason}')
        return clock.ms
    return train


def released_parts(checkout):
    "The authors' KDLoss and CIFAR models, from a copy of their repository"
    sys.path.insert(0, str(checkout))
    for name in ('lib', 'lib.models'):      # their own __init__ imports what CIFAR does not need
        m = types.ModuleType(name); m.__path__ = [str(Path(checkout)/name.replace('.', '/'))]; sys.modules[name] = m
    return importlib.import_module('lib.models.losses.kd_loss').KDLoss, importlib.import_module('lib.models.cifar').model_dict


def through_released(parts, teacher, student, method, data, a):
    "The same for the released program"
    KDLoss, models = parts
    names = [f'cifar_{n}' for n in (student, teacher)]
    torch.manual_seed(0)
    s, t = (models[n.removeprefix('cifar_')](num_classes=100).to(a.device) for n in names)
    if not a.device.startswith('cuda'): nn.Module.cuda = lambda self, *args, **kw: self      # it moves its modules to a GPU without asking
    loss = KDLoss(s, t, *names, nn.CrossEntropyLoss(), method, kd_loss_kwargs=dict(use_ae=False))
    opt = torch.optim.SGD(s.parameters(), 1e-4, momentum=.9, weight_decay=5e-4)
    x, y = data.x.float().to(a.device)/255 - .5, data.y.to(a.device)
    def step(i):
        for p in s.parameters(): p.grad = None
        l = loss(x[i*a.batch:(i+1)*a.batch], y[i*a.batch:(i+1)*a.batch])
        l.backward(); opt.step(); l.item()
    def train():
        s.train()
        for i in range(WARM): step(i)
        sync(a.device); start = time.perf_counter()
        for i in range(WARM, WARM + a.steps): step(i)
        sync(a.device); return 1000*(time.perf_counter() - start)/a.steps
    return train


def measure(teacher, student, parts, data, a):
    "One row of the table: medians and their range, ratios round by round"
    sides = {f'{side} {m}': through_learner(teacher, student, m, data, a, side == 'ours') for m in METHODS for side in ('plain', 'ours')}
    if parts and (teacher, student) == ('wrn_40_2', 'wrn_40_1'): sides.update({f'released {m}': through_released(parts, teacher, student, m, data, a) for m in METHODS})
    times = {k: [] for k in sides}
    for f in sides.values(): f()
    for _ in range(a.rounds):
        for k,f in sides.items(): times[k].append(f())
    ratio = lambda p, q: round(statistics.median(x/y for x,y in zip(times[p], times[q])), 3)
    row = dict(teacher=teacher, student=student, ms={k: round(statistics.median(v), 3) for k,v in times.items()}, range={k: [round(min(v), 3), round(max(v), 3)] for k,v in times.items()},
               images_per_second={k: round(1000*a.batch/statistics.median(v)) for k,v in times.items()}, diffkd_to_kd=ratio('ours diffkd', 'ours kd'),
               faster_than_plain={m: ratio(f'plain {m}', f'ours {m}') for m in METHODS})
    if 'released kd' in times: row['faster_than_released'] = {m: ratio(f'released {m}', f'ours {m}') for m in METHODS}
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', nargs='+', default=['-'.join(q) for q in PAIRS], help='teacher-student'); p.add_argument('--released', type=Path)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--batch', type=int, default=64)
    p.add_argument('--steps', type=int, help='steps of a round (200 on a GPU, 8 elsewhere)'); p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=2); p.add_argument('--out', type=Path)
    a = p.parse_args()
    a.steps = a.steps or (200 if a.device.startswith('cuda') else 8)
    warnings.filterwarnings('ignore'); torch.set_num_threads(a.threads); torch.manual_seed(0)
    n = a.batch*(a.steps + WARM)
    x, y = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 100
    data = ImageArrays(x, y, x[:2], y[:2], [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    parts, rows = released_parts(a.released) if a.released else None, []
    for pair in a.pairs:
        row = measure(*pair.split('-'), parts, data, a)
        rows.append(row)
        r = row.get('faster_than_released')
        print(f"{row['teacher']} -> {row['student']}: " + ', '.join(f'{k} {v:g} ms' for k,v in row['ms'].items()) + f"; DiffKD {row['diffkd_to_kd']:.2f} of KD's step, {row['faster_than_plain']['diffkd']:.2f} times as fast as plain"
              + (f", {r['diffkd']:.2f} times as fast as the released program (KD: {r['kd']:.2f})" if r else ''), flush=True)
        if a.out: write_whole(a.out, json.dumps(dict(bench='step', batch=a.batch, steps=a.steps, rounds=a.rounds, threads=a.threads, rows=rows, code=code_version(), environment=environment(a.device)), indent=1))


if __name__ == '__main__': main()
