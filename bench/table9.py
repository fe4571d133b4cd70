"""The paper's table 9: teachers, six pairs, the rate of the small mobile nets, and the controls, on CIFAR-100.

    python bench/table9.py --data cifar100:FOLDER [--minutes 10] [--device cuda] [--jobs 6] [--stages teachers rates grid controls]

Every run is a cell that is never run twice; an interrupted one goes on from its checkpoint. Call it until it says that nothing is left. What is
finished stands under --out and --teachers, and `nbs/60_cifar100.ipynb` reads it from there.

Stages
  teachers   the four teachers by A1, seed 0; stored in half precision with manifest and hash, and evaluated again in that form
  rates      the three small mobile nets alone, at the paper's rate of 0.05 and at the common 0.01, on 450 training images of each class and
             judged on the other 50. Rule: the rate with the higher accuracy of the last epoch is used for all methods of that student;
             equal accuracies leave the paper's
  grid       six pairs x (alone, KD, DIST, DiffKD, DiffKD with DIST on logits) x seeds, pairs in the order of PAIRS
  controls   ResNet-56 -> ResNet-20: what the gain rests on; the reference is the denoiser left out (identity)

--limit, --epochs, --seeds and --pairs make everything smaller, for a rehearsal. The data's name then says so, and no published figure stands beside it.
"""
import argparse, json, os, sys, time
from pathlib import Path
import torch
from fastprogress.fastprogress import progress_bar
from safetensors.torch import load_file, save
from diffkd_nb.data import open_data
from diffkd_nb.experiment import EXECUTORS, Comparison, compare, evaluate, grid_cells, parse_method
from diffkd_nb.files import InputError, write_whole
from diffkd_nb.models import make_model
from diffkd_nb.weights import load_weights, state_hash
from diffkd_nb.recipes import get_recipe
from diffkd_nb.setup import Job, Setup, split_options

PAIRS = [('resnet56', 'resnet20'), ('wrn_40_2', 'wrn_40_1'), ('resnet32x4', 'resnet8x4'), ('resnet32x4', 'shufflenetv2'), ('resnet32x4', 'shufflenetv1'),
         ('resnet50_cifar', 'mobilenetv2_cifar')]
METHODS = ['alone', 'kd', 'dist', 'diffkd', 'diffkd:logits_loss=dist']
CONTROLS = ['alone', 'kd', 'diffkd', 'diffkd:denoiser=identity', 'diffkd:denoiser=identity,adapter=False', 'diffkd:adapter=False', 'diffkd:trained_by=diffusion', 'diffkd:trained_by=kd',
            'diffkd:start=paper', 'diffkd:start=gamma', 'diffkd:norms=separate', 'diffkd:latent=32', 'diffkd:taps=logits', 'diffkd:taps=feature']
MOBILE = ('shufflenetv2', 'shufflenetv1', 'mobilenetv2_cifar')
RATES = (.05, .01) # The paper's, and the one of common practice
HALF_LIMIT = 16*2**20 # Bytes of a teacher in half precision that goes into the repository


def cell(recipe, data, teacher, student, method, seed, out, a, **options):
    "Setup and job of a run, for a worker process"
    out.parent.mkdir(parents=True, exist_ok=True)
    decides, rest = split_options({**a.options, **options})
    return Setup(recipe, data, student, (teacher,) if teacher else (), method, seed, **decides), Job(out, threads=a.threads, **rest)


