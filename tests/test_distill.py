"From a trained Learner to a smaller one: what the student is, where it goes, what the report says"
import io, pickle, random, warnings
import pytest
from pairs import *
from copy import deepcopy
from PIL import Image
from fastai.tabular.all import TabularDataLoaders, tabular_learner
from diffkd_nb.callback import DistillCallback, distillation
from diffkd_nb.distill import DistillationReport, distill, known_of
from diffkd_nb.files import InputError
from diffkd_nb.models import make_model, n_parameters, small_net

FAST = dict(epochs=1, seconds=0., verbose=False)


def quiet_distill(learn, *a, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return distill(learn, *a, **{**FAST, **kw})


@pytest.fixture(scope='module', autouse=True)
def silence():
    "No tables, no bars"
    bars = defaults.callbacks
    defaults.callbacks = [c for c in bars if c is not ProgressCallback]
    yield
    defaults.callbacks = bars


@pytest.fixture(scope='module')
def teacher():
    set_seed(0); learn = make_learner(sequential(12))
    with quiet(learn): learn.fit(1)
    return learn


@pytest.fixture(scope='module')
def student(teacher): return quiet_distill(teacher, lambda n: sequential(4), seconds=1.)


def test_the_student_is_plain_and_its_learner_the_teachers(teacher, student):
    assert student.dls is teacher.dls and student.loss_func is teacher.loss_func and [m.name for m in student.metrics] == ['accuracy']
    assert list(student.model.state_dict()) == list(sequential(4).state_dict()) and n_hooks(student.model) == 0
    assert distillation(student).teacher is teacher.model and n_hooks(teacher.model) == 0


def test_the_teacher_stays_as_it_is(teacher):
    before = snapshot(teacher.model)
    quiet_distill(teacher, sequential(4), seconds=1.)
    same(before, snapshot(teacher.model))


def test_a_module_is_trained_itself_and_copied_for_a_comparison(teacher):
    mine = sequential(4); assert quiet_distill(teacher, mine).model is mine
    before = snapshot(mine); new = quiet_distill(teacher, mine, compare_with=['alone'])
    same(before, snapshot(mine)); assert new.model is not mine


def test_the_same_student_as_by_hand(teacher):
    def by_hand():
        from diffkd_nb.callback import DistillCallback
        set_seed(3)
        for dl in teacher.dls.loaders: dl.rng = random.Random(3)
        known_of(teacher); new = make_learner(sequential(4), dls=teacher.dls, cbs=DistillCallback(teacher, 'kd', seed=3, verbose=False))
        with quiet(new): new.fit_one_cycle(1, None)
        return new.model.state_dict()
    got = quiet_distill(teacher, lambda n: sequential(4), method='kd', seeds=[3]).model.state_dict()
    assert all(torch.equal(a, b) for a,b in zip(by_hand().values(), got.values()))


# ---- where it goes

def test_through_export(student, tmp_path):
    student.path = tmp_path; student.export('student.pkl')
    assert b'diffkd_nb' not in (tmp_path/'student.pkl').read_bytes()
    again = load_learner(tmp_path/'student.pkl'); x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.model.eval()(x), student.model.eval()(x)) and again.report == str(student.report)


def test_through_torch_export(student):
    x, f = torch.randn(2, 3, 32, 32), io.BytesIO()
    torch.export.save(torch.export.export(student.model.eval(), (x,)), f); f.seek(0)
    assert torch.allclose(torch.export.load(f).module()(x), student.model(x), atol=1e-6)


def test_through_onnx(student, tmp_path):
    reference = pytest.importorskip('onnx.reference', reason='onnx is not installed, and torch.onnx needs it')
    x, f = torch.randn(2, 3, 32, 32), tmp_path/'student.onnx'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(student.model.eval(), (x,), str(f), dynamo=False, input_names=['x'], dynamic_axes=dict(x={0: 'n'}))
    got, = reference.ReferenceEvaluator(str(f)).run(None, dict(x=x.numpy()))
    assert np.allclose(got, student.model(x).detach().numpy(), atol=1e-4)


# ---- the report

