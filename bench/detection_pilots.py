"""What was tried before the question about boxes: average precision of the last epoch, in percent.

    python bench/detection_pilots.py RUN [RUN ...] [--out results/bench/detection_pilots.json]

Each RUN is a finished folder of `diffkd_train` on BCCD. The row says on which pictures it was read, and what its losses were in the last
epoch: that of the task, and what the smoothed total has beyond it, which is the weighted one of the method.
"""
import argparse, json, re
from pathlib import Path
import pandas as pd
from diffkd_nb.files import InputError, write_whole

HERE = Path(__file__).parents[1]


def row(folder):
    "What was trained, for how long, and what came out"
    m, log = json.loads((folder/'manifest.json').read_text()), pd.read_csv(folder/'log.csv').iloc[-1]
    s, r = m['settings'], m['settings']['recipe']
    if m['status'] != 'finished': raise InputError(f"{folder} is unfinished: expected a finished run. [help: run-folder]")
    task = log.get('task', log.train_loss)
    return dict(model=re.sub(r'&weights=[^&]*/', '&weights=', s['student']), method=s['method'], epochs=r['epochs'], rate=r['lr'],
                seed=s['seed'], precision=s['precision'], pictures='test' if 'valid=test' in m['data']['spec'] else 'validation',
                AP=round(100*m['result']['map'], 2), AP50=round(100*m['result']['map50'], 2), task=round(float(task), 3),
                distilled=round(float(log.train_loss - task), 2), minutes=round(m['cost']['seconds']/60, 1),
                processor=m['environment']['cpu'], commit=m['code']['commit'][:7], hash=m['hash'])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', type=Path); p.add_argument('--out', type=Path, default=HERE/'results/bench/detection_pilots.json')
    a = p.parse_args()
    write_whole(a.out, json.dumps([row(f) for f in a.runs], indent=1) + '\n')


if __name__ == '__main__': main()