def work(what, cells, a):
    "Run the cells that are not finished; how many are left"
    unfinished = lambda: [(s, j) for s,j in cells if not (j.out/'manifest.json').is_file()]
    todo = unfinished()
    if not todo: print(f'{what}: all {len(cells)} runs are there'); return 0
    if a.left() <= 0: print(f'{what}: {len(todo)} of {len(cells)} runs left'); return len(todo)
    total = sum(s.recipe.epochs for s,_ in todo)
    bar, rows = progress_bar(range(total)), lambda j: max(0, sum(1 for _ in open(f))-1) if (f := j.out/'log.csv').is_file() else 0
    seen = [-1]
    def tick():
        done = min(total, sum(rows(j) for _,j in todo))
        if done != seen[0]: seen[0] = done; bar.comment = what; bar.update(done)
    tick()
    failed = EXECUTORS['process'](a.jobs)(todo, tick, time.monotonic() + a.left())
    for k,v in failed.items(): print(f'FAILED {k}: {v}', file=sys.stderr)
    a.failed += len(failed)
    left = len(unfinished())
    print(f'{what}: {len(cells) - left} of {len(cells)} runs are there')
    return left


def recipe_of(a, lr=None):
    "A1, at another rate or length where that was asked for"
    r = get_recipe('A1')
    if lr and lr != r.lr: r = r.replace(name=f'A1 at {lr:g}', lr=lr)
    return r.scaled(a.epochs) if a.epochs != r.epochs else r


def teacher_file(name, a): return a.teachers/name/'weights.safetensors'


def teachers(a):
    "Train them, store them in half precision"
    names = list(dict.fromkeys(t for t,_ in a.pairs))
    todo = [n for n in names if not (a.teachers/n/'manifest.json').is_file()]
    left = work('teachers', [cell(recipe_of(a), a.data, None, n, 'alone', 0, a.out/'teachers'/n, a) for n in todo], a) if todo else 0
    for n in todo:
        if (a.out/'teachers'/n/'manifest.json').is_file(): store_teacher(n, a)
    return left


def store_teacher(name, a):
    "Half precision, its own accuracy and hash, the manifest and the log of the run"
    run = a.out/'teachers'/name
    half = {k: v.half() if v.is_floating_point() else v for k,v in load_file(run/'student.safetensors').items()}
    blob = save(half)
    write_whole(teacher_file(name, a), blob)
    model = load_weights(make_model(name, 100), teacher_file(name, a))
    acc, loss = evaluate(model, a.data, a.device)
    record = dict(name=name, accuracy=acc, valid_loss=loss, hash=state_hash(model), precision='half', bytes=len(blob), in_repository=len(blob) <= HALF_LIMIT, run=json.loads((run/'manifest.json').read_text()))
    write_whole(a.teachers/name/'log.csv', (run/'log.csv').read_text())
    write_whole(a.teachers/name/'manifest.json', json.dumps(record, indent=1))
    (run/'student.safetensors').unlink()
    print(f"teacher {name}: {100*acc:.2f} % in half precision, {100*record['run']['result']['accuracy']:.2f} % as trained, {len(blob)/2**20:.1f} MiB")


def rates(a):
    "Both rates for each small mobile net, and the choice"
    students = [s for _,s in a.pairs if s in MOBILE]
    data = f"{a.data}{'&' if '?' in a.data else '?'}holdout={a.holdout}"
    place = lambda s, lr: a.out/'rates'/s/f'lr{lr:g}'
    left = work('rates', [cell(recipe_of(a, lr), data, None, s, 'alone', 0, place(s, lr), a, keep_student=False) for s in students for lr in RATES], a)
    for s in students:
        got = {lr: json.loads((place(s, lr)/'manifest.json').read_text())['result']['accuracy'] for lr in RATES if (place(s, lr)/'manifest.json').is_file()}
        if len(got) == len(RATES):
            best = max(RATES, key=lambda lr: (got[lr], lr == RATES[0]))
            write_whole(a.out/'rates'/s/'choice.json', json.dumps(dict(student=s, accuracy={f'{k:g}': v for k,v in got.items()}, chosen=best, held_out=data.partition('?')[2],
                                                                       rule='higher accuracy of the last epoch, alone, seed 0, on held-out training images; the paper\'s rate if equal'), indent=1))
    return left


def rate_of(student, a):
    "The rate of a student; None while it is not decided"
    if student not in MOBILE: return RATES[0]
    f = a.out/'rates'/student/'choice.json'
    return json.loads(f.read_text())['chosen'] if f.is_file() else None


