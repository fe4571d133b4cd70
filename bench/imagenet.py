"""Images per second of recipe B1's real training step on ImageNet-sized input: 224 pixels, batch 256, 1000 classes; ours against the released program.

    python bench/imagenet.py [--pairs resnet34-resnet18 resnet50-mobilenetv1] [--released CHECKOUT] [--device cuda] [--out results/gpu/imagenet.json]

The images are random and lie where the models are, so this is the step without its input (bench/input.py measures that one). `ours` is what
`run(channels_last=True, amp='bf16')` does on a GPU, with a recorded step where that goes; `plain` is the same Learner in float32 without any of it;
`released` is the authors' KDLoss around torchvision's models with the body of their training loop (CHECKOUT: hunto/image_classification_sota), for
ResNet-34 -> ResNet-18. Sides alternate. Parts are timed apart: the teacher's forward pass, a step of the student alone, the distiller's forward and
backward pass on maps of the same size. A row is stored as soon as it is measured, and a second call keeps the rows of the same code and settings.
`ran` says of each of our sides whether its steps were recorded, or why not. Weights are random: time does not depend on them.

`--precision tf32` records float32 steps whose convolutions and products round to TF32, in place of bf16: fewer kernels, since nothing is cast, and
more bytes. `--compile` compiles the distiller, whose many small kernels then become few. Which of the three is fastest depends on the card.

All sides of a pair are in memory at once, with one set of images for all; a pair leaves it before the next begins. `memory_gb` is the most that
PyTorch took from the card.
"""
import argparse, gc, json, statistics, time, warnings
from pathlib import Path
import torch
from torch import nn
from fastai.basics import Learner
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import ImageArrays, STATS, array_dls, write_whole
from diffkd_nb.diffkd import DiffKDDistiller
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.fast import CudaGraphStep
from diffkd_nb.models import make_model
from diffkd_nb.recipes import get_recipe
from diffkd_nb.taps import plan_taps
from diffkd_nb.capture import Capture
from step import WARM, Clock, released_parts, sync

NAMES = {'resnet18': 'torchvision:resnet18', 'resnet34': 'torchvision:resnet34', 'resnet50': 'torchvision:resnet50'}
METHODS = ('alone', 'kd', 'dist', 'diffkd')


def learner(teacher, student, method, data, a, fast):
    "A function that trains some steps and gives the milliseconds of one, and another that says how the steps ran"
    torch.manual_seed(0)
    recipe, cuda = get_recipe('B1'), a.device.startswith('cuda')
    layout = dict(memory_format=torch.channels_last) if fast else {}
    clock, (t, s) = Clock(a), (make_model(NAMES.get(n, n), 1000, 3, a.size).to(a.device, **layout) for n in (teacher, student))
    graph = [CudaGraphStep(verbose=False)] if fast and cuda and not a.plain else []
    cbs = [clock, *([DistillCallback(t, method, verbose=False, compile=fast and a.compile, inputs=torch.zeros(2, 3, a.size, a.size))] if method != 'alone' else []), *graph]
    learn = Learner(array_dls(data, a.batch, (), device=a.device), s, lr=1e-4, loss_func=recipe.loss_func(), opt_func=recipe.opt_func(), cbs=cbs)
    if fast and method != 'alone': learn.distill.distiller.to(**layout)
    if fast and cuda and a.precision == 'bf16': learn.to_bf16()
    def train():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        return clock.ms
    return train, lambda: 'plain' if not graph else graph[0].reason or 'recorded'


def released(parts, teacher, student, method, data, a):
    "The same for the released program"
    KDLoss, names = parts[0], [f'tv_{n}' for n in (student, teacher)]
    torch.manual_seed(0)
    s, t = (make_model(NAMES[n], 1000).to(a.device) for n in (student, teacher))
    if not a.device.startswith('cuda'): nn.Module.cuda = lambda self, *args, **kw: self
    loss = KDLoss(s, t, *names, nn.CrossEntropyLoss(), {'kd': 'kd', 'diffkd': 'diffkd'}[method], kd_loss_kwargs=dict(use_ae=True, ae_channels=1024))
    opt = torch.optim.SGD(s.parameters(), 1e-4, momentum=.9, weight_decay=1e-4, nesterov=True)
    x, y = data.x.to(a.device), data.y.to(a.device)
    def step(i):
        b = slice(i*a.batch, (i+1)*a.batch)
        for p in s.parameters(): p.grad = None
        l = loss(x[b].float()/255 - .5, y[b])
        l.backward(); opt.step(); l.item()
    def train():
        s.train()
        for i in range(WARM): step(i)
        sync(a.device); start = time.perf_counter()
        for i in range(WARM, WARM + a.steps): step(i)
        sync(a.device); return 1000*(time.perf_counter() - start)/a.steps
    return train


