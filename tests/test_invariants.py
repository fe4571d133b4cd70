"The invariants of the house, over several architectures, and the points at which peers fail, each by name"
import pickle, random, sys, warnings
import pytest
import workers
from pairs import *
from copy import deepcopy
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from diffkd_nb.callback import DiffKDCallback, DistillCallback, TeacherlessCallback
from diffkd_nb.diffkd import DiffKD, DiffKDDistiller
from diffkd_nb.methods import KD
from diffkd_nb.taps import plan_taps

every_pair = pytest.mark.parametrize('pair', PAIRS)


def build(pair, **kw):
    set_seed(0)
    student, teacher, size = PAIRS[pair]
    student, teacher = student(), teacher()
    cb = DiffKDCallback(teacher, verbose=False, inputs=torch.zeros(2, 3, size, size), **kw)
    return make_learner(student, size, cb), student, teacher, cb


def weights(cb): return {k: v.clone() for k,v in cb.distiller.state_dict().items()}
def moved(cb, before): return {n for n,p in cb.distiller.named_parameters() if not torch.equal(p, before[n])}


# ---- 1 and 2: student and teacher stay what they are

@every_pair
def test_student_and_teacher_stay_what_they_are(pair):
    learn, student, teacher, cb = build(pair, latent=32)
    teacher.train()
    for i,p in enumerate(teacher.parameters()): p.requires_grad_(i % 2 == 0)
    next(iter(teacher.children())).eval()              # a mixed mode must come back as it was
    keys, cls, extra, seen, begin = list(student.state_dict()), type(student), set(student.__dict__), snapshot(teacher), weights(cb)
    with quiet(learn): learn.fit(2, 1e-3)
    same(seen, snapshot(teacher))
    assert list(student.state_dict()) == keys and type(student) is cls and set(student.__dict__) == extra
    assert n_hooks(student) == n_hooks(teacher) == 0
    assert [len(g) for g in learn.opt.param_lists] == [len(list(student.parameters()))]
    not_moved = set(begin) & {n for n,_ in cb.distiller.named_parameters()} - moved(cb, begin)
    assert not not_moved, f'distiller parameters that never trained: {sorted(not_moved)[:5]}'
    assert all(np.isfinite(v) for row in learn.recorder.values for v in row)


class Boom(Callback):
    "Raises `error` at the second batch, at a chosen event"
    def __init__(self, event, error): self.error,self.at = error,event
    def __call__(self, name):
        if name == self.at and self.learn.training and self.learn.iter == 1: raise self.error
        return super().__call__(name)


@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt()], ids=['error', 'interrupt'])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_batch'])
def test_no_hooks_left_after_an_error(event, error):
    learn, student, teacher, cb = build(LIGHT)
    seen, n_metrics = snapshot(teacher.train()), len(learn.metrics)
    boom = Boom(event, error); boom.order = 8
    with quiet(learn), pytest.raises(type(error)): learn.fit(1, cbs=boom)
    assert n_hooks(student) == n_hooks(teacher) == 0 and len(learn.metrics) == n_metrics and '_do_epoch' not in learn.__dict__
    assert len(learn.opt.all_params()) == len(list(student.parameters()))
    same(seen, snapshot(teacher))
    learn.remove_cb(learn.cbs.filter(lambda o: o is boom)[0]) if boom in learn.cbs else None
    with quiet(learn): learn.fit(1)                     # and it goes on


def test_error_in_the_students_forward_or_the_data():
    learn, student, teacher, cb = build(LIGHT)
    seen = snapshot(teacher)
    handle = student[-1].register_forward_hook(lambda m, i, o: (_ for _ in ()).throw(ValueError('forward')) if m.training else None)
    with quiet(learn), pytest.raises(ValueError, match='forward'): learn.fit(1)
    handle.remove()
    class Bad(list):
        def __getitem__(self, i):
            if i == 20: raise OSError('broken file')
            return super().__getitem__(i)
    learn.dls.train.dataset = Bad(learn.dls.train.dataset)
    with quiet(learn), pytest.raises(OSError, match='broken file'): learn.fit(1)
    assert n_hooks(student) == n_hooks(teacher) == 0 and len(learn.opt.all_params()) == len(list(student.parameters()))
    same(seen, snapshot(teacher))


