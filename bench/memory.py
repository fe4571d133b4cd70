"""Time of a training step on a processor with freed memory kept (`keep_memory`) beside the C library's own way with it.

    python bench/memory.py [--threads 1] [--rounds 5] [--out results/bench/memory_cpu.json]

The rival is the same Learner with glibc as it comes. Both alternate in one process, on random pictures in memory, so nothing waits for
data. Ratios are medians of those of the rounds. Pages are those of 4 KiB that the system had to fill during a step. With `--clock cpu` the
milliseconds are those of the process, as a machine with other work wants it; else those of the wall. Needs Linux with glibc. A row is
stored as soon as it is measured.
"""
import argparse, json, os, resource, statistics, warnings
from contextlib import nullcontext
from pathlib import Path
import torch
from fastai.basics import Learner, SGD
import fastai.callback.progress, fastai.callback.fp16
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import ImageArrays, STATS, array_dls, write_whole
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.memory import keep_memory
from diffkd_nb.models import make_model
from diffkd_nb.precision import CpuAutocast
from methods import NOW, Clock

PAIRS = [('resnet32_s', 'resnet8_s', 32, 128), ('wrn_40_2', 'wrn_40_1', 32, 64), ('resnet34', 'resnet18', 224, 16)] # With side and batch
ROWS = [(p, m, 'float32') for p in PAIRS for m in ('alone', 'kd', 'diffkd')] + [(PAIRS[0], m, 'bf16') for m in ('alone', 'diffkd')]
WARM = 2 # Steps of a round that do not count


def filled(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Pages(Clock):
    "Filled pages beside the time"
    def after_batch(self):
        super().after_batch()
        if self.training and self.n == self.warm: self.before = filled()
    def after_train(self): self.filled = filled() - self.before


def learner(pair, method, precision, a):
    "A Learner on random pictures"
    teacher, student, side, batch = pair
    torch.manual_seed(0)
    n = batch*(a.steps + WARM)
    x, y = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8), torch.arange(n) % 100
    data = ImageArrays(x, y, x[:2], y[:2], [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    student, teacher = (make_model(m, 100).to(memory_format=torch.channels_last) for m in (student, teacher))
    cbs = [] if method == 'alone' else [DistillCallback(teacher, method, verbose=False)]
    learn = Learner(array_dls(data, batch), student, lr=1e-3, loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=[Pages(NOW[a.clock], WARM), *cbs])
    if precision == 'bf16': learn.add_cb(CpuAutocast()); learn.to_bf16()
    return learn


def measure(pair, method, precision, a):
    "One row: milliseconds and pages of both sides, and the ratio"
    learn, found = learner(pair, method, precision, a), {'usual': [], 'kept': []}
    for _ in range(a.rounds):
        for side,seen in found.items():
            with keep_memory() if side == 'kept' else nullcontext(), learn.no_bar(), learn.no_logging(): learn.fit(1)
            seen.append((1000*learn.pages.seconds/a.steps, learn.pages.filled/a.steps))
    ms, pages = ({side: statistics.median(s[i] for s in seen) for side,seen in found.items()} for i in (0, 1))
    ratios = [u[0]/k[0] for u,k in zip(found['usual'], found['kept'])]
    return dict(teacher=pair[0], student=pair[1], side=pair[2], batch=pair[3], method=method, precision=precision,
                ms={s: round(v, 2) for s,v in ms.items()}, pages={s: round(v) for s,v in pages.items()},
                faster=round(statistics.median(ratios), 3), range=[round(min(ratios), 3), round(max(ratios), 3)],
                load=round(os.getloadavg()[0], 2))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=6, help='steps of a round'); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=1); p.add_argument('--clock', choices=NOW, default='wall'); p.add_argument('--out', type=Path)
    a, rows = p.parse_args(), []
    warnings.filterwarnings('ignore'); torch.set_num_threads(a.threads)
    for pair,method,precision in ROWS:
        rows.append(r := measure(pair, method, precision, a))
        print(f"{pair[0]} -> {pair[1]}, {method}, {precision}: {r['ms']['usual']:g} ms, with memory kept {r['ms']['kept']:g} ms, "
              f"{r['faster']:.2f} times as fast; {r['pages']['usual']:,} and {r['pages']['kept']:,} pages", flush=True)
        if a.out: write_whole(a.out, json.dumps(dict(bench='memory', steps=a.steps, rounds=a.rounds, threads=a.threads, clock=a.clock, rows=rows,
                                                     code=code_version(), environment=environment('cpu')), indent=1))


if __name__ == '__main__': main()
