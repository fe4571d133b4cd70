"""How long runs of the study's first question take on a GPU: one at a time, in processes, and on streams of one process.

    python bench/streams.py --teacher FILE [--device cuda] [--epochs 3] [--jobs 8] [--out results/gpu/streams.json]

The pictures are random, as many as CIFAR-100's, and lie in a scratch folder; time does not depend on them. `one at a time` gives the
milliseconds of a recorded step of KD and DiffKD by itself; the other two the seconds of all eight variants together, with all that belongs
to a run: start, validation, checkpoints.
"""
import argparse, json, tempfile, time
from pathlib import Path
import numpy as np
from diffkd_nb.experiment import code_version, compare, environment
from diffkd_nb.files import write_whole
from diffkd_nb.study import QUESTIONS, SETTINGS


def pictures(folder, train=50_000, test=10_000):
    "Random pictures in the official binary layout"
    g = np.random.default_rng(0)
    for f,n in (('train.bin', train), ('test.bin', test)):
        x = g.integers(0, 256, (n, 3074), dtype=np.uint8)
        x[:, 0], x[:, 1] = np.arange(n) % 20, np.arange(n) % 100
        x.tofile(folder/f)
    for kind,n in (('fine', 100), ('coarse', 20)):
        (folder/f'{kind}_label_names.txt').write_text('\n'.join(f'{kind} {i}' for i in range(n)) + '\n')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--teacher', required=True); p.add_argument('--device', default='cuda'); p.add_argument('--epochs', type=int, default=3)
    p.add_argument('--jobs', type=int, default=8); p.add_argument('--pictures', type=int, default=50_000); p.add_argument('--out', type=Path)
    a = p.parse_args()
    s, q = SETTINGS['S1'], QUESTIONS['1']
    record = dict(bench='streams', epochs=a.epochs, jobs=a.jobs, code=code_version(), environment=environment(a.device))
    with tempfile.TemporaryDirectory() as d:
        d = Path(d); pictures(d, a.pictures, max(1, a.pictures//5))
        def go(name, methods, jobs, executor):
            begin = time.perf_counter()
            c = compare([(f'{s.teacher}@{a.teacher}', s.student)], methods, 1, s.recipe.scaled(a.epochs), f'cifar100:{d}', d/name, jobs=jobs, threads=1, executor=executor,
                        progress=False, keep_student=False, **{**s.options, 'graph': True, 'eval_batch': 2000, 'device': a.device})
            seconds = round(time.perf_counter() - begin, 1)
            record[name] = {'seconds': seconds, 'ms per step': {m['settings']['method']: m['cost']['ms_per_step'] for m in c.manifests.values()}, 'failed': c.failed}
            print(f'{name}: {seconds} s', flush=True)
            if a.out: write_whole(a.out, json.dumps(record, indent=1))
        go('one at a time', ['kd', 'diffkd'], 1, 'here')
        go('processes', list(q.variants.values()), a.jobs, 'process')
        go('streams', list(q.variants.values()), a.jobs, 'streams')


if __name__ == '__main__': main()
