"""Write diffkd_nb/measured.csv, what our stored runs and benches say of each method, for the installed package.

    python tools/measured.py            write it
    python tools/measured.py --check    exit with 1 if it is not what would be written
"""
import argparse, io, json, sys
from pathlib import Path
import pandas as pd
from diffkd_nb.files import write_whole
from diffkd_nb.methods import METHODS
from diffkd_nb.study import get_question

ROOT = Path(__file__).resolve().parent.parent
STORED = {'fitnet': 'fitnet:weight=1'}      # the comparison ran FitNet with two weights; this one is the default


def on_pictures() -> pd.Series:
    "Mean accuracy in the first comparison, by method"
    runs = pd.read_csv(ROOT/'results/cifar100_resnet8/table.csv').set_index('method').accuracy
    return pd.Series({m: runs.get(STORED.get(m, m)) for m in ('alone', *METHODS)}, dtype=float)


def of_question(key: str) -> pd.Series:
    "Mean accuracy in a question of the study, by method; none for a method whose seeds are not all there"
    q = get_question(key); runs = q.variants_table(ROOT/'results/study'/q.key)
    of = {text: runs.accuracy[name] for name,text in q.variants.items() if runs.n[name] == len(q.seeds)}
    return pd.Series({m: of.get(m) for m in ('alone', *METHODS)}, dtype=float)


def measured() -> str:
    "The text of the file"
    bench = json.loads((ROOT/'results/bench/methods_cpu.json').read_text())['rows']
    found = pd.DataFrame(dict(step={m: bench.get(m, {}).get('to_alone') for m in METHODS}), dtype=float)
    places = {'pictures': on_pictures(), '12 epochs': of_question('methods-maps'), 'sentences': of_question('methods-text')}
    for where,means in places.items():
        found[where], found[f'{where} gain'] = means, means - means.alone
    out = io.StringIO()
    found.rename_axis('method').dropna(how='all').to_csv(out, float_format='%.2f', lineterminator='\n')
    return out.getvalue()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true')
    a, path = p.parse_args(), ROOT/'diffkd_nb'/'measured.csv'
    if a.check: sys.exit(path.read_text() != measured() and f'{path} is not what the stored results say: run tools/measured.py')
    write_whole(path, measured())


if __name__ == '__main__': main()
