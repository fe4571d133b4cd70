"What Learners bring along: shapes, modes, inputs, changes between fits, and what is saved"
import pickle, warnings
import pytest
from pairs import *
from copy import deepcopy
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.data.load import SkipItemException
from torch.utils.checkpoint import checkpoint
from diffkd_nb.callback import DiffKDCallback, DistillCallback, TeacherlessCallback
from diffkd_nb.distillation import Distillation
from diffkd_nb.methods import METHODS
from diffkd_nb.taps import Capture, plan_taps

X = torch.zeros(2, 3, 32, 32)
def learner_of(student, cb, **kw): return make_learner(student, cbs=cb, **kw)
def fit(learn, *a, **kw):
    with quiet(learn): learn.fit(*a, **kw)
def kd(teacher=None, **kw): return DistillCallback(teacher or sequential(20), kw.pop('method', 'kd'), verbose=False, **kw)


class Series(nn.Module):
    def __init__(self, w): super().__init__(); self.body,self.fc = nn.Sequential(nn.Conv1d(3, w, 3, padding=1), nn.ReLU()),nn.Linear(w, K)
    def forward(self, x): return self.fc(self.body(x).mean(2))


def test_a_convolution_in_one_dimension_gives_channels_first():
    plan = plan_taps(Series(16), Series(64), torch.randn(4, 3, 25), taps=['feature'])
    assert (plan[0].student.shape, plan[0].teacher.shape) == ((16, 25, 1), (64, 25, 1))


def test_the_batch_must_stand_in_front():
    class First(nn.Module):
        def __init__(self): super().__init__(); self.embed,self.head = nn.Linear(3, 8),nn.Linear(8, K)
        def forward(self, x): return self.head(self.embed(x.transpose(0, 1)).mean(0))
    with pytest.raises(ValueError, match='batch of 4 has to stand on axis 0'): plan_taps(First(), First(), torch.randn(4, 9, 3), taps=['feature'])


def test_a_module_that_runs_twice_is_named_by_its_call():
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.relu,self.fc = nn.Conv2d(3, 4, 3),nn.Conv2d(4, 4, 3),nn.ReLU(),nn.Linear(4, K)
        def forward(self, x): return self.fc(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))
    m, x = Twice(), torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match="'relu#1' to 'relu#2'"): plan_taps(m, Twice(), x, taps=[('relu', 'a')])
    plan = plan_taps(m, Twice(), x, taps=[('relu#1', 'a'), ('relu#2', 'a')])
    with Capture(m, {t.name: t.student for t in plan}) as c: m(x); maps = c.maps()
    first = m.a(x).relu()
    assert torch.equal(maps['relu#1~a'], first) and torch.equal(maps['relu#2~a'], m.b(first).relu())