def test_no_gradient_reaches_the_teacher():
    learn, student, teacher, cb = build(LIGHT)
    teacher.requires_grad_(True)
    with quiet(learn): learn.fit(1)
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_given_as_a_learner_with_its_own_mode():
    learn, student, teacher, _ = build(LIGHT)
    seen = snapshot(teacher.train())
    new = make_learner(student, cbs=DiffKDCallback(make_learner(teacher), verbose=False))
    with quiet(new): new.fit(1)
    same(seen, snapshot(teacher))


# ---- 3: outside training the teacher does not run

@pytest.mark.parametrize('pair', [p if p in (LIGHT, 'vit<-resnet18') else pytest.param(p, marks=pytest.mark.slow) for p in PAIRS])
def test_validation_costs_no_teacher_forward_and_is_the_students_own(pair):
    learn, student, teacher, cb = build(pair, latent=32)
    with quiet(learn): learn.fit(1, 1e-3)
    count, row, names = CountCalls(teacher), list(learn.recorder.values[-1]), list(learn.recorder.metric_names)
    with quiet(learn):
        loss, acc = learn.validate()
        preds, targs = learn.get_preds()
    assert count.n == 0
    student.eval()
    x, y = map(torch.stack, zip(*learn.dls.valid.dataset))
    with torch.no_grad(): z = student(x)
    assert abs(loss - F.cross_entropy(z, y).item()) < 1e-4 and abs(acc - (z.argmax(1) == y).float().mean().item()) < 1e-6
    assert torch.allclose(preds, z.softmax(1), atol=1e-5) and torch.equal(targs, y)
    assert row[1] == pytest.approx(loss, abs=1e-5) and row[2] == pytest.approx(acc)
    assert names[:4] == ['epoch', 'train_loss', 'valid_loss', 'accuracy'] and names[4:9] == ['task', 'kd', 'diffusion', 'reconstruction', 'gamma']


def image_dls(tmp_path):
    from PIL import Image
    rng = np.random.RandomState(0)
    for split in ('train', 'valid'):
        for c in 'ab':
            (tmp_path/split/c).mkdir(parents=True)
            for i in range(6): Image.fromarray(rng.randint(0, 255, (32, 32, 3), np.uint8)).save(tmp_path/split/c/f'{i}.png')
    return ImageDataLoaders.from_folder(tmp_path, valid='valid', bs=4, num_workers=0, device='cpu')


def test_predict_show_results_and_plot_loss(tmp_path):
    dls, teacher = image_dls(tmp_path), torchvision.models.resnet18(num_classes=2)
    learn = vision_learner(dls, torchvision.models.resnet18, pretrained=False, metrics=accuracy, cbs=DiffKDCallback(teacher, latent=32, verbose=False))
    with quiet(learn): learn.fine_tune(1, 1e-3)
    count = CountCalls(teacher)
    with quiet(learn):
        learn.predict(next(iter((tmp_path/'train'/'a').iterdir())))
        learn.show_results(); learn.tta(n=1)
    assert count.n == 0
    ax = learn.recorder.plot_loss(skip_start=0)
    valid = ax.lines[-1].get_ydata()
    assert [float(v) for v in valid] == [pytest.approx(r[1]) for r in learn.recorder.values]
    plt.close('all')


# ---- 4: nothing of the teacher in what is saved, copied or exported

def size_of(obj):
    import io, cloudpickle
    f = io.BytesIO(); torch.save(obj, f, pickle_module=cloudpickle); return f.tell()


def answer_without_this_package(folder):
    "Open an export where `diffkd_nb` cannot be imported"
    class Refuse:
        def find_spec(self, name, *a):
            if name.split('.')[0] == 'diffkd_nb': raise ImportError('not installed')
    for name in [n for n in sys.modules if n.split('.')[0] == 'diffkd_nb']: del sys.modules[name]
    sys.meta_path.insert(0, Refuse())
    with pytest.raises(ImportError, match='not installed'): import diffkd_nb
    learn = load_learner(folder/'distilled.pkl')
    with torch.no_grad(): torch.save(learn.model.eval()(torch.load(folder/'x.pt')), folder/'y.pt')


