"""Time of a training step of KD and DiffKD on the pairs of the paper's table 9: ours, our own plain loop, and the released program.

    python bench/step.py [--pairs resnet56-resnet20 ...] [--released CHECKOUT] [--device cuda] [--threads 2] [--out results/bench/step_cpu.json]

On a GPU `ours` is what `run(graph=True, precision='bf16')` does. On a CPU it is what `run` does, channels last in float32, and more sides
show what else there is (`ours teacher` is the forward pass of the teacher alone, what `share_teacher` saves): `engine` (the teacher folded), `bf16 teacher` (the teacher alone in bf16), `bf16`, and `bf16 engine`. `plain` is the
same Learner with the channels first and without any of it. With `--clock cpu` the milliseconds are those of the process, as a machine with other
work wants it (one thread only); else those of the wall. Ratios are those of rounds of one run, medians over the rounds; beside them stands the ratio of FLOPs of DiffKD's step and
KD's, and the load of the machine while the row was measured: a row with more running processes than cores is no figure to quote. `released` is the authors' own KDLoss around their models (CHECKOUT: hunto/image_classification_sota), with the body
of their training loop; it exists for WRN-40-2 -> WRN-40-1. All sides alternate in one process, each on random images that lie where the models
are, so none of them waits for data. A row is stored as soon as it is measured.
"""
import argparse, importlib, json, os, statistics, sys, time, types, warnings
from pathlib import Path
import torch
from torch import nn
from fastai.basics import Callback, Learner
import fastai.callback.progress, fastai.callback.fp16
from torch.utils.flop_counter import FlopCounterMode
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb import callback
from diffkd_nb.callback import DistillCallback
from diffkd_nb.distillation import Distillation
from diffkd_nb.data import ImageArrays, STATS, array_dls, write_whole
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.fast import CudaGraphStep
from diffkd_nb.models import make_model
from diffkd_nb.recipes import get_recipe

PAIRS = [('resnet56', 'resnet20'), ('wrn_40_2', 'wrn_40_1'), ('resnet32x4', 'resnet8x4'), ('resnet32x4', 'shufflenetv2'), ('resnet32x4', 'shufflenetv1'),
         ('resnet50_cifar', 'mobilenetv2_cifar')]
METHODS = ('kd', 'diffkd')
ENGINE = {'engine': 'auto', 'bf16 engine': 'auto', 'bf16 teacher': 'bf16'} # Side to `teacher_engine`
NOW = dict(wall=time.perf_counter, cpu=time.process_time)
WARM = 5 # Steps before the clock starts on a GPU: the graph is recorded in the fourth; 1 elsewhere


def sync(device):
    if device.startswith('cuda'): torch.cuda.synchronize()


class Clock(Callback):
    "Milliseconds of a step, the first few left out"
    order = 90
    def __init__(self, a): self.device, self.warm, self.now = a.device, a.warm, NOW[a.clock]
    def before_train(self): self.n = 0
    def after_batch(self):
        if not self.training: return
        self.n += 1
        if self.n == self.warm: sync(self.device); self.start = self.now()
    def after_train(self): sync(self.device); self.ms = 1000*(self.now() - self.start)/(self.n - self.warm)


def through_learner(teacher, student, method, data, a, side):
    "A function that trains some steps and gives the milliseconds of one"
    torch.manual_seed(0)
    fast, bf16 = side != 'plain', side in ('bf16', 'bf16 engine') or side == 'ours' and a.device.startswith('cuda')
    layout = dict(memory_format=torch.channels_last) if fast else {}
    t, s, clock = make_model(teacher, 100).to(a.device, **layout), make_model(student, 100).to(a.device, **layout), Clock(a)
    graph = [CudaGraphStep(verbose=False)] if fast and a.device.startswith('cuda') else []
    learn = Learner(array_dls(data, a.batch, device=a.device), s, lr=1e-4, loss_func=CrossEntropyLossFlat(), opt_func=get_recipe('A1').opt_func(),
                    cbs=[clock, DistillCallback(t, method, verbose=False, inputs=torch.zeros(2, 3, 32, 32), teacher_engine=ENGINE.get(side, 'plain')), *graph])
    if fast: learn.distill.distiller.to(**layout)
    if bf16: learn.to_bf16()
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
        for i in range(a.warm): step(i)
        sync(a.device); start = NOW[a.clock]()
        for i in range(a.warm, a.warm + a.steps): step(i)
        sync(a.device); return 1000*(NOW[a.clock]() - start)/a.steps
    return train


def through_teacher(teacher, data, a, side):
    "A function that gives the milliseconds of the teacher's part of a step"
    layout = dict(memory_format=torch.channels_last) if side != 'plain' else {}
    t = make_model(teacher, 100).to(a.device, **layout).eval()
    x = (data.x[:a.batch].float()/255 - .5).to(a.device, **layout)
    def ask():
        start = NOW[a.clock]()
        with torch.no_grad(), torch.autocast(torch.device(a.device).type, torch.bfloat16, enabled='bf16' in side): t(x)
        sync(a.device); return 1000*(NOW[a.clock]() - start)
    return ask


