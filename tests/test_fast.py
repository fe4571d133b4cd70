"""A recorded step against plain steps: results, what cannot be recorded, and what a fit leaves behind."""
import csv, pickle, threading, warnings
from copy import deepcopy
from functools import cache, partial
import pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.basics import Callback, DataLoaders, Learner, OptimWrapper, set_seed, SGD
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
import fastai.callback.progress
from diffkd_nb.callback import DistillCallback, distillation
from diffkd_nb.data import ImageArrays, Renormalise, STATS, digits_data, make_dls
from diffkd_nb.diagnostics import DenoisingDiagnostics
from diffkd_nb.experiment import run, verify
from diffkd_nb.files import InputError
from diffkd_nb.fast import CudaGraphStep, CudaRecording
from diffkd_nb.models import make_model
from diffkd_nb.recipes import EMACallback, get_recipe
from tape import CannotRecord, Tape, TapeRecording

DIGITS = digits_data()
OPTS = dict(sgd=partial(torch.optim.SGD, momentum=.9, weight_decay=5e-4),
            nesterov=partial(torch.optim.SGD, momentum=.9, nesterov=True),
            adam=torch.optim.Adam, adamw=partial(torch.optim.AdamW, weight_decay=.05))
SHORT = dict(n=192)         # six steps: three that warm up, one that is recorded, two that are replayed


def teacher(device='cpu'):
    torch.manual_seed(1)
    return make_model('small:8', 10, 1, 8).to(device)


def learner(method='diffkd', opt='sgd', cbs=(), loss=None, n=320, drop_last=True, schedule=True, device='cpu',
            recorded=True, lr=.02, **options):
    if method == 'diffkd': options = dict(steps=2, **options)
    set_seed(0, reproducible=True)
    student = make_model('small:4', 10, 1, 8).to(device)
    dls = make_dls(DIGITS, 32, (), device=device)
    dls.train.n,dls.train.drop_last = n,drop_last
    distil = [DistillCallback(teacher(device), method, verbose=False, **options)] if method else []
    rates = [ParamScheduler({'lr': lambda pos: lr*(1 - pos)})] if schedule else []
    opt_func = opt if callable(opt) else partial(OptimWrapper, opt=OPTS[opt])
    learn = Learner(dls, student, lr=lr, loss_func=loss or CrossEntropyLossFlat(), metrics=accuracy, opt_func=opt_func,
                    cbs=[*distil, *rates, *cbs])
    return learn.add_cb(graph(device)) if recorded else learn


def graph(device='cpu'): return CudaGraphStep(recording=TapeRecording if device == 'cpu' else None, verbose=False)


def one_cycle(learn, epochs=2):
    "Rate and momentum change at every step"
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, .02)
    return learn


def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn


@cache
def plain(method, epochs, **kw): return fit(learner(method, recorded=False, **kw), epochs)


def step_of(learn): return next(cb for cb in learn.cbs if isinstance(cb, CudaGraphStep))
def weights(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}
def lent(learn): return {'_do_one_batch', '_do_epoch_train'} & set(learn.__dict__)


def same(a, b, eps=1e-5, distiller=True):
    pairs = [(a.model, b.model)]
    if distiller and distillation(a) is not None: pairs.append((distillation(a).distiller, distillation(b).distiller))
    for x,y in pairs:
        for k,v in x.state_dict().items():
            assert torch.allclose(v.float(), y.state_dict()[k].float(), rtol=eps, atol=eps), k
    for u,v in zip(a.recorder.values, b.recorder.values): assert list(u) == pytest.approx(list(v), rel=1e-4, abs=1e-4)
    assert a.recorder.lrs == b.recorder.lrs
    assert [float(x) for x in a.recorder.losses] == pytest.approx([float(x) for x in b.recorder.losses], rel=1e-4)


# ---- the recording on the CPU

def test_a_tape_notes_operations_and_undoes_them():
    a, b = torch.ones(3), torch.zeros(3)
    tape = Tape()
    with tape: b.add_(a*2)
    assert [str(op[0]) for op in tape.ops] == ['aten.mul.Tensor', 'aten.add_.Tensor'] and b.tolist() == [2., 2, 2]
    tape.undo()
    assert b.tolist() == [0., 0, 0]


