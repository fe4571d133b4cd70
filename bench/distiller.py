"""Forward + backward time of one DiffKD tap, ours against the released module, in one process, alternating.

    python bench/distiller.py --released CHECKOUT/lib/models/losses

CHECKOUT is a copy of the authors' repository, hunto/image_classification_sota. Without --released only our own times are
printed. Both sides do the same work on the same weights: gradients set to zero in place, as fastai's optimisers do, forward,
the sum of the losses, backward to the parameters and to the student's feature. Losses are compared first, on the same draws.
"""
import argparse, copy, importlib, json, platform, statistics, sys, time
from pathlib import Path
import torch
from torch.nn import functional as F
from diffkd_nb.diffkd import DiffKD
from diffkd_nb.released import from_released


def make(kind, released):
    "Our module and, where there is one, the released module with the same weights"
    if released is None: return (DiffKD(512, 512, latent=1024) if kind == 'feature' else DiffKD(1000, 1000, 'logits')), None
    rel = released(512, 512, kernel_size=3, use_ae=True, ae_channels=1024) if kind == 'feature' else released(1000, 1000, kernel_size=1)
    return from_released(rel.state_dict()), rel


def losses_ours(m, s, t):
    o = m(s, t)
    return o.kd_loss + o.diffusion_loss + o.reconstruction_loss


def losses_released(m, s, t):
    denoised, latent, diffusion, reconstruction = m(s, t)
    if reconstruction is not None: return F.mse_loss(denoised, latent) + diffusion + reconstruction
    return F.kl_div(denoised.flatten(1).log_softmax(1), latent.flatten(1).softmax(1), reduction='batchmean') + diffusion


def step(m, f, s, t, sync):
    "Seconds of one step"
    for p in m.parameters():
        if p.grad is not None: p.grad.zero_()
    if s.grad is not None: s.grad.zero_()
    sync(); start = time.perf_counter()
    f(m, s, t).backward()
    sync(); return time.perf_counter() - start


def measure(kind, batch, size, a, released):
    "One row: medians of the times and of the round-by-round ratios"
    torch.manual_seed(0); torch._dynamo.reset()
    ours, rel = make(kind, released)
    shape = (size, size) if kind == 'feature' else (1, 1)
    s, t = (torch.randn(batch, 512 if kind == 'feature' else 1000, *shape, device=a.device) for _ in range(2))
    s.requires_grad_()
    sides = {'ours': (ours.to(a.device), losses_ours)}
    if a.compile: fast = copy.deepcopy(ours); fast.compile(fullgraph=True); sides['compiled'] = (fast.to(a.device), losses_ours)
    if rel is not None:
        sides['released'] = (rel.to(a.device), losses_released)
        torch.manual_seed(1); want = losses_released(copy.deepcopy(rel), s, t).item()
        torch.manual_seed(1); got = losses_ours(copy.deepcopy(ours), s, t).item()
        assert abs(got - want) < 1e-4*abs(want), f'losses differ: {got} and {want}'
    sync = torch.cuda.synchronize if a.device.startswith('cuda') else (lambda: None)
    for m,f in sides.values():
        for _ in range(3): step(m, f, s, t, sync)
    times = {k: [] for k in sides}
    for _ in range(a.rounds):
        for k,(m,f) in sides.items(): times[k].append(step(m, f, s, t, sync))
    row = {'tap': f'{kind} {size}x{size}' if kind == 'feature' else kind, 'batch': batch, **{f'{k}_ms': round(1e3*statistics.median(v), 2) for k,v in times.items()}}
    if rel is not None:
        for k in sides:
            if k != 'released': row[f'{k}/released'] = round(statistics.median(x/y for x,y in zip(times[k], times['released'])), 3)
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--released', type=Path, help='folder that holds the released package `diffkd` (lib/models/losses of the repository)')
    p.add_argument('--batches', type=int, nargs='+', default=[16, 128])
    p.add_argument('--maps', type=int, nargs='+', default=[7], help='side of the feature maps')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--compile', action='store_true', help='also measure our module compiled with fullgraph=True')
    p.add_argument('--device', default='cpu')
    p.add_argument('--out', type=Path, help='JSON file for the figures')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    released = None
    if a.released:
        if not (a.released/'diffkd'/'diffkd.py').is_file(): p.error(f'{a.released} has no diffkd/diffkd.py: name the folder lib/models/losses of hunto/image_classification_sota')
        sys.path.insert(0, str(a.released)); released = importlib.import_module('diffkd.diffkd').DiffKD
    rows = []
    for kind,size in [('logits', 1), *(('feature', m) for m in a.maps)]:
        for batch in a.batches:
            rows.append(measure(kind, batch, size, a, released))
            print('  '.join(f'{k} {v}' for k,v in rows[-1].items()), flush=True)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps({'rows': rows, 'torch': torch.__version__, 'python': platform.python_version(), 'device': torch.cuda.get_device_name() if a.device.startswith('cuda')
            else next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.machine()) if Path('/proc/cpuinfo').exists() else platform.machine(),
            'threads': a.threads, 'rounds': a.rounds}, indent=1))


if __name__ == '__main__': main()
