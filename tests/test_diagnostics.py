"Diagnostics through a run: they change nothing, are stored, and cost little; pictures from a stored run"
import json
import matplotlib; matplotlib.use('Agg')
import pytest
from fastai.vision.all import CrossEntropyLossFlat, Learner
from diffkd_nb import experiment
from diffkd_nb.callback import DiffKDCallback, DistillCallback
from diffkd_nb.data import InputError, digits_data, make_dls
from diffkd_nb.diagnostics import DenoisingDiagnostics, Diagnosis
from diffkd_nb.experiment import run, stored_learner, verify
from diffkd_nb.models import make_model
from diffkd_nb.plots import class_scores, plot_gamma, plot_steps, show_denoised
from diffkd_nb.recipes import get_recipe


def train(out, teacher, student='small:4', method='diffkd', epochs=2, **kw):
    recipe = get_recipe('tiny').scaled(epochs).replace(batch_size=125)      # eight steps an epoch
    return run(recipe, 'digits', teacher, student, method, 1, out, progress=False, **kw)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    d = tmp_path_factory.mktemp('runs')
    train(d/'teacher', None, 'small:8', 'alone', 1)
    teacher = f"small:8@{d/'teacher'/'student.safetensors'}"
    train(d/'plain', teacher)
    train(d/'looked', teacher, diagnostics=True, keep_distiller=True)
    return d, teacher


def test_looking_changes_nothing(runs):
    d, _ = runs
    for f in ('student.safetensors', 'log.csv'): assert (d/'plain'/f).read_bytes() == (d/'looked'/f).read_bytes()
    assert not (d/'plain'/'diagnostics.json').exists() and verify(d/'looked')
    x = Diagnosis(d/'looked')
    assert x.taps == ['feature', 'logits'] and [r['epoch'] for r in x.of('feature')] == [1, 2] and len(x.table) == 4
    x.plot('logits'); plot_gamma(d/'looked'); str(x)
    matplotlib.pyplot.close('all')
    with pytest.raises(InputError, match='this training had feature, logits'): x.plot('layer9')


def test_a_killed_and_resumed_run_keeps_its_rows(runs, tmp_path, monkeypatch):
    d, teacher = runs
    whole = experiment.Checkpoint.after_epoch
    def stop(self):
        whole(self)
        raise RuntimeError('here')
    with monkeypatch.context() as m:
        m.setattr(experiment.Checkpoint, 'after_epoch', stop)
        with pytest.raises(Exception, match='here'): train(tmp_path, teacher, diagnostics=True)
    train(tmp_path, teacher, diagnostics=True)
    again, once = (json.loads((f/'diagnostics.json').read_text()) for f in (tmp_path, d/'looked'))
    assert again == once


def test_pictures_from_a_stored_run(runs):
    d, teacher = runs
    learn = stored_learner(d/'looked', teacher)
    assert show_denoised(learn, 3).shape == (3, 7)
    x = next(iter(learn.dls.valid))[0][:2]
    assert plot_steps(learn, x).shape == (2, 9) and class_scores(learn, x)['denoised'].shape == (2, 10)
    matplotlib.pyplot.close('all')
    assert not any(m._forward_hooks for m in learn.model.modules())
    with pytest.raises(InputError, match='keep_distiller=True'): stored_learner(d/'plain', teacher)
    other = f"small:4@{d/'plain'/'student.safetensors'}"
    with pytest.raises(InputError, match='other weights than the teacher'): stored_learner(d/'looked', other)


def learner(*cbs):
    "A small training on 192 digits"
    return Learner(make_dls(digits_data(192), 32), make_model('small:4', 10, 1, 8), loss_func=CrossEntropyLossFlat(),
                   cbs=list(cbs))


def test_a_method_without_diffusion_is_refused():
    learn = learner(DistillCallback(make_model('small:8', 10, 1, 8), 'kd', verbose=False), DenoisingDiagnostics())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='looks into DiffKD'): learn.fit(1)


def looked_at(*cbs):
    "Gamma of two epochs that were trained with diagnostics in columns and with further callbacks"
    teacher = make_model('small:8', 10, 1, 8)
    learn = learner(DiffKDCallback(teacher, verbose=False), DenoisingDiagnostics(10, columns=True), *cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    return [r['gamma_p50'] for r in learn.denoising_diagnostics.rows if r['tap'] == 'feature']


def test_columns_reach_tensorboard(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    gamma = looked_at(TensorBoardCallback(tmp_path, trace_model=False, log_preds=False))
    seen = EventAccumulator(str(tmp_path)); seen.Reload()
    assert [e.value for e in seen.Scalars('gamma_p50')] == pytest.approx(gamma, rel=1e-5)


def test_columns_reach_weights_and_biases(tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as wb
    if hasattr(wb, 'init_args'):        # as the page of the diagnostics says
        monkeypatch.setattr(wb, 'init_args', lambda o, f=wb.init_args: f(o) if hasattr(o, '__dict__') else {})
    monkeypatch.setenv('WANDB_SILENT', 'true'); monkeypatch.chdir(tmp_path)
    with wandb.init(mode='offline', dir=tmp_path) as run:
        seen, log = [], run.log
        monkeypatch.setattr(wandb, 'log', lambda d, **k: (seen.append(d), log(d, **k)))
        gamma = looked_at(wb.WandbCallback(log=None, log_preds=False))
        last = run.summary['gamma_p50']
    assert [d['gamma_p50'] for d in seen if 'gamma_p50' in d] == pytest.approx(gamma, rel=1e-5)
    assert last == pytest.approx(gamma[-1], rel=1e-5)