def test_a_tape_replays_on_the_memory_of_then():
    a, b = torch.ones(3), torch.zeros(3)
    r = TapeRecording()
    r.record(lambda: b.add_(a*2).mul_(torch.rand(3).ge(-1).float()))
    r.replay()
    assert b.tolist() == [2., 2, 2]
    a.fill_(5.)
    r.replay()
    assert b.tolist() == [12., 12, 12]


@pytest.mark.parametrize('f,says', [
    (lambda a: a.sum().item(), 'value'), (lambda a: a if a.sum() > 0 else -a, 'value'),
    (lambda a: torch.tensor([1., 2]), 'host'), (lambda a: a[a > 0], 'shape'), (lambda a: a.nonzero(), 'shape')],
    ids=['item', 'if', 'host', 'mask', 'nonzero'])
def test_a_tape_refuses_what_a_graph_refuses_and_leaves_no_trace(f, says):
    a, state = torch.ones(3), torch.get_rng_state()
    def half():
        a.add_(torch.rand(3))
        f(a)
    with pytest.raises(CannotRecord, match=says): TapeRecording().record(half)
    assert a.tolist() == [1., 1, 1] and torch.equal(torch.get_rng_state(), state)


# ---- the same results

FIRST = ('diffkd', 'adamw'), ('kd', 'nesterov'), (None, 'adam'), ('diffkd', torch.optim.SGD), (None, 'sgd')    # of methods and optimisers
def slow_but(pairs): return [p if p in FIRST else pytest.param(*p, marks=pytest.mark.slow) for p in pairs]
name = lambda v: v if isinstance(v, str) else 'no momentum' if v else 'alone'


@pytest.mark.parametrize('method,opt', slow_but((m, o) for m in ('diffkd', 'kd', None) for o in OPTS), ids=name)
def test_recorded_steps_are_plain_ones(method, opt):
    "Fifty steps, twelve for DiffKD, of which the page trains fifty"
    n, rate = 192 if method == 'diffkd' else 800, .02 if opt in ('sgd', 'nesterov') else 1e-3
    a, b = (fit(learner(method, opt, n=n, recorded=r, lr=rate)) for r in (False, True))
    assert len(b.recorder.losses) == n//32*2 and step_of(b).recorded == 1       # one recording serves both epochs
    # Adam divides gradients that vanish, those of biases before a BatchNorm, by numbers as small
    same(a, b, 1e-5 if 'adam' not in opt else 2e-4, distiller='adam' not in opt)


@pytest.mark.parametrize('method,opt', slow_but((m, o) for m in ('diffkd', None) for o in (*OPTS, torch.optim.SGD)), ids=name)
def test_one_cycle_is_recorded(method, opt):
    n, opt = 192 if method else 800, opt if isinstance(opt, str) else partial(OptimWrapper, opt=opt)
    a, b = (one_cycle(learner(method, opt, n=n, recorded=r, schedule=False)) for r in (False, True))
    cb = step_of(b)
    assert len(set(b.recorder.hps['mom'])) > 6 and cb.recorded == 1 and cb.moving and cb.reason is None
    same(a, b, 1e-5 if 'adam' not in str(opt) else 2e-4, distiller='adam' not in str(opt))


def test_a_weight_decay_and_betas_that_change_are_recorded():
    hypers = {'wd': lambda pos: .01*pos, 'mom': lambda pos: .8 + .1*pos, 'sqr_mom': lambda pos: .99 - .1*pos}
    a, b = (fit(learner('kd', 'adamw', recorded=r, lr=1e-3, schedule=False, cbs=[ParamScheduler(hypers)])) for r in (False, True))
    assert step_of(b).moving and step_of(b).recorded == 1
    same(a, b, 2e-4)


def test_a_rate_alone_keeps_the_fused_optimiser():
    assert not step_of(fit(learner('kd', **SHORT), 1)).moving


