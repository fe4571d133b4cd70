"""Write diffkd_nb/measured.csv, what our stored runs and benches say of each method, for the installed package.

    python tools/measured.py            write it
    python tools/measured.py --check    exit with 1 if it is not what would be written
"""
import argparse, io, json, sys
from pathlib import Path
import pandas as pd
from diffkd_nb.files import write_whole
from diffkd_nb.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
STORED = {'fitnet': 'fitnet:weight=1'}      # the comparison ran FitNet with two weights; this one is the default


def measured() -> str:
    "The text of the file"
    bench = json.loads((ROOT/'results/bench/methods_cpu.json').read_text())['rows']
    runs = pd.read_csv(ROOT/'results/cifar100_resnet8/table.csv').set_index('method')
    rows = {m: dict(step=bench.get(m, {}).get('to_alone'), **runs[['accuracy', 'difference', 'n']].reindex([STORED.get(m, m)]).iloc[0]) for m in METHODS}
    found = pd.DataFrame.from_dict(rows, orient='index').rename_axis('method').dropna(how='all')
    found['n'] = found.n.astype('Int64')
    out = io.StringIO(); found.to_csv(out, float_format='%.2f', lineterminator='\n')
    return out.getvalue()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true')
    a, path = p.parse_args(), ROOT/'diffkd_nb'/'measured.csv'
    if a.check: sys.exit(path.read_text() != measured() and f'{path} is not what the stored results say: run tools/measured.py')
    write_whole(path, measured())


if __name__ == '__main__': main()