def test_what_is_changed_in_place_is_copied():
    class InPlace(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.fc = nn.Conv2d(3, 4, 3),nn.Linear(4, K)
        def forward(self, x): return self.fc(self.conv(x).relu_().mean((2, 3)))
    m, x = InPlace(), torch.randn(2, 3, 9, 9)
    place = plan_taps(m, InPlace(), x)[0].student
    with Capture(m, {'f': place}) as c: m(x); assert torch.equal(c.maps()['f'], m.conv(x))


def test_a_reentrant_checkpoint_is_refused():
    class Saving(nn.Module):
        def __init__(self): super().__init__(); self.conv,self.fc = nn.Conv2d(3, 4, 3),nn.Linear(4, K)
        def forward(self, x): return self.fc((checkpoint(self.conv, x, use_reentrant=True) if self.training else self.conv(x)).mean((2, 3)))
    with pytest.raises(ValueError, match='use_reentrant=False'): plan_taps(Saving(), sequential(8), torch.randn(2, 3, 9, 9), taps=[('conv', '5')])


@pytest.mark.parametrize('how', ['namedtuple', 'tuple'])
def test_training_mode_gives_more(how):
    from collections import namedtuple
    Out = namedtuple('Out', 'logits aux')
    class Aux(nn.Module):
        def __init__(self): super().__init__(); self.body,self.fc,self.aux = sequential(6)[:-1],nn.Linear(12, K),nn.Linear(12, K)
        def forward(self, x):
            f = self.body(x); both = self.fc(f), self.aux(f)
            return both[0] if not self.training else Out(*both) if how == 'namedtuple' else both
    m = Aux(); before, asked = deepcopy(m.state_dict()), dict(taps=['logits'])
    if how == 'namedtuple': assert plan_taps(m, sequential(8), X, **asked)[0].student.key == 'logits'
    else:
        with pytest.raises(ValueError, match='output_key'): plan_taps(m, sequential(8), X, **asked)
        assert plan_taps(m, sequential(8), X, **asked, output_key=1)[0].student.key == 1
    assert all(torch.equal(a, b) for a,b in zip(before.values(), m.state_dict().values()))      # statistics are put back


def test_a_softmax_at_the_end_is_noticed():
    with pytest.warns(UserWarning, match="teacher's output looks like probabilities"): plan_taps(sequential(6), nn.Sequential(sequential(8), nn.Softmax(1)), X, taps=['logits'])


def test_nothing_is_loaded_ahead():
    class Counted(Pairs):
        n = 0
        def __getitem__(self, i): Counted.n += 1; return super().__getitem__(i)
    learn = learner_of(sequential(6), DiffKDCallback(sequential(20), verbose=False))
    learn.dls.train.dataset = Counted(learn.dls.train.dataset)
    fit(learn, 1)
    assert Counted.n == 24 + 1          # each item once, and the one by which fastai counts the inputs


@pytest.mark.parametrize('name', METHODS)
def test_making_the_callback_draws_nothing(name):
    teacher = sequential(20)
    before = torch.get_rng_state(); kd(teacher, method=name); DiffKDCallback(teacher, verbose=False, latent=8)
    assert torch.equal(before, torch.get_rng_state())


def test_a_replaced_stage_and_a_pruned_one():
    learn = learner_of(sequential(6), DiffKDCallback(sequential(20), verbose=False)); fit(learn, 1)
    d = learn.diff_kd.distiller
    learn.model[4] = deepcopy(learn.model[4]); learn.model[5] = nn.ReLU(); learn.create_opt(); fit(learn, 1)
    assert learn.diff_kd.distiller is d
    learn.model[3],learn.model[4],learn.model[8] = nn.Conv2d(6, 7, 3, 2, 1),nn.BatchNorm2d(7),nn.Linear(7, K)
    learn.create_opt(); fit(learn, 1)
    assert learn.diff_kd.distiller is not d and learn.diff_kd.plan[0].student.shape == (7, 8, 8)


def test_other_data_get_another_memory():
    learn = learner_of(sequential(6), kd(method='crd', k=8)); fit(learn, 1)
    d = learn.distill.distiller; learn.dls = tensor_dls(n=16, seed=3); fit(learn, 1)
    assert learn.distill.distiller is not d and len(learn.distill.distiller.memory_student) == 16


def test_inputs_are_handed_over_right():
    class Spoils(nn.Module):
        def __init__(self): super().__init__(); self.m = sequential(20)
        def forward(self, x): return self.m(x.mul_(0))
    learn = learner_of(sequential(6), kd(Spoils())); seen = []
    class Look(Callback):
        order = 7
        def after_loss(self): seen.append(float(self.xb[0].abs().sum()))
    fit(learn, 1, cbs=Look()); assert min(seen) > 0


def test_a_half_precision_teacher():
    t = sequential(20).eval(); half = deepcopy(t).bfloat16()
    with Distillation(sequential(6), half, 'kd', xb=X) as d:
        x = torch.randn(4, 3, 32, 32); d.student(x); got = d(x).teacher['logits'].flatten(1)
    assert torch.allclose(got.float(), half(x.bfloat16()).float()) and torch.allclose(got.float(), t(x), atol=.05)


def test_a_script_teacher_gives_its_logits():
    t = sequential(20).eval(); script = torch.jit.trace(t, torch.randn(2, 3, 32, 32))
    fit(learner_of(sequential(6), kd(script)), 1)
    with pytest.raises(ValueError, match='TorchScript'): plan_taps(sequential(6), script, X, taps=['feature'])


def test_data_without_labels():
    x = torch.randn(24, 3, 32, 32)
    def dls(): return DataLoaders.from_dsets([(a,) for a in x], [(a,) for a in x[:8]], bs=8, device='cpu', num_workers=0)
    learn = Learner(dls(), sequential(6), loss_func=CrossEntropyLossFlat(), cbs=kd(task_weight=0)); before = deepcopy(learn.model.state_dict())
    fit(learn, 1)
    assert not torch.equal(before['0.weight'], learn.model[0].weight) and isinstance(learn.loss_func, CrossEntropyLossFlat)
    with pytest.raises(ValueError, match='task_weight=0'): fit(Learner(dls(), sequential(6), loss_func=CrossEntropyLossFlat(), cbs=kd()), 1)


@pytest.mark.parametrize('kw', [dict(task_weight=-1), dict(temperature=float('inf')), dict(task_weight=float('nan'))], ids=str)
def test_numbers_that_mean_nothing(kw):
    with pytest.raises(ValueError, match='must be a'): kd(**kw)


def test_one_callback_for_two_learners():
    cb = kd(); first = learner_of(sequential(6), cb); learner_of(sequential(6), cb)
    assert any(isinstance(c, TeacherlessCallback) for c in first.cbs)
    with pytest.warns(UserWarning, match='given to another one'): fit(first, 1)


def test_a_pickled_learner_says_that_it_has_no_teacher():
    learn = learner_of(sequential(6), kd()); learn.remove_cb(ProgressCallback)
    new = pickle.loads(pickle.dumps(learn))
    with new.no_logging(), pytest.warns(UserWarning, match='no teacher'): new.fit(1)
    with warnings.catch_warnings(): warnings.simplefilter('error'); new.validate()


@pytest.mark.parametrize('event', ['before_batch', 'after_loss', 'after_batch', 'after_train', 'after_epoch'])
def test_taken_out_of_a_fit(event):
    cb = kd(); learn = learner_of(sequential(6), cb)
    def go(self):
        if cb.learn is not None and (self.learn.iter == 1 or 'batch' not in event and 'loss' not in event): self.learn.remove_cb(cb)
    out = type('Out', (Callback,), {event: go, 'order': 65})()
    fit(learn, 2, cbs=out)
    assert '_do_epoch' not in vars(learn) and [m.name for m in learn.metrics] == ['accuracy'] and n_hooks(learn.model) == 0
    assert len(learn.opt.all_params()) == len(list(learn.model.parameters()))


def test_put_into_a_fit():
    cb = kd(); learn = learner_of(sequential(6), None)
    class Add(Callback):
        def before_train(self):
            if self.epoch == 1 and cb.learn is None: self.learn.add_cb(cb)
    fit(learn, 3, cbs=Add())
    assert cb.means['kd'] > 0 and '_do_epoch' not in vars(learn)


def test_resumed_with_files(tmp_path):
    def make(): set_seed(0); cb = DiffKDCallback(sequential(20), verbose=False, seed=1); return learner_of(sequential(6), cb, path=tmp_path), cb
    whole, _ = make(); whole.dls.train.shuffle = False; fit(whole, 4, 1e-3)
    a, cb = make(); a.dls.train.shuffle = False; fit(a, 2, 1e-3); a.save('half'); cb.save(tmp_path/'cb.pt')
    b, cb = make(); b.dls.train.shuffle = False; b.load('half'); cb.load(tmp_path/'cb.pt'); fit(b, 4, 1e-3, start_epoch=2)
    assert all(torch.equal(p, q) for p,q in zip(whole.model.state_dict().values(), b.model.state_dict().values()))


def test_watching_an_own_column(tmp_path):
    learn = learner_of(sequential(6), [kd(), SaveModelCallback(monitor='kd', comp=np.less)], path=tmp_path); fit(learn, 2)
    with quiet(learn): assert len(learn.get_preds()[0]) == 8 and len(learn.validate()) == 2
    fit(learn, 1)


def test_lookahead_with_two_teachers():
    learn = learner_of(sequential(6), a := DiffKDCallback(sequential(20), verbose=False), opt_func=ranger); fit(learn, 3)
    n = sum(p.numel() for p in learn.model.parameters())
    assert [sum(p.numel() for p in g) for g in learn.opt.slow_weights] == [n]
    learn.remove_cb(a); learn.add_cb(kd(method='fitnet')); fit(learn, 3)
    assert [sum(p.numel() for p in g) for g in learn.opt.slow_weights] == [n]


def test_skipped_items_and_mixed_ones():
    x, y = torch.randn(24, 3, 32, 32), torch.arange(24) % K
    x[:, 0, 0, 0] = torch.arange(24.)
    class Some:
        def __len__(self): return 24
        def __getitem__(self, i):
            if i in (3, 10): raise SkipItemException
            return x[i], y[i]
    told = []
    class Check(Callback):
        order = 7
        def after_loss(self): told.append(torch.equal(self.learn.distill.index(), self.xb[0][:, 0, 0, 0].long())) if self.training else None
    dl = DataLoader(Some(), bs=8, shuffle=True, device='cpu', num_workers=0)
    learn = Learner(DataLoaders(dl, dl), sequential(6), loss_func=CrossEntropyLossFlat(), cbs=kd(method='crd', k=8)); fit(learn, 1, cbs=Check())
    assert told == [True]*3
    with pytest.raises(ValueError, match='MixUp mixes two'): fit(learner_of(sequential(6), kd(method='crd', k=8)), 1, cbs=MixUp())