def table(out, groups, reference, a):
    "Run what is left of several comparisons as one queue, then write their common table"
    runs, ready, all_cells, seeds = [], [], [], list(range(a.seeds))
    for (t,s),methods in groups:
        cells = grid_cells([(f'{t}@{teacher_file(t, a)}', s)], methods, seeds)
        all_cells += [c.folder for c in cells]
        if not teacher_file(t, a).is_file() or rate_of(s, a) is None: continue
        ready.append((t, s, methods))
        runs += [cell(recipe_of(a, rate_of(s, a)), a.data, c.teacher if c.method != 'alone' else None, s, c.method, c.seed, out/c.folder, a, keep_student=s in a.keep) for c in cells]
    left = work(out.name, runs, a) + len(all_cells) - len(runs)
    for t,s,methods in ready:       # checks what is there against what would be run now
        compare([(f'{t}@{teacher_file(t, a)}', s)], methods, seeds, recipe_of(a, rate_of(s, a)), a.data, out, reference, a.jobs, a.threads, minutes=0, progress=False, **a.options)
    write_whole(out/'grid.json', json.dumps(dict(cells=all_cells, reference=str(parse_method(reference)), recipe=recipe_of(a).to_dict(), data=open_data(a.data).name), indent=1))
    Comparison(out).save()
    return left


def grid(a): return table(a.out/'grid', [(p, METHODS) for p in a.pairs], 'alone', a)
def controls(a): return table(a.out/'controls', [(a.pairs[0], CONTROLS)], 'diffkd:denoiser=identity', a)


STAGES = dict(teachers=teachers, rates=rates, grid=grid, controls=controls)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True, help='cifar100:FOLDER'); p.add_argument('--out', type=Path, default=Path('results/table9')); p.add_argument('--teachers', type=Path, default=Path('teachers'))
    p.add_argument('--minutes', type=float, default=1e9); p.add_argument('--stages', nargs='+', choices=STAGES, default=list(STAGES))
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--jobs', type=int, help='runs at a time (6 on a GPU, 1 elsewhere)')
    p.add_argument('--threads', type=int, help='CPU threads of a run'); p.add_argument('--plain', action='store_true', help='float32, no graph, channels first')
    p.add_argument('--epochs', type=int, default=240); p.add_argument('--seeds', type=int, default=3); p.add_argument('--limit', type=int, help='images of a class')
    p.add_argument('--holdout', type=int, default=50, help='training images of a class that the rates are judged on'); p.add_argument('--keep', nargs='*', default=['resnet20'], help='students whose weights are stored')
    p.add_argument('--pairs', nargs='+', default=['-'.join(q) for q in PAIRS], help='teacher-student')
    a = p.parse_args()
    cuda = a.device.startswith('cuda')
    end = time.monotonic() + 60*a.minutes
    a.left, a.failed, a.pairs = (lambda: end - time.monotonic()), 0, [tuple(q.split('-')) for q in a.pairs]
    a.jobs = a.jobs or (6 if cuda else 1); a.threads = a.threads or max(1, (os.cpu_count() or 1)//a.jobs)
    if a.limit: a.data += f"{'&' if '?' in a.data else '?'}limit={a.limit}"
    a.options = dict(device=a.device, eval_batch=2000 if cuda else 500, checkpoint_every=10 if cuda else 1)
    if not a.plain: a.options.update(channels_last=True, **(dict(amp='bf16', graph=True) if cuda else {}))
    try:
        open_data(a.data)
        left = {s: STAGES[s](a) for s in a.stages}
    except InputError as e: sys.exit(f'Error: {e}')
    except KeyboardInterrupt: sys.exit('\nInterrupted. Start it again to go on.')
    print('Nothing is left to run.' if not any(left.values()) else 'Left: ' + ', '.join(f'{n} of {s}' for s,n in left.items() if n) + '.')
    sys.exit(1 if a.failed else 0)


if __name__ == '__main__': main()
