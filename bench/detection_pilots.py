"""What the pilots of detection found on the validation pictures: average precision of the last epoch, in percent.

    python bench/detection_pilots.py RUN [RUN ...] [--out results/bench/detection_pilots.json]

Each RUN is a finished folder of `diffkd_train --method alone` on the training pictures of BCCD, not on its test pictures.
"""
import argparse, json, re
from pathlib import Path
from diffkd_nb.files import InputError, write_whole

HERE = Path(__file__).parents[1]


def row(folder):
    "What was trained, for how long, and what came out"
    m = json.loads((folder/'manifest.json').read_text())
    s, r = m['settings'], m['settings']['recipe']
    if m['status'] != 'finished' or 'valid=test' in m['data']['spec']:
        raise InputError(f"{folder} is unfinished or was read on test pictures: expected a finished pilot. [help: run-folder]")
    return dict(model=re.sub(r'&weights=[^&]*/', '&weights=', s['student']), epochs=r['epochs'], rate=r['lr'], seed=s['seed'],
                precision=s['precision'], AP=round(100*m['result']['map'], 2), AP50=round(100*m['result']['map50'], 2),
                minutes=round(m['cost']['seconds']/60, 1), processor=m['environment']['cpu'], commit=m['code']['commit'][:7],
                hash=m['hash'])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('runs', nargs='+', type=Path); p.add_argument('--out', type=Path, default=HERE/'results/bench/detection_pilots.json')
    a = p.parse_args()
    write_whole(a.out, json.dumps([row(f) for f in a.runs], indent=1) + '\n')


if __name__ == '__main__': main()