def test_a_momentum_that_changes_late_is_recorded_again():
    late = {'mom': lambda pos: .9 if pos < .7 else .8}
    a, b = (fit(learner('kd', recorded=r, schedule=False, cbs=[ParamScheduler(late)])) for r in (False, True))
    assert step_of(b).moving and step_of(b).recorded == 2
    same(a, b)


@pytest.mark.parametrize('opt,hypers,says', [
    ('sgd', {'mom': lambda pos: .9 if pos < .5 else 0.}, None),
    ('sgd', {'mom': lambda pos: .9 - pos/10 if pos < .8 else 0.}, 'whether there is a momentum'),
    ('adam', {'eps': lambda pos: 1e-8 + 1e-6*pos}, 'from step to step: eps'),
    (partial(torch.optim.SGD, momentum=.9, dampening=.1), {'mom': lambda pos: .9 - pos/10}, 'has dampening'),
    (partial(torch.optim.Adam, amsgrad=True), {'mom': lambda pos: .9 - pos/10}, 'has amsgrad')],
    ids=['once to 0', 'to 0', 'eps', 'dampening', 'amsgrad'])
def test_hyperparameters_that_cannot_be_read_make_plain_steps(opt, hypers, says, capsys):
    opt = opt if isinstance(opt, str) else partial(OptimWrapper, opt=opt)
    make = lambda r: learner('kd', opt, recorded=r, lr=1e-3, schedule=False, cbs=[ParamScheduler(hypers)])
    a, b = fit(make(False)), make(True)
    step_of(b).verbose = True
    fit(b)
    assert step_of(b).reason is None if says is None else says in step_of(b).reason
    assert capsys.readouterr().out.count('plain steps from here on') == (says is not None)
    same(a, b, 2e-4)


@pytest.mark.parametrize('kw', [
    dict(start='gamma'), dict(task_weight=.5), dict(relative=True), dict(teacher_transform=Renormalise(((.2,), (.9,)), ((0.,), (1.,)))),
    *(pytest.param(kw, marks=pytest.mark.slow) for kw in (
        dict(adapter=False), dict(denoiser='identity'), dict(trained_by='diffusion'), dict(norms='separate'), dict(latent=4),
        dict(logits_loss='dist')))], ids=lambda kw: next(iter(kw)))
def test_options_are_recorded(kw):
    a, b = (fit(learner(recorded=r, **SHORT, **kw), 1) for r in (False, True))
    assert step_of(b).recorded == 1
    same(a, b)


def test_gradient_clipping_is_recorded():
    a, b = (fit(learner('kd', recorded=r, cbs=[GradientClip(.1)])) for r in (False, True))
    assert step_of(b).recorded == 1
    same(a, b)


def test_a_batch_of_another_size_is_plain_and_keeps_the_recording():
    a, b = (fit(learner(n=170, drop_last=False, recorded=r)) for r in (False, True))
    assert len(b.recorder.losses) == 12 and step_of(b).recorded == 1
    same(a, b)


def test_a_distiller_joins_an_optimiser_that_has_a_momentum():
    "Fused SGD takes momenta for all parameters or for none"
    def trained(recorded):
        learn = fit(learner(None, recorded=False, schedule=False, **SHORT), 1)
        learn.add_cb(DistillCallback(teacher(), 'diffkd', verbose=False, steps=2))
        if recorded: learn.add_cb(graph())
        return fit(learn)
    a, b = trained(False), trained(True)
    assert step_of(b).recorded == 1
    same(a, b)


def test_losses_of_earlier_epochs_stay_on_the_host():
    "On a GPU those of the running epoch lie on the device: one tensor cannot hold both"
    class Keep(Callback):
        def before_train(self): self.losses = list(self.learn.recorder.losses)
    learn = fit(learner('kd', cbs=[Keep()]))
    assert len(learn.keep.losses) == 10 and len(learn.recorder.losses) == 20
    assert all(a is b for a,b in zip(learn.keep.losses, learn.recorder.losses))


# ---- what cannot be recorded