def test_export_holds_no_teacher_and_opens_without_this_package(tmp_path):
    dls, student, teacher = image_dls(tmp_path), tm('resnet10t'), vit(32)
    student.fc, teacher.head = nn.Linear(512, 2), nn.Linear(192, 2)
    plain = make_learner(deepcopy(student), dls=dls)
    learn = make_learner(student, dls=dls, cbs=DiffKDCallback(teacher, verbose=False, latent=32))
    for l in (learn, plain):
        with quiet(l): l.fit(1, 1e-3)
        l.path = tmp_path
    learn.export('distilled.pkl'); plain.export('unlearned.pkl')     # names of one length: the archive repeats them
    a, b = ((tmp_path/n).stat().st_size for n in ('distilled.pkl', 'unlearned.pkl'))
    assert a < b + 1000, f'{a - b} bytes more than an export without the callback'
    assert b'diffkd' not in (tmp_path/'distilled.pkl').read_bytes()
    x = torch.randn(2, 3, 32, 32); torch.save(x, tmp_path/'x.pt')
    r = workers.call(answer_without_this_package, tmp_path)
    assert r.returncode == 0, r.stdout + r.stderr
    with torch.no_grad(): assert torch.allclose(torch.load(tmp_path/'y.pt'), student.eval()(x), atol=1e-6)


class During(Callback):
    "Copies and pickles the model in the middle of a step, the Learner at the end of an epoch"
    order = 70
    def after_batch(self):
        if self.iter == 1 and self.training: self.made = pickle.loads(pickle.dumps(self.learn.model)), deepcopy(self.learn.model)
    def after_epoch(self):
        self.learn.remove_cb(ProgressCallback)
        self.learners = pickle.loads(pickle.dumps(self.learn)), deepcopy(self.learn)


def test_pickle_and_copy_from_inside_a_fit():
    learn, student, teacher, cb = build(LIGHT)
    with quiet(learn): learn.fit(1, cbs=(during := During()))
    for m in during.made: assert n_hooks(m) == 0 and list(m.state_dict()) == list(student.state_dict())
    for new in during.learners:
        assert not any(isinstance(c, DistillCallback) for c in new.cbs) and new.diff_kd in new.cbs
        new.remove_cbs([c for c in new.cbs if isinstance(c, During)])
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); new.fit(1)


def test_save_and_load(tmp_path):
    learn, student, teacher, cb = build(LIGHT)
    learn.path = tmp_path
    with quiet(learn): learn.fit(1, 1e-3)
    plain = make_learner(sequential(6)); plain.path = tmp_path
    learn.save('s'); plain.load('s')                    # a Learner that never saw the callback reads model and optimiser
    assert all(torch.equal(a, b) for a,b in zip(student.parameters(), plain.model.parameters()))
    learn.load('s')
    with quiet(learn): learn.fit(1, 1e-3)


def test_student_state_dict_has_no_adapters():
    learn, student, *_ = build('mobilenet_v2<-timm_resnet26', latent=32)
    with quiet(learn): learn.fit(1, 1e-3)
    assert list(student.state_dict()) == list(tv('mobilenet_v2').state_dict())


def test_ema_copies_no_teacher():
    from timm.utils import ModelEmaV2
    learn, student, teacher, cb = build(LIGHT)
    class Ema(Callback):
        order = 4                                       # before ours: copies while the student's hooks could be there
        def before_fit(self): self.avg = ModelEmaV2(self.model, decay=.5)
        def after_pred(self): self.late = deepcopy(self.model)
        def after_step(self): self.avg.update(self.model)
    with quiet(learn): learn.fit(1, 1e-3, cbs=(e := Ema()))
    for m in (e.avg.module, e.late): assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in student.parameters())
    x = torch.randn(2, 3, 32, 32)
    assert e.late.eval()(x).shape == (2, K) and not cb.kd._student_capture.out


def test_a_deep_copy_has_no_teacher_and_says_so():
    learn, student, teacher, cb = build(LIGHT)
    with quiet(learn): learn.fit(1)
    new = deepcopy(learn)
    assert not any(isinstance(c, DistillCallback) for c in new.cbs) and any(isinstance(c, TeacherlessCallback) for c in new.cbs)
    with quiet(new), pytest.warns(UserWarning, match='no teacher'): new.fit(1)


# ---- 5: the distiller trains under every fastai habit