def test_the_figures_of_the_report(teacher, student):
    r, got = student.report, lambda row, col: student.report.table.loc[row, col]
    assert got('accuracy', 'student') == f'{100*student.validate()[1]:.1f} %' and got('accuracy', 'teacher') == f'{100*teacher.validate()[1]:.1f} %'
    (a, _), (b, _) = student.get_preds(), teacher.get_preds()
    assert got('agreement with the teacher', 'student') == f'{100*(a.argmax(1) == b.argmax(1)).float().mean():.1f} %'
    assert got('parameters', 'student') == f'{n_parameters(student.model):,}' and got('parameters', 'teacher') == f'{n_parameters(teacher.model):,}'
    assert got('parameters added while training', 'student') == f'{sum(p.numel() for p in distillation(student).parameters()):,}'
    assert float(got('training step (ms)', 'student').split()[0]) > float(got('training step (ms)', 'student alone')) > 0
    assert 'another seed gives another figure' in str(r) and '8 validation items' in str(r) and 'Rounding' in str(r)
    assert '<table' in r._repr_html_() and deepcopy(r) is r and pickle.loads(pickle.dumps(r)) == str(r)


def test_a_report_for_any_learner(teacher):
    plain = make_learner(sequential(4)); r = plain.distillation_report()
    assert 'teacher' not in r.table and list(r.table.index) == ['accuracy', 'parameters', 'weights (MB)', 'one item (ms)']
    beside = plain.distillation_report(alone=.25, teacher=teacher)
    assert beside.table.loc['accuracy', 'student alone'] == '25.0 %' and 'agreement with the teacher' in beside.table.index
    assert 'one seed' in str(beside) and n_hooks(plain.model) == 0


@pytest.mark.parametrize('outputs,options,says', [
    (20, dict(distiller='diffkd', taps=['feature']), 'it gives 20 outputs and the student 10'),
    (10, dict(distiller='kd', classes=[*range(1, 10), 0]), 'its classes stand in another order'),
    (10, dict(distiller='kd', classes=list(range(10))), '')])
def test_a_teacher_of_other_classes_has_no_figure(teacher, outputs, options, says):
    "And the report says why, in place of a number that means nothing"
    class Wide(nn.Module):
        def __init__(self): super().__init__(); self.body, self.more = sequential(6), nn.Linear(10, outputs)
        def forward(self, x): return self.more(self.body(x))
    new = make_learner(sequential(4), dls=teacher.dls, cbs=DistillCallback(Wide(), **options, verbose=False))
    with quiet(new): new.fit(1, 1e-3)
    r = new.distillation_report(seconds=0)
    assert (r.table.loc['accuracy', 'teacher'] == '-') == bool(says) == ('agreement with the teacher' not in r.table.index)
    assert (f'The teacher has no figure: {says}' in str(r)) if says else ('has no figure' not in str(r))


def test_a_report_changes_nothing(student):
    kd, before, state = distillation(student), snapshot(student.model), torch.get_rng_state()
    weights = deepcopy(kd.distiller.state_dict())
    student.distillation_report(seconds=.1)
    same(before, snapshot(student.model)); assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a,b in zip(weights.values(), kd.distiller.state_dict().values()))


def test_a_comparison(teacher):
    new = quiet_distill(teacher, lambda n: sequential(4), method='kd', compare_with=['alone', 'dist'], seeds=2)
    c = new.report.comparison
    assert c.index.tolist() == ['kd - alone', 'kd - dist'] and c.n.tolist() == [2, 2] and set(c.verdict) <= {'better', 'worse', 'not distinguishable'}
    assert 'kd - dist:' in str(new.report) and '(Holm), 2 seeds' in str(new.report) and 'another seed' not in str(new.report)


# ---- other Learners

def picture_learner(path, arch, **kw):
    for i in range(24):
        f = path/'ab'[i % 2]/f'{i}.png'; f.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (32, 32, 3)).astype('uint8')).save(f)
    dls = ImageDataLoaders.from_folder(path, valid_pct=.3, bs=8, num_workers=0, device='cpu', batch_tfms=Normalize.from_stats(*imagenet_stats))
    return vision_learner(dls, arch, pretrained=False, metrics=accuracy, **kw)


