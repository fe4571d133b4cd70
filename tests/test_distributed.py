"Two processes on the CPU (gloo), through the real callback, fastai's distrib_ctx and torchrun"
import atexit, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from torch import nn
from fastai.vision.all import Callback, DataLoaders, Learner, SGD, set_seed
from diffkd_nb.callback import DiffKDCallback
from diffkd_nb.experiment import process_rank, run, verify, world_size
from diffkd_nb.recipes import get_recipe
import workers

pytest.importorskip('accelerate')
from diffkd_nb.distributed import ShardDL, join
ALONE = dict.fromkeys(('RANK', 'WORLD_SIZE', 'LOCAL_RANK'))
MAIN = 'diffkd_nb.commands:train_main'


def torchrun(n, target, *args):
    "`n` processes of one job: exit status and all that they wrote"
    done = workers.finished(workers.start_torchrun(n, target, *args, env=ALONE))
    return done.returncode, done.stdout


def train(n, *args): return torchrun(n, workers.run_command, MAIN, [str(a) for a in args])


def program(n, *args):
    "The same by the program torchrun and its own Pythons, which are told to train"
    env = {k: v for k,v in os.environ.items() if k not in ALONE}
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), '-m', 'diffkd_nb.commands', 'train', *map(str, args)]
    return subprocess.Popen(cmd, env={**env, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Keep(Callback):
    "BatchNorm with its own averages, so that a sample's loss does not depend on the others; gradients as the optimiser sees them"
    order = 7
    def before_fit(self): self.grads = []
    def before_batch(self):
        if self.training:
            for m in self.learn.distill.distiller.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    def before_step(self):
        p = {**{'student.' + n.removeprefix('module.'): p.grad.clone() for n,p in self.model.named_parameters()},
             **{'distiller.' + n: p.grad.clone() for n,p in self.learn.distill.distiller.named_parameters() if p.grad is not None}}
        self.grads.append(p)


def learner(out, kind, steps):
    "A Learner in one of several processes; what it had and what it came to goes into files"
    rank, world = process_rank(), world_size()
    atexit.register(lambda: open(f'{out}/{kind}-{world}-{rank}.exit', 'w').write(str(torch.distributed.is_initialized())))     # runs after all that is registered later
    set_seed(0)
    net = lambda c: nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), nn.ReLU(), nn.Conv2d(c, 2*c, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*c, 5))
    teacher, student = net(8), net(4)
    x, y = torch.randn(16*steps, 3, 16, 16), torch.randint(0, 5, (16*steps,))
    b = 16//world
    data = list(zip(x, y))
    dls = DataLoaders.from_dsets(data, data[:16], bs=b, shuffle=False, drop_last=True, device='cpu', num_workers=0)
    cb = DiffKDCallback(teacher, seed=3 + (rank if kind == 'seeds' else 0), verbose=False, latent=8, inputs=x[:2] if kind == 'seeds' else None)
    learn = Learner(dls, student, lr=.05, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, cbs=[cb, Keep()])
    learn.distill = cb
    if kind == 'seeds':                     # the processes begin with different distillers and different noise
        with torch.no_grad():
            for p in cb.distiller.parameters(): p.add_(rank)
    ctx = learn.no_bar()
    if world > 1:
        join('cpu')
        if kind == 'grads': learn.dls.loaders = [ShardDL(dl) for dl in learn.dls.loaders]      # otherwise fastai's own DistributedDL
        ctx = learn.distrib_ctx(sync_bn=False, cpu=True)
    with ctx, learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert isinstance(learn.model, nn.Sequential) and not any(m._forward_hooks for m in learn.model.modules())
    torch.save(dict(grads=learn.keep.grads, student=learn.model.state_dict(), distiller=cb.distiller.state_dict(), means=cb.means), f'{out}/{kind}-{world}-{rank}.pt')


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('learner')


def test_two_processes_with_half_the_batch_each_give_the_gradients_of_one(folder):
    for n in (1, 2):
        rc, out = torchrun(n, learner, folder, 'grads', 1)
        assert rc == 0, out[-2000:]
    one, parts = torch.load(folder/'grads-1-0.pt'), [torch.load(folder/f'grads-2-{r}.pt') for r in (0, 1)]
    (g1,), (ga,), (gb,) = one['grads'], *[p['grads'] for p in parts]
    assert set(g1) == set(ga) == set(gb) and any(k.startswith('distiller') for k in g1)
    for k in g1:
        torch.testing.assert_close(ga[k], g1[k], rtol=1e-4, atol=1e-6, msg=lambda m: f'{k}: {m}')
        assert torch.equal(ga[k], gb[k]), k
        assert ga[k].abs().max() > 0 or g1[k].abs().max() == 0, k
    for k,v in one['means'].items(): assert parts[0]['means'][k] == pytest.approx(v, rel=1e-5) and parts[1]['means'][k] == pytest.approx(v, rel=1e-5)