def hooked(params, **kw):
    opt = OptimWrapper(params, torch.optim.SGD, **kw)
    opt.opt.register_step_pre_hook(lambda *a: None)
    return opt


class Meddler(Callback):
    order = 20
    def after_loss(self): self.seen = getattr(self, 'seen', 0) + 1


class Neutral(Callback):
    order, recordable = 20, True
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad*1.


@pytest.mark.parametrize('kw,says', [
    (dict(opt=SGD), 'SGD'), (dict(opt=hooked), 'the optimiser has a hook'), (dict(cbs=[GradientAccumulation(64)]), 'gradient_accumulation'),
    (dict(cbs=[MixUp()]), 'mix_up'), (dict(cbs=[EMACallback(.9)]), 'ema'), (dict(method='crd'), 'which samples'),
    (dict(cbs=[Meddler()]), 'meddler acts in after_loss'),
    (dict(method='diffkd', cbs=[DenoisingDiagnostics()]), 'diagnostics look')],
    ids=lambda v: v if isinstance(v, str) else '')
def test_what_cannot_be_recorded_is_plain_and_says_why(kw, says, capsys):
    kw = {'method': 'kd', **SHORT, **kw}
    made = lambda r: learner(**{**kw, 'cbs': deepcopy(kw.get('cbs', []))}, recorded=r)
    a, b = fit(made(False), 1), made(True)
    step_of(b).verbose = True
    fit(b, 1)
    said = capsys.readouterr().out
    assert says in said and said.count('CudaGraphStep') == 1
    assert step_of(b).recorded == 0
    for k,v in weights(a).items(): assert torch.equal(v, b.model.state_dict()[k]), k


def test_a_hook_of_someone_else_keeps_the_steps_plain(capsys):
    learn, seen = learner('kd', **SHORT), []
    handle = learn.model[0].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    step_of(learn).verbose = True
    fit(learn, 1)
    assert "has a hook (on '0')" in capsys.readouterr().out and step_of(learn).recorded == 0 and len(seen) >= 6
    handle.remove(); fit(learn, 1)
    assert step_of(learn).recorded == 1


def test_a_callback_can_declare_itself_recordable():
    assert step_of(fit(learner('kd', cbs=[Neutral()], **SHORT), 1)).recorded == 1


class Faulty(nn.CrossEntropyLoss):
    "A loss with an operation that only the attempt reveals; its value is that of cross entropy"
    def __init__(self, fault): super().__init__(); self.fault = fault
    def forward(self, p, y):
        l = nn.functional.cross_entropy(p, y)
        if self.fault == 'value' and l.item() < 0: return l*0
        if self.fault == 'mask': l = l + 0*p[p > 0].sum()
        if self.fault == 'host': l = l*torch.tensor([1.], device=p.device)[0]
        return l


@pytest.mark.parametrize('fault', ['value', 'mask', 'host'])
@pytest.mark.parametrize('method', ['diffkd', None])
def test_a_step_that_cannot_be_recorded_goes_on_plainly(fault, method):
    "Nothing of the attempt is left in the results"
    b = learner(method, loss=Faulty(fault), schedule=False, **SHORT)
    with pytest.warns(UserWarning, match='cannot be recorded') as w: fit(b, 1)
    assert len([x for x in w if 'cannot be recorded' in str(x.message)]) == 1 and step_of(b).recorded == 0
    same(plain(method, 1, schedule=False, **SHORT), b)


class CpuHalf(MixedPrecision):
    "bf16 on the CPU"
    def __init__(self): super().__init__(AMPMode.BF16)
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16)


class Casts(TorchDispatchMode):
    "Counts the casts to bfloat16"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += str(func).startswith('aten._to_copy') and (kwargs or {}).get('dtype') == torch.bfloat16
        return func(*args, **(kwargs or {}))


class CastsOfBatch(Callback):
    order = -90
    def __init__(self, casts): self.casts,self.seen = casts,[]
    def before_batch(self): self.casts.n = 0
    def after_batch(self):
        if self.training: self.seen.append(self.casts.n)


