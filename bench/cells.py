"""Run the cells of notebooks one after the other, those marked cuda too, without Jupyter.

    python bench/cells.py nbs/09_callback.ipynb nbs/21_fast.ipynb --flags cuda

Cells with a flag of `tst_flags` in pyproject.toml are left out unless it is named. What is printed is that of the cells.
"""
import argparse, json, os, re, sys
from pathlib import Path
import matplotlib
matplotlib.use('Agg')

HOME = Path(__file__).resolve().parents[1]


def flags(source):
    "Words after #| at the top of a cell"
    return {w.rstrip(':') for line in re.findall(r'^#\s*\|(.*)$', source, re.M) for w in line.split()}


def cells(path, wanted):
    "Sources of the cells to run"
    known = set(re.search(r'^tst_flags = "(.*)"', (HOME/'pyproject.toml').read_text(), re.M)[1].split())
    for c in json.loads(path.read_text())['cells']:
        s = ''.join(c['source'])
        if c['cell_type'] == 'code' and not flags(s) & (known - wanted) and not re.search(r'^#\s*\|\s*eval:\s*false', s, re.M): yield s


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='+', type=Path); p.add_argument('--flags', nargs='*', default=[]); p.add_argument('--out', type=Path, help='what ran, one notebook a line')
    a = p.parse_args()
    sys.path.insert(0, str(HOME))
    notebooks, out, done = [n.resolve() for n in a.notebooks], a.out and a.out.resolve(), []
    for path in notebooks:
        os.chdir(path.parent)
        space, n = {'__name__': '__main__', 'display': print, 'get_ipython': lambda: None}, 0
        for s in cells(path, set(a.flags)):
            n += 1
            try: exec(compile(re.sub(r'^[%!].*$', '', s, flags=re.M), f'{path.name}, cell {n}', 'exec'), space)
            except Exception: print(s, file=sys.stderr); raise
        done.append(f'{path.name}, flags: {" ".join(a.flags) or "none"}, {n} cells')
        print(done[-1], flush=True)
    if out: out.write_text('\n'.join(done) + '\n')


if __name__ == '__main__': main()
