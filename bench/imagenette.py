"""Table 2 in small: the paper's two pairs of the baseline strategy on Imagenette (ten classes of ImageNet) at 128 pixels.

    python bench/imagenette.py --data 'folder:imagenette128?size=128' [--epochs 100] [--seeds 3] [--minutes N] [--out results/imagenette]

Teachers (ResNet-34, ResNet-50) are trained first, alone, by recipe B1 over the same epochs; then every method on every pair with every seed.
`--teacher NAME@FILE STUDENT` takes a trained one instead, such as MobileNetV1 trained on ImageNet, of whose classes the ten are kept.
`--recipe B2` takes the stronger strategy, of table 3. Fewer images want smaller batches: the rate goes down with the batch, and an average of the
weights remembers the same share of the training. Call it again to go on; what is finished is not run again.
"""
import argparse, time, warnings
from pathlib import Path
import torch
from diffkd_nb.data import open_data
from diffkd_nb.experiment import compare, run
from diffkd_nb.recipes import get_recipe

PAIRS = [('torchvision:resnet34', 'torchvision:resnet18'), ('torchvision:resnet50', 'mobilenetv1')]
METHODS = ['alone', 'kd', 'dist', 'diffkd']


def in_small(recipe, epochs, batch, images):
    "The recipe over fewer epochs of fewer images: the rate in proportion to the batch, the memory of the average in proportion to the steps"
    shrink = recipe.epochs*(1_281_167//recipe.batch_size)/(epochs*(images//batch))
    return recipe.scaled(epochs).replace(batch_size=batch, lr=recipe.lr*batch/recipe.batch_size, ema=recipe.ema and round(max(0., 1 - (1 - recipe.ema)*shrink), 4))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True); p.add_argument('--out', type=Path, default=Path('results/imagenette')); p.add_argument('--epochs', type=int, default=100)
    p.add_argument('--batch', type=int, default=64); p.add_argument('--seeds', type=int, default=3); p.add_argument('--minutes', type=float)
    p.add_argument('--teacher', nargs=2, metavar=('TEACHER', 'STUDENT'), help='a trained teacher and a student, in place of the two pairs'); p.add_argument('--teacher-stats')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--workers', type=int, default=2); p.add_argument('--jobs', type=int, default=1)
    p.add_argument('--methods', nargs='+', default=METHODS); p.add_argument('--recipe', default='B1')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    end = time.monotonic() + 60*a.minutes if a.minutes else None
    gpu = dict(amp='bf16', graph=True) if a.device.startswith('cuda') else {}
    common = dict(device=a.device, channels_last=True, num_workers=a.workers, **gpu)
    pairs, data = [tuple(a.teacher)] if a.teacher else [], open_data(a.data)
    recipe = in_small(get_recipe(a.recipe), a.epochs, a.batch, data.n_train)
    if not a.teacher:
        for t,s in PAIRS:
            out = a.out/'teachers'/t.partition(':')[2]
            if not (out/'manifest.json').is_file() and end and end - time.monotonic() < 60: print(f'no time for teacher {t}'); return 1
            m = run(recipe, data, None, t, 'alone', 0, out, progress=False, **common)       # a teacher is one uninterrupted piece; its checkpoints let it go on
            print(f"teacher {t}: {100*m['result']['accuracy']:.2f} % in the last epoch", flush=True)
            pairs.append((f'{t}@{out}/student.safetensors', s))
    left = None if end is None else max(0., (end - time.monotonic())/60)
    c = compare(pairs, a.methods, a.seeds, recipe, a.data, a.out/'grid', jobs=a.jobs, minutes=left, progress=False, keep_student=False,
                **({'teacher_stats': a.teacher_stats} if a.teacher_stats else {}), **common)
    print(c.markdown())
    missing = [x for x in c.grid['cells'] if x not in c.manifests]
    print(f"{len(c.grid['cells']) - len(missing)} of {len(c.grid['cells'])} runs are finished")
    return 1 if missing or c.failed else 0


if __name__ == '__main__': raise SystemExit(main())