def flops(teacher, student, batch):
    "FLOPs of DiffKD's step over those of KD's"
    x, y, found = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 100, []
    for method in METHODS:
        s = make_model(student, 100)
        with Distillation(s, make_model(teacher, 100), method, xb=x[:2]) as kd, FlopCounterMode(display=False) as count:
            (nn.functional.cross_entropy(s(x), y) + kd(x, y).total).backward()
        found.append(count.get_total_flops())
    return round(found[1]/found[0], 3)


def measure(teacher, student, parts, data, a):
    "One row of the table: medians and their range, ratios round by round"
    names = ['plain', 'ours'] + ([] if a.device.startswith('cuda') else a.sides)
    sides = {f'{side} {m}': through_learner(teacher, student, m, data, a, side) for m in METHODS for side in names}
    sides.update({f'{side} teacher': through_teacher(teacher, data, a, side) for side in ('plain', 'ours', 'bf16') if side in names})
    busy = [os.getloadavg()[0]]
    if parts and (teacher, student) == ('wrn_40_2', 'wrn_40_1'): sides.update({f'released {m}': through_released(parts, teacher, student, m, data, a) for m in METHODS})
    times = {k: [] for k in sides}
    if a.device.startswith('cuda'):
        for f in sides.values(): f()        # elsewhere the first step of each round warms up
    for _ in range(a.rounds):
        for k,f in sides.items(): times[k].append(f())
    busy.append(os.getloadavg()[0])
    ratio = lambda p, q: round(statistics.median(x/y for x,y in zip(times[p], times[q])), 3)
    row = dict(teacher=teacher, student=student, ms={k: round(statistics.median(v), 3) for k,v in times.items()}, range={k: [round(min(v), 3), round(max(v), 3)] for k,v in times.items()},
               images_per_second={k: round(1000*a.batch/statistics.median(v)) for k,v in times.items()}, diffkd_to_kd=ratio('ours diffkd', 'ours kd'),
               faster_than_plain={m: ratio(f'plain {m}', f'ours {m}') for m in METHODS}, load=[round(b, 2) for b in busy], cores=os.cpu_count(),
               of_plain={side: {m: ratio(f'{side} {m}', f'plain {m}') for m in METHODS} for side in names[1:]},
               diffkd_to_kd_by_side={side: ratio(f'{side} diffkd', f'{side} kd') for side in names}, flops_diffkd_to_kd=flops(teacher, student, a.batch))
    if 'released kd' in times: row['faster_than_released'] = {m: ratio(f'released {m}', f'ours {m}') for m in METHODS}
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', nargs='+', default=['-'.join(q) for q in PAIRS], help='teacher-student'); p.add_argument('--released', type=Path)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--batch', type=int, default=64)
    p.add_argument('--steps', type=int, help='steps of a round (200 on a GPU, 8 elsewhere)'); p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=2); p.add_argument('--clock', choices=NOW, default='wall')
    p.add_argument('--sides', nargs='*', default=['engine', 'bf16 teacher', 'bf16', 'bf16 engine'], help='on a CPU, beside plain and ours'); p.add_argument('--out', type=Path)
    a = p.parse_args()
    a.steps = a.steps or (200 if a.device.startswith('cuda') else 8)
    a.warm = WARM if a.device.startswith('cuda') else 1
    callback.ENGINE_STEPS = 0       # also in the short rounds of a measurement
    warnings.filterwarnings('ignore'); torch.set_num_threads(a.threads); torch.manual_seed(0)
    n = a.batch*(a.steps + a.warm)
    x, y = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 100
    data = ImageArrays(x, y, x[:2], y[:2], [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    parts, rows = released_parts(a.released) if a.released else None, []
    for pair in a.pairs:
        row = measure(*pair.split('-'), parts, data, a)
        rows.append(row)
        r = row.get('faster_than_released')
        if row['load'][-1] > row['cores']: print(f"load {row['load'][-1]:.1f} on {row['cores']} cores: not a quiet machine", flush=True)
        print(f"{row['teacher']} -> {row['student']}: FLOPs {row['flops_diffkd_to_kd']:.2f}; " + ', '.join(f'{k} {v:g} ms' for k,v in row['ms'].items()) + f"; DiffKD {row['diffkd_to_kd']:.2f} of KD's step, {row['faster_than_plain']['diffkd']:.2f} times as fast as plain"
              + (f", {r['diffkd']:.2f} times as fast as the released program (KD: {r['kd']:.2f})" if r else ''), flush=True)
        if a.out: write_whole(a.out, json.dumps(dict(bench='step', batch=a.batch, steps=a.steps, rounds=a.rounds, threads=a.threads, clock=a.clock, rows=rows, code=code_version(), environment=environment(a.device)), indent=1))


if __name__ == '__main__': main()
