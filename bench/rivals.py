"""Plain KD on a fastai Learner: this package's callback beside fasterai's, same models, batches and loss.

    python bench/rivals.py [--pair resnet56-resnet20] [--out results/bench/rivals_cpu.json]      (pip install --no-deps fasterai)

Both get the same student, teacher, batches and optimiser, temperature 4 and equal weights of the two losses. Timed: a training step and a validation
batch, alternating, medians over rounds; `alone` is the Learner without a callback. Asked: does validation report the student's own loss, does an
exported Learner hold the teacher, does the teacher get gradients, are hooks left behind after an error. fasterai is asked for features too where hooks
are looked at, since its logits need none.
"""
import argparse, importlib.metadata, json, statistics, tempfile, time, warnings
from pathlib import Path
import torch
from torch import nn
from fastai.basics import Callback, Learner
import fastai.callback.progress
from fastai.losses import CrossEntropyLossFlat
from diffkd_nb.callback import DistillCallback
from diffkd_nb.data import ImageArrays, STATS, array_dls, write_whole
from diffkd_nb.experiment import code_version, environment
from diffkd_nb.models import make_model, n_parameters
from diffkd_nb.recipes import get_recipe


def theirs(teacher, **kw):
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
    from fasterai.distill.losses import SoftTarget
    return KnowledgeDistillationCallback(teacher, lambda **k: SoftTarget(T=4, **k), weight=.5, **kw)

def ours(teacher): return DistillCallback(teacher, 'kd', temperature=4., task_weight=.5, weight=.5, verbose=False)


class Stop(Callback):
    order = 90
    def after_batch(self): raise RuntimeError('an error in the middle')


def learner(side, a, data, *cbs):
    torch.manual_seed(0)
    t, s = (make_model(n, 100) for n in a.pair.split('-'))
    cb = [] if side == 'alone' else [ours(t) if side == 'ours' else theirs(t)]
    learn = Learner(array_dls(data, a.batch, eval_batch=a.batch), s, lr=1e-4, loss_func=CrossEntropyLossFlat(), opt_func=get_recipe('A1').opt_func(), cbs=[*cb, *cbs])
    return learn, t


def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--pair', default='resnet56-resnet20'); p.add_argument('--batch', type=int, default=64); p.add_argument('--steps', type=int, default=6)
    p.add_argument('--rounds', type=int, default=5); p.add_argument('--threads', type=int, default=1); p.add_argument('--out', type=Path)
    a = p.parse_args()
    warnings.filterwarnings('ignore'); torch.set_num_threads(a.threads); torch.manual_seed(0)
    n = a.batch*a.steps
    x, y = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 100
    data = ImageArrays(x, y, x, y, [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    sides = ['alone', 'ours', 'fasterai']
    made = {s: learner(s, a, data) for s in sides}
    times = {s: dict(step=[], valid=[]) for s in sides}
    for r in range(a.rounds + 1):
        for s,(learn,_) in made.items():
            for what,f in (('step', lambda: learn.fit(1, cbs=[NoValid()])), ('valid', learn.validate)):
                start = time.perf_counter()
                quiet(learn, f)
                if r: times[s][what].append(1000*(time.perf_counter() - start)/a.steps)
    rows = {}
    for s in sides:
        learn, t = made[s]
        valid = quiet(learn, learn.validate)[0]
        with torch.no_grad():
            learn.model.eval()
            own = nn.functional.cross_entropy(torch.cat([learn.model(b) for b,_ in learn.dls.valid]), torch.cat([l for _,l in learn.dls.valid])).item()
        with tempfile.TemporaryDirectory() as d:
            learn.path = Path(d)
            try: learn.export('e.pkl'); size = (Path(d)/'e.pkl').stat().st_size/1000
            except Exception as e: size = type(e).__name__
        row = dict(step_ms=round(statistics.median(times[s]['step']), 1), valid_ms=round(statistics.median(times[s]['valid']), 1), exported_kb=size if isinstance(size, str) else round(size),
                   valid_loss_is_the_students=abs(valid - own) < 1e-3*own)
        if s != 'alone': row.update(teacher_has_gradients=any(q.grad is not None for q in t.parameters()), hooks_after_an_error=left_hooks(s, a, data))
        rows[s] = row
    result = dict(bench='rivals', pair=a.pair, batch=a.batch, steps=a.steps, rounds=a.rounds, fasterai=importlib.metadata.version('fasterai'), teacher_kb=round(4*n_parameters(made['ours'][1])/1000), rows=rows,
                  code=code_version(), environment=environment('cpu'))
    print(json.dumps(rows, indent=1))
    if a.out: write_whole(a.out, json.dumps(result, indent=1))


class NoValid(Callback):
    "Training without validation"
    def before_validate(self):
        from fastai.basics import CancelValidException
        raise CancelValidException()


def left_hooks(side, a, data):
    "Hooks on student and teacher after an error in the first batch"
    torch.manual_seed(0)
    t, s = (make_model(n, 100) for n in a.pair.split('-'))
    cb = theirs(t, activations_student='model.layer3', activations_teacher='layer3') if side == 'fasterai' else DistillCallback(t, 'diffkd', verbose=False)
    learn = Learner(array_dls(data, a.batch), s, lr=1e-4, loss_func=CrossEntropyLossFlat(), cbs=[cb, Stop()])
    try: quiet(learn, lambda: learn.fit(1))
    except RuntimeError: pass
    return sum(len(m._forward_hooks) for model in (s, t) for m in model.modules())


if __name__ == '__main__': main()
