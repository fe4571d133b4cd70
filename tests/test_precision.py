"bfloat16 on the CPU: what is computed in it, what is not, and that it ends with the batch"
import pytest, torch
from fastai.basics import Callback, CancelBatchException, CancelFitException
from diffkd_nb.callback import DiffKDCallback, DistillCallback
from diffkd_nb.methods import METHODS
from pairs import *

STUDENT, TEACHER, SIZE = PAIRS[LIGHT]


class Note(Callback):
    "The loss of each step, and the type of the student's output"
    order = 60
    def before_fit(self): self.losses, self.dtypes = [], set()
    def after_batch(self):
        if self.training: self.losses.append(float(self.learn.loss))


class SpyModel(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        self.seen.add((self.training, y.dtype))
        return y


def train(method, bf16, epochs=1, cbs=(), n=24, student=None):
    set_seed(0)
    s, t = SpyModel(*(student or STUDENT())), TEACHER()
    s.seen = set()
    learn = make_learner(s, cbs=[Note(), DistillCallback(t, method, verbose=False, seed=1), *cbs], dls=tensor_dls(n=n), lr=1e-3)
    s.seen.clear()      # the plan's dry run
    if bf16: learn.to_bf16()
    with quiet(learn): learn.fit(epochs)
    return learn


def test_student_and_teacher_run_in_bf16_in_training_and_validation():
    learn = train('diffkd', True)
    assert learn.model.seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    assert train('diffkd', False).model.seen == {(True, torch.float32), (False, torch.float32)}


@pytest.mark.parametrize('method', sorted(METHODS))
def test_every_method_trains_in_bf16(method):
    "Twenty finite steps, the first one with the loss of float32 up to 0.25 %"
    a, b = train(method, True, 2, n=80).note.losses, train(method, False, 2, n=80).note.losses
    assert len(a) == 20 and all(map(torch.isfinite, torch.tensor(a)))
    assert abs(a[0] - b[0]) <= 2.5e-3*abs(b[0])


def test_diffusion_arithmetic_stays_in_float32(monkeypatch):
    "Mixing, denoising steps, noisy teacher features and losses are float32 inside autocast"
    from diffkd_nb import diffkd, diffusion
    seen = {}
    def spy(module, name):
        f = getattr(module, name)
        def g(*a, **kw):
            out = f(*a, **kw)
            first = out[0] if isinstance(out, tuple) else out
            seen.setdefault(name, set()).add((first.dtype, torch.is_autocast_enabled('cpu')))
            return out
        monkeypatch.setattr(module, name, g)
    for m, name in ((diffkd, 'mix'), (diffkd, 'ddim_denoise'), (diffkd, 'diffusion_loss'), (diffusion.NoiseSchedule, 'add_noise')): spy(m, name)
    learn = train('diffkd', True)
    assert {k: v for k, v in seen.items()} == {n: {(torch.float32, True)} for n in ('mix', 'ddim_denoise', 'diffusion_loss', 'add_noise')}
    assert all(v.dtype == torch.float32 for v in learn.distill.kd.tally.sums.values())


@pytest.mark.parametrize('error', [CancelBatchException, CancelFitException, KeyboardInterrupt, ValueError])
@pytest.mark.parametrize('where', ['after_pred', 'after_loss', 'before_backward'])
def test_no_autocast_is_left_open(error, where):
    stop = type('Stop', (Callback,), {where: lambda self: (_ for _ in ()).throw(error('x')), 'order': 4})
    try: train('kd', True, cbs=[stop()])
    except (KeyboardInterrupt, ValueError): pass
    assert not torch.is_autocast_enabled('cpu')


def test_fp16_is_refused_in_words():
    learn = make_learner(STUDENT(), cbs=DiffKDCallback(TEACHER(), verbose=False)).to_fp16()
    with quiet(learn), pytest.raises(ValueError, match="'fp16' is for a GPU.*'bf16' or 'float32'"): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu') and n_hooks(learn.model) == 0


def test_an_export_needs_nothing_of_ours(tmp_path):
    learn = train('diffkd', True)
    learn.export(tmp_path/'x.pkl')
    assert b'diffkd_nb' not in (tmp_path/'x.pkl').read_bytes()
