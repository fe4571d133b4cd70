"What every method must keep, attached by name"
import io, pickle
import pytest
from pairs import *
from copy import deepcopy
from diffkd_nb.callback import DistillCallback, distillation
from diffkd_nb.methods import METHODS

PICTURES = [m for m in METHODS if not METHODS[m].for_boxes]          # those of detectors alone: test_detection
every_method = pytest.mark.parametrize('method', kinds(PICTURES))
PAIR_OF = dict(reviewkd='mobilenet_v2<-timm_resnet26', vid='resnet18<-resnet34', ofa='resnet10t<-deit', crd='vit<-resnet18', fitnet='sequential<-swin', rkd='resnet10t<-deit', pkt='vit<-resnet18')


def equal(a, b): return torch.equal(a.nan_to_num(7.), b.nan_to_num(7.)) # CRD's constants are NaN before the first batch


def build(method, pair=LIGHT, **kw):
    set_seed(0)
    student, teacher, size = PAIRS[pair]
    student, teacher = student(), teacher()
    cb = DistillCallback(teacher, method, verbose=False, inputs=torch.zeros(2, 3, size, size), **kw)
    return make_learner(student, size, cb), student, teacher, cb


@pytest.mark.parametrize('method,pair', [(m, LIGHT) for m in PICTURES] + [pytest.param(*p, marks=[pytest.mark.slow]*(p[0] in ('reviewkd', 'fitnet', 'vid', 'ofa'))) for p in PAIR_OF.items()])
def test_student_and_teacher_stay_what_they_are(method, pair):
    learn, student, teacher, cb = build(method, pair)
    distiller = distillation(learn).distiller
    seen, keys, cls, begin = snapshot(teacher.train()), list(student.state_dict()), type(student), {k: v.clone() for k,v in distiller.state_dict().items()}
    with quiet(learn): learn.fit(2, 1e-3)
    same(seen, snapshot(teacher))
    assert list(student.state_dict()) == keys and type(student) is cls and n_hooks(student) == n_hooks(teacher) == 0
    assert [len(g) for g in learn.opt.param_lists] == [len(list(student.parameters()))]
    still = [n for n,p in distiller.named_parameters() if torch.equal(p, begin[n])]
    assert not still, f'parameters that never trained: {still[:5]}'
    assert all(np.isfinite(v) for row in learn.recorder.values for v in row)
    assert list(distiller.loss_names) == [n for n in learn.recorder.metric_names if n in distiller.loss_names]


@every_method
def test_nothing_but_training_costs_a_teacher_forward(method):
    learn, student, teacher, cb = build(method)
    calls = CountCalls(teacher)
    with quiet(learn):
        learn.fit(1, 1e-3); n = calls.n
        learn.validate(); learn.get_preds()
    assert n == (0 if METHODS[method].teacherless else len(learn.dls.train)) and calls.n == n


@every_method
def test_weight_zero_is_no_distillation(method):
    def end(cb):
        set_seed(3, reproducible=True); student = PAIRS[LIGHT][0]()
        learn = make_learner(student, PAIRS[LIGHT][2], cb)
        with quiet(learn): learn.fit(2, 1e-2)
        return student.state_dict()
    teacher = PAIRS[LIGHT][1]()
    off = dict(kd_weight=0, diffusion_weight=0, reconstruction_weight=0) if method == 'diffkd' else dict(weight=0)
    alone, zero = end(None), end(DistillCallback(teacher, method, verbose=False, **off))
    assert all(torch.equal(alone[k], zero[k]) for k in alone)
    some = end(DistillCallback(teacher, method, verbose=False))
    assert any(not torch.equal(alone[k], some[k]) for k in alone)


@every_method
def test_export_holds_no_teacher(method, tmp_path):
    learn, student, teacher, cb = build(method, 'resnet18<-resnet34') if method == 'diffkd' else build(method)
    with quiet(learn): learn.fit(1, 1e-3)
    with_cb = len(pickle.dumps(learn.model)); learn.export(tmp_path/'m.pkl')
    plain = make_learner(deepcopy(student), PAIRS[LIGHT][2]); plain.export(tmp_path/'p.pkl')
    assert (tmp_path/'m.pkl').stat().st_size < (tmp_path/'p.pkl').stat().st_size + 20_000 and with_cb < (tmp_path/'p.pkl').stat().st_size
    assert load_learner(tmp_path/'m.pkl').model.state_dict().keys() == student.state_dict().keys()


@every_method
def test_fine_tune_and_lr_find(method):
    learn, student, teacher, cb = build(method)
    learn.splitter = lambda m: L(m[:4], m[4:]).map(params)
    with quiet(learn):
        before = deepcopy((student.state_dict(), cb.state_dict()['distiller']))
        learn.lr_find(num_it=5, show_plot=False)
        for was,now in zip(before, (student.state_dict(), cb.state_dict()['distiller'])): assert all(equal(was[k], now[k]) for k in was)
        learn.fine_tune(1, 1e-2)
    assert len(learn.opt.param_lists) == 2 and all(p.requires_grad for p in student.parameters())


@every_method
def test_taken_up_between_epochs_it_ends_the_same(method):
    def fresh(): set_seed(5, reproducible=True); return build(method, seed=7)
    def epochs(learn, n, at=0):
        learn.dls.train.rng = __import__('random').Random(100 + at)
        with quiet(learn): learn.fit(n, 1e-2)
    a = fresh(); epochs(a[0], 1); epochs(a[0], 1, 1)
    b = fresh(); epochs(b[0], 1)
    saved = io.BytesIO(); torch.save(dict(model=b[1].state_dict(), opt=b[0].opt.state_dict(), cb=b[3].state_dict()), saved); saved.seek(0)
    state = torch.load(saved, weights_only=False)
    c = fresh(); c[1].load_state_dict(state['model']); c[0].create_opt(); c[0].opt.load_state_dict(state['opt']); c[3].load_state_dict(state['cb']); epochs(c[0], 1, 1)
    for x,y in ((a[1].state_dict(), c[1].state_dict()), [distillation(l[0]).distiller.state_dict() for l in (a, c)]): assert all(equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize('mix', ['MixUp', 'CutMix'])
@every_method
def test_mixed_samples_are_refused_where_a_class_is_needed(method, mix):
    from fastai.callback import mixup
    learn, student, teacher, cb = build(method)
    learn.add_cb(getattr(mixup, mix)())
    with quiet(learn):
        if method not in ('dkd', 'ofa', 'crd', 'pskd', 'fmkt', 'lshfm', 'dskd', 'cirkd', 'maskd'): learn.fit(1, 1e-3); assert np.isfinite(learn.recorder.values[-1]).all(); return
        with pytest.raises(ValueError, match=f'{mix} mixes (samples of two classes|two of them)'): learn.fit(1, 1e-3)
    assert n_hooks(student) == n_hooks(teacher) == 0