def test_processes_that_begin_apart_end_together(folder):
    # fastai's own DistributedDL, other distillers and seeds in each process
    rc, out = torchrun(2, learner, folder, 'seeds', 3)
    assert rc == 0, out[-2000:]
    a, b = (torch.load(folder/f'seeds-2-{r}.pt') for r in (0, 1))
    for part in ('student', 'distiller'):
        for k in a[part]:
            if 'running' in k or 'num_batches' in k: continue       # each process's own, until the next epoch takes rank 0's
            assert torch.equal(a[part][k], b[part][k]), (part, k)
    assert a['means'] == b['means'] and len(a['grads']) == 3
    assert [(folder/f'seeds-2-{r}.exit').read_text() for r in (0, 1)] == ['False', 'False']     # gloo's threads ended before Python did


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    d = tmp_path_factory.mktemp('jobs')
    run(get_recipe('tiny').replace(epochs=2), 'digits', None, 'small:8', 'alone', 0, d/'teacher', progress=False)
    args = ['--data', 'digits', '--recipe', 'tiny', '--epochs', '4', '--batch-size', '64', '--student', 'small:4',
            '--teacher', f"small:8@{d/'teacher'/'student.safetensors'}", '--method', 'diffkd', '--device', 'cpu', '--out']
    rc, out = train(2, *args, d/'whole')
    assert rc == 0, out[-2000:]
    return d, args, out


def test_rank_0_alone_writes_and_speaks(job):
    d, args, out = job
    assert out.count('in the last epoch') == 1 and out.count('small:4, diffkd, seed 0: ') == 1
    assert sorted(f.name for f in (d/'whole').iterdir()) == ['log.csv', 'manifest.json', 'student.safetensors']
    m = json.loads((d/'whole'/'manifest.json').read_text())
    assert m['cost']['processes'] == [2] and m['cost']['steps_per_epoch'] == 15
    report = verify(d/'whole')                  # the accuracy of all 797 validation images, an odd number, evaluated by one process
    assert report and not [c for c in report if c.ok is False], str(report)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_which_goes_on_later(job):
    d, args, _ = job
    p = program(2, *args, d/'killed')
    kept = d/'killed'/'checkpoint.pt'      # written after the epoch's line in the log
    end = time.time() + 200
    while not kept.is_file() and p.poll() is None and time.time() < end: time.sleep(.02)
    ranks = [int(pid) for pid in subprocess.run(['pgrep', '-P', str(p.pid)], capture_output=True, text=True).stdout.split()]
    victim = next(r for r in ranks if 'RANK=1' in Path(f'/proc/{r}/environ').read_text().split('\0'))
    os.kill(victim, signal.SIGKILL)
    out, _ = p.communicate(timeout=120)
    assert p.returncode and not (d/'killed'/'manifest.json').exists(), out[-2000:]
    assert 'exitcode: -9' in out or 'lost the others' in out and 'goes on from there' in out, out[-3000:]
    shutil.copytree(d/'killed', d/'other')
    rc, out = train(2, *args, d/'killed')
    assert rc == 0, out[-2000:]
    for f in ('student.safetensors', 'log.csv'): assert (d/'killed'/f).read_bytes() == (d/'whole'/f).read_bytes(), f
    assert json.loads((d/'killed'/'manifest.json').read_text())['cost']['resumed_at_epoch'] >= 1
    # and in another number of processes, which is said
    rc, out = train(1, *args, d/'other')
    assert rc == 0 and 'begun with 2 processes, goes on with 1' in out and 'not bit for bit' in out, out[-2000:]
    m = json.loads((d/'other'/'manifest.json').read_text())
    assert m['cost']['processes'] == [2, 1]
    acc = lambda where: [float(r.split(',')[header.index('accuracy')]) for r in (d/where/'log.csv').read_text().splitlines()[1:]]
    header = (d/'whole'/'log.csv').read_text().splitlines()[0].split(',')
    assert acc('other')[:1] == acc('whole')[:1] and len(acc('other')) == 4


@pytest.mark.slow
def test_mistakes_are_told_once(job):
    d, args, _ = job
    rc, out = train(3, *args, d/'three')
    assert rc and out.count('cannot be divided among 3 processes') == 1 and 'InputError' not in out, out[-2000:]
    assert not (d/'three').exists()
    bad = [a if a != 'diffkd' else 'crd' for a in args]
    rc, out = train(2, *bad, d/'crd')
    assert rc and out.count('train in one process') == 1, out[-2000:]
    (d/'other settings').mkdir(); (d/'other settings'/'manifest.json').write_text((d/'teacher'/'manifest.json').read_text())
    rc, out = train(2, *args, d/'other settings')
    assert rc and out.count('holds a run of other settings') == 1, out[-2000:]


@pytest.mark.slow
def test_one_process_of_torchrun_is_one_process(job):
    d, args, _ = job
    rc, _ = train(1, *args, d/'one')
    assert rc == 0
    plain = workers.command(MAIN, *args, d/'plain', env=ALONE)
    assert plain.returncode == 0, plain.stderr[-500:]
    assert (d/'one'/'student.safetensors').read_bytes() == (d/'plain'/'student.safetensors').read_bytes()