@pytest.mark.parametrize('fault', ['value', None])
def test_casts_that_a_broken_recording_noted_are_made_again(fault):
    "Autocast keeps the casts of weights, and in a CUDA graph those of a broken recording were never made"
    class Attempt(TapeRecording):
        def record(self, step):
            try: super().record(step)
            finally: casts.n = 0
    with Casts() as casts, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = learner(None, loss=Faulty(fault), schedule=False, recorded=False, cbs=[CpuHalf(), CastsOfBatch(casts)], **SHORT)
        learn.add_cb(CudaGraphStep(recording=Attempt, verbose=False))
        fit(learn, 1)
    seen = learn.casts_of_batch.seen
    assert step_of(learn).recorded == (fault is None) and seen[0] > 3
    assert seen == [seen[0]]*6 if fault else seen[:3] == [seen[0]]*3


@pytest.mark.parametrize('what', [KeyboardInterrupt, RuntimeError])
def test_an_end_by_force_inside_a_recording(what):
    "An interrupt ends the fit, an error is a reason for plain steps; weights are those of before"
    class Stop(Callback):
        order, recordable, n = 80, True, 0
        def after_pred(self):
            if self.training: self.n += 1
            if self.n == 4: self.n += 1; self.was = weights(self.learn); raise what('now')
    learn = learner('kd', cbs=[Stop()], **SHORT)
    if what is KeyboardInterrupt:
        with pytest.raises(what): fit(learn, 1)
        for k,v in learn.stop.was.items(): assert torch.equal(v, learn.model.state_dict()[k]) or 'running' in k or 'num_batches' in k
        assert not lent(learn) and all(p.grad is None for p in learn.model.parameters())
    else:
        with pytest.warns(UserWarning, match='now'): fit(learn, 1)
    fit(learn, 1)
    assert step_of(learn).recorded == 1


# ---- what a fit leaves behind

def test_recorded_again_when_layers_freeze_and_kept_when_weights_change():
    learn = learner('kd', schedule=False, **SHORT)
    fit(learn, 1); assert step_of(learn).recorded == 1
    fit(learn, 1); n = step_of(learn).recorded
    learn.freeze(); fit(learn, 1); assert step_of(learn).recorded == n + 1
    learn.unfreeze(); fit(learn, 1); n = step_of(learn).recorded
    half = {k: v*.5 if v.is_floating_point() else v for k,v in weights(learn).items()}
    learn.model.load_state_dict(half); fit(learn, 1)        # same memory, new values
    assert step_of(learn).recorded == n and all(v.isfinite().all() for v in weights(learn).values())