HABITS = {
    'fit': lambda l: l.fit(1, 1e-3),
    'fit_one_cycle': lambda l: l.fit_one_cycle(1, 1e-3),
    'fit_flat_cos': lambda l: l.fit_flat_cos(1, 1e-3),
    'slice': lambda l: l.fit_one_cycle(1, slice(1e-4, 1e-3)),
    'fine_tune': lambda l: l.fine_tune(1, 1e-3),
    'freeze': lambda l: (l.freeze(), l.fit(1, slice(1e-3))),
    'unfreeze': lambda l: (l.freeze(), l.unfreeze(), l.fit(1, 1e-3)),
    'second fit': lambda l: (l.fit(1, 1e-3), l.fit(1, 1e-3)),
    'reset_opt': lambda l: (l.fit(1, 1e-3), l.fit(1, 1e-3, reset_opt=True)),
    'mixup': lambda l: l.fit(1, 1e-3, cbs=MixUp()),
    'cutmix': lambda l: l.fit(1, 1e-3, cbs=CutMix()),
    'accumulation': lambda l: l.fit(1, 1e-3, cbs=GradientAccumulation(16)),
    'clip': lambda l: l.fit(1, 1e-3, cbs=GradientClip(1.)),
    'after lr_find': lambda l: (l.lr_find(num_it=6, show_plot=False), l.fit(1, 1e-3)),
    'after export': lambda l: (l.fit(1, 1e-3), l.export(l.path/'e.pkl'), l.fit(1, 1e-3)),
}


@pytest.mark.parametrize('habit', HABITS)
@pytest.mark.parametrize('opt', ['fastai', 'torch'])
def test_distiller_trains(habit, opt, tmp_path):
    set_seed(0)
    teacher, body, head = sequential(20), sequential(6)[:6], sequential(6)[6:]
    cb = DiffKDCallback(teacher, verbose=False, inputs=torch.zeros(2, 3, 32, 32))
    learn = make_learner(nn.Sequential(body, head), cbs=cb, splitter=lambda m: [list(m[0].parameters()), list(m[1].parameters())], path=tmp_path,
                         opt_func=Adam if opt == 'fastai' else partial(OptimWrapper, opt=torch.optim.AdamW))
    before, frozen = weights(cb), [p.clone() for p in body.parameters() if p.dim() > 1]
    with quiet(learn): HABITS[habit](learn)
    assert moved(cb, before) == {n for n,_ in cb.distiller.named_parameters()}
    if habit == 'freeze': assert all(torch.equal(a, b) for a,b in zip(frozen, [p for p in body.parameters() if p.dim() > 1]))
    else: assert not all(torch.equal(a, b) for a,b in zip(frozen, [p for p in body.parameters() if p.dim() > 1]))
    assert [len(g) for g in learn.opt.param_lists] == [len(list(o.parameters())) for o in (body, head)]
    assert len(learn.opt.state_dict()['state']) <= len(list(learn.model.parameters()))


@pytest.mark.parametrize('arch', [torchvision.models.resnet18])
def test_vision_learner_freeze_and_fine_tune(arch):
    learn = vision_learner(tensor_dls(32), arch, pretrained=False, n_out=K, normalize=False, loss_func=CrossEntropyLossFlat(),
                           cbs=(cb := DiffKDCallback(tv('resnet34'), latent=32, verbose=False, inputs=torch.zeros(2, 3, 32, 32))))
    groups, before = [len(g) for g in (learn.create_opt() or learn.opt.param_lists)], weights(cb)
    with quiet(learn):
        learn.freeze(); learn.fit_one_cycle(1, slice(1e-3))
        rates = [h['lr'] for h in learn.opt.hypers]
        first = weights(cb)
        assert moved(cb, before) == {n for n,_ in cb.distiller.named_parameters()}
        learn.fine_tune(1, 1e-3)
    assert moved(cb, first) and [len(g) for g in learn.opt.param_lists] == groups and n_hooks(learn.model) == 0
    plain = vision_learner(tensor_dls(32), arch, pretrained=False, n_out=K, normalize=False, loss_func=CrossEntropyLossFlat())
    with quiet(plain): plain.freeze(); plain.fit_one_cycle(1, slice(1e-3))
    assert rates == [h['lr'] for h in plain.opt.hypers]   # discriminative rates as without the callback


