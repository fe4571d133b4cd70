"Diagnostics through a run: they change nothing, are stored, and cost little; pictures from a stored run"
import json
import matplotlib; matplotlib.use('Agg')
import pytest, torch
from fastai.vision.all import Callback
from diffkd_nb.data import InputError
from diffkd_nb.diagnostics import DenoisingDiagnostics, Diagnosis
from diffkd_nb.experiment import run, stored_learner, verify
from diffkd_nb.fast import why_plain
from diffkd_nb.plots import class_scores, plot_gamma, plot_steps, show_denoised
from diffkd_nb.recipes import get_recipe


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    d = tmp_path_factory.mktemp('runs')
    run('tiny', 'digits', None, 'small:8', 'alone', 0, d/'teacher', progress=False)
    teacher = f"small:8@{d/'teacher'/'student.safetensors'}"
    recipe = get_recipe('tiny').scaled(4)
    for name,more in (('plain', {}), ('looked', dict(diagnostics=True, keep_distiller=True))): run(recipe, 'digits', teacher, 'small:4', 'diffkd', 1, d/name, progress=False, **more)
    return d, teacher


def test_looking_changes_nothing(runs):
    d, _ = runs
    for f in ('student.safetensors', 'log.csv'): assert (d/'plain'/f).read_bytes() == (d/'looked'/f).read_bytes()
    assert not (d/'plain'/'diagnostics.json').exists() and verify(d/'looked')
    x = Diagnosis(d/'looked')
    assert x.taps == ['feature', 'logits'] and [r['epoch'] for r in x.of('feature')] == [1, 2, 3, 4] and len(x.table) == 8
    x.plot('logits'); plot_gamma(d/'looked'); str(x)
    matplotlib.pyplot.close('all')
    with pytest.raises(InputError, match='this training had feature, logits'): x.plot('layer9')


def test_a_killed_and_resumed_run_keeps_its_rows(runs, tmp_path):
    d, teacher = runs
    class Stop(Exception): pass
    from diffkd_nb import experiment
    real = experiment.Checkpoint.after_epoch
    def stop(self):
        real(self)
        if self.epoch == 1: raise Stop('here')
    experiment.Checkpoint.after_epoch = stop
    try:
        with pytest.raises(Exception, match='here'): run(get_recipe('tiny').scaled(4), 'digits', teacher, 'small:4', 'diffkd', 1, tmp_path, progress=False, diagnostics=True)
    finally: experiment.Checkpoint.after_epoch = real
    run(get_recipe('tiny').scaled(4), 'digits', teacher, 'small:4', 'diffkd', 1, tmp_path, progress=False, diagnostics=True)
    assert json.loads((tmp_path/'diagnostics.json').read_text()) == json.loads((d/'looked'/'diagnostics.json').read_text())


def test_pictures_from_a_stored_run(runs):
    d, teacher = runs
    learn = stored_learner(d/'looked', teacher)
    assert show_denoised(learn, 3).shape == (3, 4)
    x = next(iter(learn.dls.valid))[0][:2]
    assert plot_steps(learn, x).shape == (2, 9) and class_scores(learn, x)['denoised'].shape == (2, 10)
    matplotlib.pyplot.close('all')
    assert not any(m._forward_hooks for m in learn.model.modules())
    with pytest.raises(InputError, match='keep_distiller=True'): stored_learner(d/'plain', teacher)
    with pytest.raises(InputError, match='other weights than the teacher'): stored_learner(d/'looked', f"small:4@{d/'plain'/'student.safetensors'}")


def test_a_method_without_diffusion_is_refused(runs):
    from diffkd_nb.callback import DistillCallback
    from diffkd_nb.experiment import make_teacher, open_data
    from fastai.vision.all import Learner, CrossEntropyLossFlat
    from diffkd_nb.data import make_dls
    from diffkd_nb.models import make_model
    data = open_data('digits'); t, _ = make_teacher(runs[1], data)
    learn = Learner(make_dls(data, 32), make_model('small:4', 10, 1, 8), loss_func=CrossEntropyLossFlat(), cbs=[DistillCallback(t, 'kd', verbose=False), DenoisingDiagnostics()])
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='looks into DiffKD'): learn.fit(1)
    learn = Learner(make_dls(data, 32), make_model('small:4', 10, 1, 8), loss_func=CrossEntropyLossFlat(), cbs=[DistillCallback(t, 'diffkd', verbose=False), DenoisingDiagnostics()])
    learn.create_opt()
    with pytest.raises(ValueError, match='1 or more'): DenoisingDiagnostics(0)


def looked_at(runs, *cbs):
    "A Learner that was trained with diagnostics in columns and with further callbacks"
    from fastai.vision.all import Learner, CrossEntropyLossFlat
    from diffkd_nb.callback import DiffKDCallback
    from diffkd_nb.data import make_dls, open_data
    from diffkd_nb.experiment import make_teacher
    from diffkd_nb.models import make_model
    data = open_data('digits'); t, _ = make_teacher(runs[1], data)
    learn = Learner(make_dls(data, 32), make_model('small:4', 10, 1, 8), loss_func=CrossEntropyLossFlat(),
                    cbs=[DiffKDCallback(t, verbose=False), DenoisingDiagnostics(10, columns=True), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    return learn, [r['gamma_p50'] for r in learn.denoising_diagnostics.rows if r['tap'] == 'feature']


def test_columns_reach_tensorboard(runs, tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, gamma = looked_at(runs, TensorBoardCallback(tmp_path, trace_model=False, log_preds=False))
    seen = EventAccumulator(str(tmp_path)); seen.Reload()
    assert [e.value for e in seen.Scalars('gamma_p50')] == pytest.approx(gamma, rel=1e-5)


def test_columns_reach_weights_and_biases(runs, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as wb
    if hasattr(wb, 'init_args'): monkeypatch.setattr(wb, 'init_args', lambda o, f=wb.init_args: f(o) if hasattr(o, '__dict__') else {})     # as page 14a says
    monkeypatch.setenv('WANDB_SILENT', 'true'); monkeypatch.chdir(tmp_path)
    with wandb.init(mode='offline', dir=tmp_path) as run:
        seen, log = [], run.log
        monkeypatch.setattr(wandb, 'log', lambda d, **k: (seen.append(d), log(d, **k)))
        _, gamma = looked_at(runs, wb.WandbCallback(log=None, log_preds=False))
        last = run.summary['gamma_p50']
    assert [d['gamma_p50'] for d in seen if 'gamma_p50' in d] == pytest.approx(gamma, rel=1e-5) and last == pytest.approx(gamma[-1], rel=1e-5)