@pytest.mark.parametrize('what', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('when', ['before_batch', 'after_batch', 'after_pred'])
def test_an_end_by_force_leaves_the_learner_as_it_was(what, when):
    class Stop(Callback):
        order, recordable = 80, True
        def __init__(self): self.n = 0
    def act(self):
        self.n += 1
        if self.n == 3: raise what('now')
    setattr(Stop, when, act)
    learn = learner('kd', cbs=[Stop()], **SHORT)
    with pytest.raises(what): fit(learn)
    learn.remove_cb(Stop)
    with learn.no_bar(): learn.validate()
    assert not lent(learn) and not step_of(learn).active
    fit(learn, 1)
    assert type(learn.recorder.smooth_loss).__name__ == 'AvgSmoothLoss'
    assert learn.opt.hypers[-1]['lr'] == pytest.approx(float(learn.recorder.lrs[-1]))


def test_nothing_is_left_after_a_fit_and_copies_work(tmp_path):
    learn = fit(learner(schedule=False, **SHORT), 1)
    assert not lent(learn) and type(learn.recorder.smooth_loss).__name__ == 'AvgSmoothLoss'
    assert isinstance(learn.opt.hypers[-1]['lr'], float) and not any(g.get('fused') for g in learn.opt.opt.param_groups)
    assert all(p.grad is None for p in learn.model.parameters())
    assert step_of(deepcopy(learn)).tape is None
    assert b'diffkd_nb.fast' not in pickle.dumps(learn)
    learn.path = tmp_path; learn.save('x'); learn.load('x'); fit(learn, 1)


def test_lr_find_leaves_everything_as_it_was(tmp_path):
    learn = learner('kd', schedule=False, **SHORT); learn.path = tmp_path
    before = weights(learn)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    for k,v in before.items(): assert torch.equal(v, learn.model.state_dict()[k]), k
    assert not lent(learn)
    fit(learn, 1)


class Syncs(TorchDispatchMode):
    "Counts the questions for a value"
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += str(func).startswith(('aten._local_scalar_dense', 'aten.is_nonzero', 'aten.equal'))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('method', ['diffkd', 'kd'])
def test_between_two_steps_nobody_asks_for_a_value(method):
    "Loader, schedule, step and recorder of a whole epoch after the first"
    class Watch(Callback):
        order, seen = -50, []
        def before_batch(self):
            if self.training and self.epoch == 1: self.seen.append(counter.n)
    Watch.seen = []
    learn = learner(method, cbs=[Watch()], **SHORT)
    with Syncs() as counter: fit(learn, 2)
    assert len(Watch.seen) == 6 and len(set(Watch.seen)) == 1 and counter.n > 0         # the ends of epochs do ask


def test_without_a_gpu_it_says_so_once(capsys):
    learn = learner('kd', recorded=False, **SHORT); learn.add_cb(CudaGraphStep())
    fit(learn)
    assert capsys.readouterr().out.count('there is no GPU') == 1


@pytest.mark.parametrize('bad', [0, -1, 1.5, '3'])
def test_bad_warmup(bad):
    with pytest.raises(ValueError, match='warmup must be a whole number'): CudaGraphStep(warmup=bad)


# ---- in a run

def test_a_random_state_of_another_kind_of_device_is_one_sentence():
    learn = fit(learner('diffkd', recorded=False, schedule=False, n=64), 1)
    state = learn.distill.state_dict()
    assert len(state['generator']) != 16            # what it has on a GPU
    state['generator'] = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(InputError, match='another kind of device: its random state has 16 bytes'): learn.distill.load_state_dict(state)


def train(out, **kw):
    return run(get_recipe('tiny').scaled(1), 'digits', None, 'small:4', 'alone', 0, out, progress=False, **kw)


def test_channels_last_is_the_layout_of_a_run_and_on_record(tmp_path):
    a, b = train(tmp_path/'a', channels_last=False), train(tmp_path/'b')
    assert b['settings']['channels_last'] is True and 'channels_last' not in a['settings']
    assert a['result']['valid_loss'] == pytest.approx(b['result']['valid_loss'], rel=1e-3)


def test_a_graph_that_was_asked_for_says_in_the_manifest_why_there_is_none(tmp_path):
    m = train(tmp_path/'a', graph=True, device='cpu')
    assert m['cost']['graph'] == 'there is no GPU' and m['settings']['graph'] is True


def test_a_run_without_its_student_is_checked_by_its_files(tmp_path):
    out = tmp_path/'a'
    m = train(out, keep_student=False)
    assert sorted(f.name for f in out.iterdir()) == ['log.csv', 'manifest.json'] and len(m['student_hash']) > 20
    report = verify(out)
    assert report and [c.detail for c in report if c.ok is None] == ['the student was not kept']
    (out/'log.csv').write_text((out/'log.csv').read_text().replace('1,', '2,', 1))
    assert not verify(out)


# ---- on a GPU

@pytest.fixture
def float32():
    "float32 throughout: convolutions on a GPU round to TF32 otherwise"
    was = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32,torch.backends.cudnn.allow_tf32 = was


@pytest.mark.cuda
@pytest.mark.parametrize('cycle', [False, True], ids=['rate', 'one-cycle'])
@pytest.mark.parametrize('method', ['diffkd', 'kd', 'dist', None])
def test_cuda_graph_equals_plain_steps(method, cycle, float32):
    "Same seeds, 50 steps"
    a, b = ((one_cycle if cycle else fit)(learner(method, n=800, device='cuda', recorded=r, schedule=not cycle)) for r in (False, True))
    assert step_of(b).kind is CudaRecording and step_of(b).recorded == 1 and step_of(b).reason is None
    same(a, b, 1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize('method', ['diffkd', 'kd', 'reviewkd', 'crd', None])
def test_three_epochs_of_a_cycle_on_each_gpu(method):
    for i in range(torch.cuda.device_count()):
        learn = one_cycle(learner(method, device=f'cuda:{i}', schedule=False), 3)
        assert step_of(learn).recorded == (method != 'crd') and len(learn.recorder.losses) == 30
        assert {t.device.index for t in weights(learn).values()} == {i} and all(x.device.type == 'cpu' for x in learn.recorder.losses)


@pytest.mark.cuda
@pytest.mark.parametrize('method', ['diffkd', None])
def test_a_broken_capture_goes_on_plainly_and_the_next_fit_records(method):
    learn = learner(method, loss=Faulty('value'), schedule=False, device='cuda')
    with pytest.warns(UserWarning, match='cannot be recorded'): fit(learn, 1)
    assert step_of(learn).recorded == 0 and len(learn.recorder.losses) == 10
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(2, device='cuda')        # the global generator draws
    learn.loss_func = CrossEntropyLossFlat()
    fit(learn, 3)
    assert step_of(learn).reason is None and step_of(learn).recorded == 1


@pytest.mark.cuda
def test_worker_processes_and_pinned_memory_do_not_break_a_capture():
    learn = learner('diffkd', device='cuda', schedule=False)
    data = [(x, y) for x,y in zip(DIGITS.x.float()/255, DIGITS.y)]
    learn.dls = DataLoaders.from_dsets(data[:320], data[:64], bs=32, device='cuda', num_workers=2, pin_memory=True)
    assert step_of(one_cycle(learn, 3)).recorded == 1


class Pins(nn.Module):
    "A loss beside which another thread pins memory, as a loader's does"
    def forward(self, p, y):
        def pin():
            for n in range(12, 24): torch.empty(2**n).pin_memory()
        t = threading.Thread(target=pin); t.start(); t.join()
        return nn.functional.cross_entropy(p, y)


@pytest.mark.cuda
def test_memory_pinned_by_another_thread_does_not_break_a_capture():
    learn = fit(learner('kd', loss=Pins(), output='classes', device='cuda', **SHORT), 1)
    assert step_of(learn).reason is None and step_of(learn).recorded == 1


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu_between_two_steps():
    class Strict(Callback):
        order = -50
        def before_batch(self):
            strict = self.training and self.epoch == 1 and self.iter > 0
            torch.cuda.set_sync_debug_mode('error' if strict else 'default')
        def after_train(self): torch.cuda.set_sync_debug_mode('default')
    learn = learner('diffkd', device='cuda', cbs=[Strict()])
    try: fit(learn, 2)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert step_of(learn).recorded == 1


@pytest.mark.cuda
@pytest.mark.parametrize('pair', [('resnet56', 'resnet20'), ('wrn_40_2', 'wrn_40_1')])
def test_cuda_graph_of_a_cifar_pair_in_bf16(pair, tmp_path):
    "Random images, one teacher: the losses of the first ten steps, seven of them replays, agree"
    set_seed(0)
    x, y = torch.randint(0, 256, (640, 3, 32, 32), dtype=torch.uint8), torch.arange(640) % 100
    data = ImageArrays(x, y, x[:100], y[:100], [str(i) for i in range(100)], 'random', stats=STATS['cifar100'])
    teacher, got = make_model(pair[0], 100).eval(), {}
    for graph in (False, True):
        m = run(get_recipe('A1').scaled(1), data, teacher, pair[1], 'diffkd', 0, tmp_path/str(graph),
                device='cuda', amp='bf16', channels_last=True, graph=graph, progress=False)
        got[graph] = float(next(csv.DictReader(open(tmp_path/str(graph)/'log.csv')))['train_loss'])
    assert m['cost']['graph'] == 'recorded'
    assert got[True] == pytest.approx(got[False], rel=.02)