def test_lr_find_leaves_everything_as_it_was(tmp_path):
    for fits in (0, 1):
        learn, student, teacher, cb = build(LIGHT)
        learn.path = tmp_path
        with quiet(learn):
            if fits: learn.fit(1, 1e-3)
            before = deepcopy((student.state_dict(), cb.state_dict(), learn.opt.hypers if fits else None))
            learn.lr_find(num_it=8, show_plot=False)
        after = (student.state_dict(), cb.state_dict(), learn.opt.hypers if fits else None)
        for a,b in ((before[0], after[0]), (before[1]['distiller'], after[1]['distiller'])): assert all(torch.equal(a[k], b[k]) for k in a)
        assert len(before[1]['optimizer']) == len(after[1]['optimizer'])
        for a,b in zip(before[1]['optimizer'], after[1]['optimizer']):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
        assert before[2] is None or [dict(h) for h in before[2]] == [dict(h) for h in after[2]]


def test_second_fit_keeps_the_distillers_momentum():
    learn, student, teacher, cb = build(LIGHT)
    steps = lambda: {s['step'] for s in cb.state_dict()['optimizer']}
    with quiet(learn): learn.fit(1, 1e-3); assert steps() == {3}; learn.fit(2, 1e-3); assert steps() == {9}
    with quiet(learn): learn.fit(1, 1e-3, reset_opt=True); assert steps() == {3}


def test_weight_decay_spares_the_distillers_norms_and_biases():
    learn, student, teacher, cb = build(LIGHT, kd_weight=0., diffusion_weight=0., reconstruction_weight=0.)
    learn.opt_func, before = SGD, weights(cb)
    with quiet(learn): learn.fit(1, .1, wd=.1)          # no gradient: only weight decay can move anything
    decayed = moved(cb, before)
    assert decayed == {n for n,p in cb.distiller.named_parameters() if p.dim() > 1}


def test_task_loss_is_what_it_is_without_the_callback():
    "With all weights zero the student is bit-equal to one that was never distilled"
    for pair in (LIGHT, 'resnet10t<-deit'):
        learn, student, *_ = build(pair, latent=32, kd_weight=0., diffusion_weight=0., reconstruction_weight=0.)
        alone = make_learner(deepcopy(student), PAIRS[pair][2])
        for l in (learn, alone):
            set_seed(1, reproducible=True); l.dls.train.rng = random.Random(7)
            with quiet(l): l.fit_one_cycle(2, 1e-2)
        assert all(torch.equal(a, b) for a,b in zip(student.state_dict().values(), alone.model.state_dict().values()))


def test_state_dict_carries_a_training_on():
    "Distiller, momentum and noise continue elsewhere: two epochs at once equal one, saved, loaded, and one more"
    def run(split):
        learn, student, teacher, cb = build(LIGHT)
        with quiet(learn):
            learn.fit(1, 1e-3, wd=0.); set_seed(2); learn.dls.train.rng = random.Random(7)
            if not split: learn.fit(1, 1e-3, wd=0.); return student, cb
            saved = deepcopy((student.state_dict(), learn.opt.state_dict(), cb.state_dict()))
        learn, student, teacher, cb = build(LIGHT)
        student.load_state_dict(saved[0]); learn.create_opt(); learn.opt.load_state_dict(saved[1]); cb.load_state_dict(saved[2])
        set_seed(2); learn.dls.train.rng = random.Random(7)
        with quiet(learn): learn.fit(1, 1e-3, wd=0.)
        return student, cb
    (a, ca), (b, cb) = run(False), run(True)
    assert all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))
    assert all(torch.equal(p, q) for p,q in zip(ca.distiller.state_dict().values(), cb.distiller.state_dict().values()))


# ---- 8 and 10: numerics and speed that a step depends on

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', ['feature', 'feature with autoencoder', 'logits'])
def test_twenty_steps_under_autocast(kind, dtype):
    torch.manual_seed(0)
    tap = DiffKD(12, 24, 'logits' if kind == 'logits' else 'feature', latent=16 if 'auto' in kind else None)
    shape = (16,) if kind == 'logits' else (16, 4, 4)
    s, t = (torch.randn(shape[0], c, *shape[1:]) for c in (12, 24))
    opt, first = torch.optim.SGD(tap.parameters(), 1e-2), None
    for i in range(20):
        draws = tap.draw(s, t)
        with torch.autocast('cpu', dtype): out = tap(s, t, *draws)
        loss = out.kd_loss + out.diffusion_loss + out.reconstruction_loss
        assert loss.dtype == torch.float32 and torch.isfinite(loss), f'step {i}: {loss}'
        if i == 0:
            ref = deepcopy(tap)(s, t, *draws)
            assert loss.item() == pytest.approx((ref.kd_loss + ref.diffusion_loss + ref.reconstruction_loss).item(), rel=.03)
        opt.zero_grad(); loss.backward(); opt.step()
    assert all(torch.isfinite(p).all() for p in tap.parameters()) and tap.schedule.signal.dtype == torch.float32