def test_vision_learner_by_name_and_by_architecture(tmp_path):
    learn = picture_learner(tmp_path, resnet18)
    new = quiet_distill(learn, 'resnet8'); assert new.dls.vocab == ['a', 'b'] and new.model(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    new.path = tmp_path; new.export('s.pkl'); f = get_image_files(tmp_path)[0]
    assert load_learner(tmp_path/'s.pkl').predict(f)[0] == new.predict(f)[0]
    new = quiet_distill(learn, resnet18, method='kd'); assert type(new.model[1]) is nn.Sequential and len(new.opt.param_lists) == 2


def test_tables():
    from sklearn.datasets import load_wine
    df = load_wine(as_frame=True).frame.sample(96, random_state=0); names = [c for c in df if c != 'target']
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=names, y_names='target', y_block=CategoryBlock(), valid_idx=range(64, 96), bs=32, device='cpu', num_workers=0)
    learn = tabular_learner(dls, layers=[32], metrics=accuracy); from fastai.tabular.all import TabularModel
    new = quiet_distill(learn, lambda n: TabularModel([], len(names), n, [4]), method='kd')
    assert type(new) is type(learn) and 'agreement with the teacher' in new.report.table.index and len(new.predict(df.iloc[0])) == 3
    with pytest.raises(InputError, match='makes a network for pictures'): quiet_distill(learn, 'resnet8')


def test_sentences():
    from fastai.text.all import AWD_LSTM, ModelResetter, RNNCallback, get_text_classifier
    config = lambda w: dict(emb_sz=w, n_hid=2*w, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.1, input_p=.1, embed_p=.02, weight_p=.1)
    net = lambda w: get_text_classifier(AWD_LSTM, 50, 3, seq_len=8, config=config(w), lin_ftrs=[10])
    x = torch.randint(2, 50, (24, 12)); data = Pairs(zip(x, torch.arange(24) % 3))
    dls = DataLoaders.from_dsets(data, Pairs(data[:8]), bs=8, device='cpu', num_workers=0)
    learn = Learner(dls, net(12), loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[ModelResetter(), RNNCallback()])
    both = quiet_distill(learn, net(6), method='kd', compare_with=['alone'], epochs=1, seconds=.1); assert 'student alone' in both.report.table
    new = quiet_distill(learn, net(6), method='kd', seconds=.1); assert {'ModelResetter', 'RNNCallback'} <= {type(c).__name__ for c in new.cbs} and distillation(new).plan


@pytest.mark.slow
def test_segmentation():
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8, 32, 32)); data = Pairs(zip(x, y))
    dls = DataLoaders.from_dsets(data, Pairs(data[:4]), bs=4, device='cpu', num_workers=0)
    learn = Learner(dls, create_unet_model(resnet34, 3, (32, 32), pretrained=False), loss_func=CrossEntropyLossFlat(axis=1))
    new = quiet_distill(learn, resnet18, method='kd'); assert new.model(x[:1]).shape == (1, 3, 32, 32) and 'agreement with the teacher' in new.report.table.index


# ---- what cannot be

@pytest.mark.parametrize('kw,says', [
    (dict(student='resnet81'), 'no model named'), (dict(student=18), 'student must be a name'), (dict(epochs=0), 'epochs must be a whole number'),
    (dict(student=lambda n: n), 'returned int'), (dict(pretrained=True), 'nobody publishes weights'), (dict(seeds=0), 'seeds must be a number'), (dict(seeds=3), 'several seeds are for a comparison'),
    (dict(compare_with=[]), 'compare_with must be a list'), (dict(compare_with='kd'), 'compare_with must be a list'),
    (dict(compare_with=['diffkd']), 'which is the method itself'), (dict(compare_with=['kdd']), 'unknown method'), (dict(method='kdd'), 'unknown method'),
    (dict(student=sequential(4), pretrained=True), 'made by you')], ids=lambda v: '' if isinstance(v, str) else ','.join(v))
def test_what_cannot_be_is_one_sentence(teacher, kw, says):
    with pytest.raises(ValueError, match=says): quiet_distill(teacher, **{'student': 'resnet8', **kw})


def test_no_learner_no_data_and_its_own_model(teacher, student, tmp_path):
    with pytest.raises(InputError, match='takes a trained fastai Learner, got Sequential'): distill(teacher.model, 'resnet8')
    student.path = tmp_path; student.export('s.pkl')
    with pytest.raises(InputError, match='holds no training data'): distill(load_learner(tmp_path/'s.pkl'), 'resnet8')
    with pytest.raises(InputError, match="teacher's own model"): distill(teacher, teacher.model)
