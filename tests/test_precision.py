"bfloat16 on the CPU: what is computed in it, what is not, and that it ends with the batch"
import json
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
    learn = make_learner(s, cbs=[Note(), DistillCallback(t, method, verbose=False, seed=1, inputs=torch.randn(2, 3, 32, 32)), *cbs], dls=tensor_dls(n=n), lr=1e-3)
    s.seen.clear()      # the plan's dry run
    if bf16: learn.to_bf16()
    with quiet(learn): learn.fit(epochs)
    return learn


def test_student_and_teacher_run_in_bf16_in_training_and_validation():
    learn = train('diffkd', True)
    assert learn.model.seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    assert train('diffkd', False).model.seen == {(True, torch.float32), (False, torch.float32)}


@pytest.mark.parametrize('method', kinds(sorted(m for m in METHODS if not METHODS[m].for_boxes)))
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


def short(out, method='alone', teacher=None, **kw):
    from diffkd_nb.experiment import run
    from diffkd_nb.recipes import get_recipe
    return run(get_recipe('tiny').replace(epochs=2), 'digits', teacher, 'small:4', method, 0, out, progress=False, **kw)


def test_precision_of_a_run_is_on_record_and_verified_in_it(tmp_path):
    from diffkd_nb.experiment import verify
    from diffkd_nb.precision import bf16_instructions
    whole, half = short(tmp_path/'a'), short(tmp_path/'b', precision='bf16')
    assert whole['settings']['precision'] == 'float32' and 'bf16' not in whole['cost']
    assert half['settings']['precision'] == 'bf16' and half['cost']['bf16'] == (bf16_instructions() or 'no instructions')
    assert whole['student_hash'] != half['student_hash'] and verify(tmp_path/'a') and verify(tmp_path/'b')
    assert short(tmp_path/'b', amp='bf16') == half               # the older name


def test_verify_tolerates_rounding_and_no_more(tmp_path):
    "A record that is off by more hits than can flip is refused"
    from diffkd_nb.experiment import manifest_hash, verify
    m = short(tmp_path/'b', precision='bf16')
    f, log = tmp_path/'b'/'manifest.json', tmp_path/'b'/'log.csv'
    from diffkd_nb.files import file_hash
    was = str(m['result']['accuracy'])
    for off, fine in ((1, True), (60, False)):
        new = json.loads(json.dumps(m))
        value = float(f"{m['result']['accuracy'] + off/m['data']['n_valid']:.8g}")
        new['result'].update(accuracy=value, best_accuracy=value, best_epoch=2)
        text = log.read_text()
        log.write_text(text.replace(was, str(value)))
        new['files']['log.csv'] = file_hash(log)
        new['hash'] = manifest_hash(new)
        f.write_text(json.dumps(new))
        report = verify(tmp_path/'b')
        assert bool(report) == fine, str(report)
        log.write_text(text)


def test_slow_or_impossible_precisions_are_told(tmp_path, capsys, monkeypatch):
    from diffkd_nb import precision
    from diffkd_nb.experiment import compare
    from diffkd_nb.files import InputError
    with pytest.raises(InputError, match="'fp16' is for a GPU"): short(tmp_path/'a', precision='fp16', device='cpu')
    with pytest.raises(InputError, match="'fp16' is for a GPU"):
        compare([('x', 'small:4')], ['alone'], 1, 'tiny', 'digits', tmp_path/'c', precision='fp16', device='cpu')
    with pytest.raises(InputError, match="precision must be 'float32', 'bf16' or 'fp16', got 'int8'"): short(tmp_path/'a', precision='int8')
    monkeypatch.setattr(precision, 'bf16_instructions', lambda: '')
    short(tmp_path/'a', precision='bf16', device='cpu')
    assert "no instructions for bfloat16" in capsys.readouterr().err


# ---- layout

def test_models_of_a_run_have_the_channels_last(tmp_path):
    "Student, teacher and distiller; records without the key mean channels first"
    from diffkd_nb.experiment import run, verify
    from diffkd_nb.recipes import get_recipe
    from diffkd_nb.run import learner
    from diffkd_nb.setup import Job, Setup
    short(tmp_path/'t')
    teacher = f"small:4@{tmp_path/'t'/'student.safetensors'}"
    for last in (True, False):
        learn = learner(Setup('tiny', 'digits', 'small:4', (teacher,), 'diffkd', channels_last=last).open(), Job(tmp_path/'x', 'cpu'))
        kd = learn.distill.kd
        for model in (learn.model, kd.teacher, kd.distiller):
            kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
            assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) == last for p in kernels)
    m = short(tmp_path/'first', channels_last=False)
    assert 'channels_last' not in m['settings'] and verify(tmp_path/'first')
    with pytest.raises(Exception, match='channels_last: None there, True now'): short(tmp_path/'first')


@pytest.mark.parametrize('flags, layout, precision', [([], True, 'float32'), (['--channels-last'], True, 'float32'),
                         (['--channels-first'], None, 'float32'), (['--precision', 'bf16'], True, 'bf16'), (['--amp', 'bf16'], True, 'bf16')])
def test_flags_of_the_commands(tmp_path, flags, layout, precision):
    from diffkd_nb.commands import train_main
    args = ['--data', 'digits', '--recipe', 'tiny', '--epochs', '1', '--student', 'small:4', '--method', 'alone', '--out', str(tmp_path/'x')]
    assert train_main([*args, *flags]) == 0
    s = json.loads((tmp_path/'x'/'manifest.json').read_text())['settings']
    assert s.get('channels_last') == layout and s['precision'] == precision