def tiny_distiller(**kw):
    s, t = sequential(6), sequential(20)
    plan = plan_taps(s, t, torch.randn(2, 3, 32, 32))
    return DiffKDDistiller(plan, latent=8, **kw), {'feature': torch.randn(8, 12, 8, 8), 'logits': torch.randn(8, K, 1, 1)}, {'feature': torch.randn(8, 40, 8, 8), 'logits': torch.randn(8, K, 1, 1)}


@pytest.mark.parametrize('kw', [{'steps': 1}, *(pytest.param(kw, marks=pytest.mark.slow) for kw in ({}, {'steps': 2}, {'denoiser': 'identity'}, {'start': 'gamma'},
    {'adapter': False}, {'logits_loss': 'dist', 'start': 'paper', 'steps': 3}, {'trained_by': 'diffusion'}, {'trained_by': 'kd', 'norms': 'separate'}))], ids=str)
def test_the_whole_distiller_compiles_without_a_graph_break(kw):
    torch._dynamo.reset()
    d, s, t = tiny_distiller(**kw)
    plain, fast = deepcopy(d), torch.compile(d, fullgraph=True, backend='aot_eager')
    for x in s.values(): x.requires_grad_()
    res = []
    for f in (plain, fast):
        torch.manual_seed(3); losses = f(s, t); grads = torch.autograd.grad(sum(losses.values()), list(s.values()))
        res.append((losses, grads))
    for k in res[0][0]: assert torch.allclose(torch.as_tensor(res[0][0][k]), torch.as_tensor(res[1][0][k]), rtol=1e-4, atol=1e-6), k
    for a,b in zip(res[0][1], res[1][1]): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_taps_train_like_plain_ones(monkeypatch):
    torch._dynamo.reset()
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, 'compile', lambda self, *a, **k: compile(self, *a, backend='aot_eager', **k))
    runs = []
    for c in (False, True):
        learn, student, teacher, cb = build(LIGHT, compile=c)
        with quiet(learn): learn.fit(1, 1e-3)
        runs.append(student)
    for a,b in zip(*[r.state_dict().values() for r in runs]): assert torch.allclose(a.float(), b.float(), atol=1e-4)


def test_a_compiled_student_is_tapped():
    torch._dynamo.reset()
    set_seed(0)
    student = sequential(6)
    cb = DiffKDCallback(sequential(20), verbose=False, inputs=torch.zeros(2, 3, 32, 32))
    learn = make_learner(torch.compile(student, backend='eager'), cbs=cb)
    before = weights(cb)
    with quiet(learn): learn.validate(); learn.fit(2, 1e-3)
    assert moved(cb, before) and n_hooks(student) == 0


def test_no_host_synchronisation_inside_a_step():
    from torch.utils._python_dispatch import TorchDispatchMode
    class Ops(TorchDispatchMode):
        names = []
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            self.names.append(str(f)); return f(*args, **(kwargs or {}))
    d, s, t = tiny_distiller()
    with Ops() as ops: sum(d(s, t).values()).backward()
    waits = {n for n in ops.names if any(w in n for w in ('_local_scalar_dense', 'nonzero', 'is_nonzero', 'equal.default', 'masked_select'))}
    assert len(ops.names) > 200 and not waits, waits


# ---- options

@pytest.mark.parametrize('widths', [(1, 1), (1, 3), (5, 2), (7, 33), (40, 3)], ids=str)
def test_other_channel_counts(widths):
    "Also fewer channels than the bottleneck divides by, and a student wider than its teacher"
    set_seed(0)
    learn = make_learner(sequential(widths[0]), cbs=(cb := DiffKDCallback(sequential(widths[1]), verbose=False, inputs=torch.zeros(2, 3, 32, 32))))
    before = weights(cb)
    with quiet(learn): learn.fit(1, 1e-3)
    assert moved(cb, before) and cb.plan[0].student.shape[0] == 2*widths[0] and cb.plan[0].teacher.shape[0] == 2*widths[1]


