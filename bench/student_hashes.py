"""Whether two versions of the code train the same students, bit for bit.

    python bench/student_hashes.py --against COMMIT     run the list below on both, compare; exit status 1 if a student differs
    python bench/student_hashes.py                      print the hashes of this version

Hashes depend on the processor, so both versions run here, on one thread, on data made from seeds.
Each row is a short run of `run` with the channels first, as older versions had them; the last ones are killed after their first checkpoint and taken up again.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ['alone', 'kd', 'dkd', 'diffkd', 'diffkd:latent=16', 'diffkd:start=gamma,norms=separate', 'crd', 'kd+diffkd', 'kd+crd']
IMAGES = ['alone', 'diffkd', 'reviewkd', 'srrl', 'ofa']
RESUMED = ['diffkd', 'crd']


def images(folder):
    """Write two classes of small pictures made from a seed."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for c in ('dark', 'light'):
        (folder / c).mkdir(parents=True, exist_ok=True)
        for i in range(40):
            x = rng.integers(0, 160, (20, 20, 3)) + (90 if c == 'light' else 0)
            Image.fromarray(x.astype(np.uint8)).save(folder / c / f'{i:02}.png')
    return f'arrays:{folder}?size=16'


def teacher(folder, student, classes, channels, size):
    """Write the random weights of a teacher."""
    import torch
    from safetensors.torch import save_file
    from diffkd_nb.models import make_model
    torch.manual_seed(0)
    f = folder / f'{student.replace(":", "_")}-{channels}.safetensors'
    model = make_model(student, classes, channels, size)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, f)
    return f'{student}@{f}'


def train(job):
    """Train one student in this process and return its hash."""
    import torch
    from diffkd_nb.experiment import run
    from diffkd_nb.recipes import get_recipe
    torch.set_num_threads(1)
    recipe = get_recipe('tiny').replace(**{k: tuple(v) if isinstance(v, list) else v for k, v in job['recipe'].items()})
    m = run(recipe, job['data'], job['teacher'], job['student'], job['method'], 3, job['out'], channels_last=False, progress=False)
    return m['student_hash']


def killed(job, env):
    """Kill the run after its first checkpoint, then finish it."""
    p = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--job', json.dumps(job)], env=env, stdout=subprocess.DEVNULL)
    while not (Path(job['out']) / 'checkpoint.pt').is_file():
        assert p.poll() is None, 'the run ended before it could be killed'
        time.sleep(.005)
    p.send_signal(signal.SIGKILL)
    p.wait()
    value = train(job)
    assert json.loads((Path(job['out']) / 'manifest.json').read_text())['cost']['resumed_at_epoch']
    return value


def hashes(folder):
    """Train every row and return row to hash."""
    import warnings
    warnings.filterwarnings('ignore')
    data = images(folder / 'images')
    t8, t16 = teacher(folder, 'small:8', 10, 1, 8), teacher(folder, 'small:8', 2, 3, 16)
    found = {}

    def job(where, method, **recipe):
        d = dict(data='digits', teacher=t8) if where == 'digits' else dict(data=data, teacher=t16)
        out = str(folder / f'{where}-{len(found)}')
        return dict(d, student='small:4', method=method, out=out, recipe={'epochs': 2, **recipe})
    for m in DIGITS:
        found[f'digits, {m}'] = train(job('digits', m))
    for m in IMAGES:
        found[f'images, {m}'] = train(job('images', m, augmentation=('crop', 'flip'), ema=.9, batch_size=8))
    for m in RESUMED:
        found[f'digits, {m}, killed'] = killed(job('digits', m, epochs=40), {**os.environ, 'OMP_NUM_THREADS': '1'})
    return found


def of_version(root):
    """Run this file with the package that lies in `root`."""
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-W', 'ignore', __file__], env=env, cwd=root, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f'the runs failed with the code in {root}')
    return json.loads(done.stdout[done.stdout.index('{'):])        # after what progress bars leave


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--against', metavar='COMMIT', help='another version of the code')
    p.add_argument('--job', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.job:
        print(train(json.loads(a.job)))
    elif a.against:
        with tempfile.TemporaryDirectory() as tmp:
            subprocess.run(['git', '-C', ROOT, 'worktree', 'add', '--detach', tmp + '/code', a.against], check=True, capture_output=True)
            try:
                old = of_version(Path(tmp) / 'code')
            finally:
                subprocess.run(['git', '-C', ROOT, 'worktree', 'remove', '--force', tmp + '/code'], check=True)
        new = of_version(ROOT)
        for k, v in new.items():
            print(f'{"same" if old[k] == v else "OTHER":6} {v[:16]}  {k}')
        sys.exit(any(old[k] != v for k, v in new.items()))
    else:
        with tempfile.TemporaryDirectory() as tmp:
            print(json.dumps(hashes(Path(tmp)), indent=1))


if __name__ == '__main__':
    main()