def parts_of(teacher, student, a):
    "Functions that time the teacher's forward pass and the distiller's forward and backward pass, as `ours` runs them"
    cuda = a.device.startswith('cuda')
    cast = lambda: torch.autocast('cuda', torch.bfloat16, enabled=cuda and a.precision == 'bf16')
    t, s = (make_model(NAMES.get(n, n), 1000, 3, a.size).to(a.device, memory_format=torch.channels_last) for n in (teacher, student))
    x = torch.randn(a.batch, 3, a.size, a.size, device=a.device).to(memory_format=torch.channels_last)
    plan = plan_taps(s, t, x[:2])
    d = DiffKDDistiller(plan).to(a.device, memory_format=torch.channels_last)
    with torch.no_grad(), cast(), Capture(s, {p.name: p.student for p in plan}) as cs, Capture(t.eval(), {p.name: p.teacher for p in plan}) as ct:
        s(x); t(x)
        sm, tm = ({k: v.clone() for k,v in c.maps().items()} for c in (cs, ct))
    for v in sm.values(): v.requires_grad_()
    def forward():
        with torch.no_grad(), cast(): t(x)
    def distil():
        with cast(): l = sum(d(sm, tm).values())
        l.backward()
    def timed(f):
        def measure():
            for _ in range(WARM): f()
            sync(a.device); start = time.perf_counter()
            for _ in range(a.steps): f()
            sync(a.device); return 1000*(time.perf_counter() - start)/a.steps
        return measure
    return {'part teacher': timed(forward), 'part distiller': timed(distil)}


def measure(teacher, student, parts, data, a):
    "One row: medians of alternating rounds"
    cuda = a.device.startswith('cuda')
    if cuda: torch.cuda.reset_peak_memory_stats(a.device)
    both = {f'{side} {m}': learner(teacher, student, m, data, a, side == 'ours') for side in ('ours', 'plain') for m in a.methods if side == 'ours' or m in ('kd', 'diffkd')}
    sides, ran = ({k: v[i] for k,v in both.items()} for i in (0, 1))
    if parts and (teacher, student) == ('resnet34', 'resnet18'): sides.update({f'released {m}': released(parts, teacher, student, m, data, a) for m in ('kd', 'diffkd') if m in a.methods})
    sides.update(parts_of(teacher, student, a))
    times = {k: [] for k in sides}
    for f in sides.values(): f()
    for _ in range(a.rounds):
        for k,f in sides.items(): times[k].append(f())
    ms = {k: round(statistics.median(v), 3) for k,v in times.items()}
    ratio = lambda p, q: round(statistics.median(x/y for x,y in zip(times[p], times[q])), 3)
    row = dict(teacher=teacher, student=student, ran={k: f() for k,f in ran.items()}, memory_gb=round(torch.cuda.max_memory_reserved(a.device)/1e9, 1) if cuda else None, ms=ms, range={k: [round(min(v), 3), round(max(v), 3)] for k,v in times.items()},
               **(dict(diffkd_to_kd=ratio('ours diffkd', 'ours kd')) if {'kd', 'diffkd'} <= {*a.methods} else {}),
               images_per_second={k: round(1000*a.batch/v, 1) for k,v in ms.items() if not k.startswith('part')})
    if any(k.startswith('released') for k in ms): row['faster_than_released'] = {m: ratio(f'released {m}', f'ours {m}') for m in ('kd', 'diffkd') if m in a.methods}
    return row


def kept(out, record):
    "Rows of an earlier call with the same code and settings"
    if not out or not out.is_file(): return []
    old = json.loads(out.read_text())
    return old.get('rows', []) if {k: old.get(k) for k in record} == json.loads(json.dumps(record)) else []


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pairs', nargs='+', default=['resnet34-resnet18', 'resnet50-mobilenetv1'], help='teacher-student'); p.add_argument('--released', type=Path)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--batch', type=int, default=256); p.add_argument('--size', type=int, default=224)
    p.add_argument('--steps', type=int, help='steps of a round (30 on a GPU, 2 elsewhere)'); p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--methods', nargs='+', default=list(METHODS), choices=METHODS); p.add_argument('--precision', choices=['bf16', 'tf32'], default='bf16', help='of our side on a GPU')
    p.add_argument('--compile', action='store_true', help='compile the distiller of our side')
    p.add_argument('--plain', action='store_true', help='do not record steps'); p.add_argument('--out', type=Path)
    a = p.parse_args()
    a.warm, a.clock = WARM, 'wall'
    a.steps = a.steps or (30 if a.device.startswith('cuda') else 2)
    warnings.filterwarnings('ignore'); torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = a.precision == 'tf32'
    n = a.batch*(a.steps + WARM)
    x, y = torch.randint(0, 256, (n, 3, a.size, a.size), dtype=torch.uint8, device=a.device), torch.arange(n, device=a.device) % 1000
    data = ImageArrays(x, y, x[:2], y[:2], [str(i) for i in range(1000)], 'random', stats=STATS['imagenet'])
    parts = released_parts(a.released) if a.released else None
    record = dict(bench='imagenet', batch=a.batch, size=a.size, steps=a.steps, rounds=a.rounds, recorded=not a.plain, precision=a.precision, compiled=a.compile, images='random', code=code_version(), environment=environment(a.device))
    rows = kept(a.out, record)
    for pair in a.pairs:
        if pair in [f"{r['teacher']}-{r['student']}" for r in rows]: print(f'{pair}: kept'); continue
        row = measure(*pair.split('-'), parts, data, a)
        rows.append(row)
        gc.collect()            # Learners and their callbacks know each other
        if a.device.startswith('cuda'): torch.cuda.empty_cache()
        print(f"{row['teacher']} -> {row['student']}: " + ', '.join(f'{k} {v:g} ms' for k,v in row['ms'].items()), flush=True)
        if a.out: write_whole(a.out, json.dumps({**record, 'rows': rows}, indent=1))


if __name__ == '__main__': main()