@pytest.mark.parametrize('kw', [dict(adapter=False), dict(denoiser='identity'), dict(denoiser='identity', adapter=False), dict(start='paper'), dict(start=200, steps=3),
                                dict(steps=1), dict(latent=4), dict(logits_loss='dist'), dict(feature_loss='attention_mse'), dict(temperature=4.),
                                dict(denoiser='mlp', feature_loss='cosine'), dict(denoiser='transformer', feature_loss='swd'),
                                dict(align='teacher'), dict(align='student'), dict(start='gamma'),
                                dict(trained_by='diffusion'), dict(trained_by='kd'), dict(norms='separate'), dict(norms='separate', trained_by='diffusion', start='gamma'), dict(taps=['logits']), dict(taps=['feature']), dict(weights={'logits': .5}),
                                dict(taps=[('2', '2'), ('5', '5'), 'logits'], distances={'2': 'dist'}), dict(task_weight=.5)], ids=str)
def test_options_train(kw):
    learn, student, teacher, cb = build(LIGHT, **kw)
    before = weights(cb)
    with quiet(learn): learn.fit(1, 1e-3)
    assert moved(cb, before) and all(np.isfinite(v) for v in learn.recorder.values[0])
    assert len(cb.plan) == len(kw.get('taps', 'ab'))
    if kw.get('adapter') is False: assert cb.means['gamma'] == pytest.approx(1.)
    if kw.get('denoiser') == 'identity': assert cb.means['diffusion'] == 0.
    if cb.means['reconstruction']: assert 'latent' in kw


def test_columns_add_up():
    "train loss of a first step = task + kd + diffusion + reconstruction"
    learn, student, teacher, cb = build(LIGHT, latent=8)
    learn.dls = tensor_dls(n=8)
    with quiet(learn): learn.fit(1, 1e-3)
    m = cb.means
    assert learn.recorder.losses[0].item() == pytest.approx(m['task'] + m['kd'] + m['diffusion'] + m['reconstruction'], rel=1e-5) and 0 < m['gamma'] < 1


@pytest.mark.parametrize('how', ['constructor', 'add_cb', 'fit'])
def test_any_way_to_attach(how, capsys):
    set_seed(0)
    cb, student = DiffKDCallback(sequential(20)), sequential(6)
    learn = make_learner(student, cbs=cb if how == 'constructor' else None)
    if how == 'add_cb': learn.add_cb(cb)
    with quiet(learn): learn.fit(2, cbs=cb if how == 'fit' else None)
    assert capsys.readouterr().out.count('added parameters') == 1
    assert {'task', 'kd', 'gamma'} <= set(learn.recorder.metric_names)
    if how != 'constructor': learn.remove_cb(cb) if how == 'add_cb' else None
    with quiet(learn): learn.validate()


def test_two_distillation_callbacks_are_refused():
    learn, student, teacher, cb = build(LIGHT)
    with quiet(learn), pytest.raises(ValueError, match='two distillation callbacks'): learn.fit(1, cbs=DiffKDCallback(sequential(8), verbose=False))
    assert n_hooks(student) == 0


def test_a_replaced_model_gets_a_new_plan():
    learn, student, teacher, cb = build(LIGHT)
    old = cb.distiller
    learn.model, learn.opt = sequential(9), None
    with quiet(learn): learn.fit(1, 1e-3)
    assert cb.distiller is not old and cb.plan[0].student.shape[0] == 18


def test_plain_kd_by_the_same_callback():
    set_seed(0)
    student, teacher = sequential(6), sequential(20)
    learn = make_learner(student, cbs=DistillCallback(teacher, KD, taps=['logits'], verbose=False))
    with quiet(learn): learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names)[4:6] == ['task', 'kd']


def test_smaller_images_later():
    "Progressive resizing: the plan stands, the maps are aligned as they come"
    learn, student, teacher, cb = build(LIGHT)
    with quiet(learn): learn.fit(1, 1e-3); learn.dls = tensor_dls(48); learn.fit(1, 1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize('half', ['to_fp16', 'to_bf16'])
def test_mixed_precision_through_the_learner(half):
    learn, student, teacher, cb = build(LIGHT)
    learn.dls.cuda(); before = weights(cb)
    with quiet(getattr(learn, half)()): learn.fit(7, 1e-3)
    cb.distiller.cpu()          # where its first weights are
    assert moved(cb, before) and all(np.isfinite(v) for r in learn.recorder.values for v in r)
    assert next(teacher.parameters()).device.type == 'cpu'
