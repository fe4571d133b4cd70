"What Learners bring along: shapes, modes, inputs, changes between fits, and what is saved"
import pickle, warnings
import pytest
from pairs import *
from copy import deepcopy
from fastai.callback.mixup import MixUp
from fastai.callback.tracker import SaveModelCallback
from fastai.data.load import SkipItemException
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.utils.checkpoint import checkpoint
from diffkd_nb.callback import DiffKDCallback, DistillCallback, TeacherlessCallback
from diffkd_nb.distillation import Distillation
from diffkd_nb.methods import KD, METHODS
from diffkd_nb.outputs import LEARNERS, method_table
from diffkd_nb.taps import plan_taps
from diffkd_nb.capture import Capture

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


@pytest.mark.parametrize('end,loss,says', [(nn.Softmax(1), CrossEntropyLossFlat(), 'seems to end in a softmax'), (nn.Sigmoid(), BCEWithLogitsLossFlat(), 'ends in a sigmoid')], ids=['softmax', 'sigmoid'])
@pytest.mark.parametrize('role', ['student', 'teacher'])
def test_a_softmax_or_sigmoid_at_the_end_is_noticed(role, end, loss, says):
    ends = lambda m, r: nn.Sequential(m, end) if r == role else m
    with pytest.raises(ValueError, match=f'the {role} {says}.*before the.*expected: take it off'): Learner(tensor_dls(), ends(sequential(6), 'student'), loss_func=loss, cbs=kd(ends(sequential(8), 'teacher'), inputs=X))


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


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_half_precision_teacher(dtype):
    t = sequential(20).eval(); half = deepcopy(t).to(dtype)
    with Distillation(sequential(6), half, 'kd', xb=X) as d:
        x = torch.randn(4, 3, 32, 32); d.student(x); got = d(x).teacher['logits'].flatten(1)
    assert torch.allclose(got.float(), half(x.to(dtype)).float()) and torch.allclose(got.float(), t(x), atol=.05)


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


# ---- what outputs mean, on Learners of every kind

def fields_net(k):
    "A network whose output is a dict"
    class Fields(nn.Module):
        def __init__(self): super().__init__(); self.body = sequential(6)
        def forward(self, x): z = self.body(x)[:, :k]; return dict(scores=z, length=z.norm(dim=1))
    return Fields()


class Wide(nn.Module):
    "A small network of `k` outputs behind an end of its own"
    def __init__(self, w, k, end=None): super().__init__(); self.body,self.fc,self.end = sequential(w)[:-1],nn.Linear(2*w, k),end or nn.Identity()
    def forward(self, x): return self.end(self.fc(self.body(x)))


def own_loss(pred, y): return ((pred - y)**2).mean()
def log_loss(pred, y): return F.nll_loss(pred.log(), y)

# kind as in `LEARNERS`: loss, what the models end in, targets
KINDS = {'one class': (CrossEntropyLossFlat(), None, lambda n, k: torch.arange(n) % k), 'several labels': (BCEWithLogitsLossFlat(), None, lambda n, k: (torch.rand(n, k) > .5).float()),
         'one label': (BCEWithLogitsLossFlat(), None, lambda n, k: (torch.rand(n, k) > .5).float()), 'values': (MSELossFlat(), None, torch.randn), 'one value': (L1LossFlat(), None, torch.randn),
         'ends in a softmax': (log_loss, nn.Softmax(1), lambda n, k: torch.arange(n) % k), 'ends in a sigmoid': (BCELossFlat(), nn.Sigmoid(), lambda n, k: (torch.rand(n, k) > .5).float()),
         'a distance of your own': (own_loss, None, torch.randn)}
TOLD = ('ends in a softmax', 'a distance of your own')      # whose loss is known to nobody


def pair_dls(x, y, bs=8): return DataLoaders.from_dsets(Pairs(zip(x, y)), Pairs(zip(x[:8], y[:8])), bs=bs, device='cpu', num_workers=0)


def of_kind(kind, method, **kw):
    set_seed(0); k, output = LEARNERS[kind]; loss, end, targets = KINDS[kind]
    cb = DistillCallback(Wide(20, k, end), method, verbose=False, output=output if kind in TOLD else None, **{**dict(crd=dict(k=8)).get(method, {}), **kw})
    return Learner(pair_dls(torch.randn(24, 3, 32, 32), targets(24, k)), Wide(6, k, end), loss_func=loss, cbs=cb)


def check_kind(kind, method):
    said = method_table().loc[method, kind]
    if said == 'works':
        learn = of_kind(kind, method); fit(learn, 2 if method == 'pskd' else 1, 1e-3)      # PS-KD has no past in its first epoch
        values = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
        assert all(np.isfinite(v) for v in values.values()) and any(values[n] != 0 for n in learn.distill.distiller.loss_names)
        return
    with pytest.raises(ValueError) as e: fit(of_kind(kind, method), 1, 1e-3)
    assert f"{said.removeprefix('refused: ')} [help: " in str(e.value) and METHODS[method].__name__ in said       # fastai says where


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', ['kd', 'diffkd', 'crd'])
def test_learners_of_every_kind(kind, method): check_kind(kind, method)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('method', [m for m in METHODS if m not in ('kd', 'diffkd', 'crd')])
def test_every_method_on_learners_of_every_kind(kind, method): check_kind(kind, method)


class Expect(Callback):
    "What the distance must be, batch by batch, from torch.distributions"
    order = 7
    def __init__(self, teacher, f): self.teacher,self.f,self.got = teacher,f,[]
    def after_loss(self):
        if not self.training: return
        with torch.no_grad(): self.got += [self.f(self.teacher.eval()(*self.xb), self.pred.detach()).item()]*len(self.yb[0])
    def value(self): return sum(self.got)/len(self.got)


def kl_of(make): return lambda t, s: kl_divergence(make(t), make(s)).reshape(len(t), -1).sum(1).mean()


@pytest.mark.parametrize('kind,distance', [('one class', kl_of(lambda z: Categorical(logits=z/2))), ('several labels', kl_of(lambda z: Bernoulli(logits=z/2))), ('one label', kl_of(lambda z: Bernoulli(logits=z/2))),
                                           ('ends in a softmax', kl_of(lambda p: Categorical(logits=p.log()/2))), ('ends in a sigmoid', kl_of(lambda p: Bernoulli(logits=p.logit()/2)))])
def test_kd_on_a_learner_is_the_divergence_of_torchs_distributions(kind, distance):
    learn = of_kind(kind, 'kd', temperature=2.); look = Expect(learn.distill.teacher, distance); fit(learn, 1, 1e-3, cbs=look)
    assert learn.distill.means['kd'] == pytest.approx(4*look.value(), rel=1e-3)


def test_a_loss_that_tells_nothing_is_named():
    with pytest.raises(ValueError, match="cannot tell from the loss own_loss.*output=.*'classes', 'labels', 'values'"): Learner(tensor_dls(), sequential(6), loss_func=own_loss, cbs=DiffKDCallback(sequential(8)))
    with pytest.raises(ValueError, match='loss own_loss'): Learner(tensor_dls(), sequential(6), loss_func=own_loss, cbs=kd(method='crd'))      # its negatives are of other classes
    named = kd(method=lambda plan: KD(plan), taps=[('8', '8')]); learn = Learner(tensor_dls(), sequential(6), loss_func=F.cross_entropy, cbs=named); fit(learn, 1)
    learn.loss_func = lambda z, y: F.cross_entropy(z, y)
    with pytest.raises(ValueError, match='loss .*lambda'): fit(learn, 1)
    fit(Learner(tensor_dls(), sequential(6), loss_func=lambda z, y: F.cross_entropy(z, y), cbs=kd(method='fitnet')), 1)      # looks at features alone


def test_another_loss_is_another_plan():
    learn = learner_of(sequential(6), kd()); fit(learn, 1); assert learn.distill.plan[0].output == 'classes'
    x, y = torch.randn(24, 3, 32, 32), (torch.rand(24, K) > .5).float()
    learn.dls, learn.loss_func, learn.metrics = pair_dls(x, y), BCEWithLogitsLossFlat(), []; fit(learn, 1)
    assert learn.distill.plan[0].output == 'labels'


def test_an_output_with_fields():
    def make(cb, key='scores'): return Learner(tensor_dls(), fields_net(K), loss_func=lambda o, y: F.cross_entropy(o[key], y), cbs=cb)
    cb = kd(fields_net(K), output='classes'); fit(make(cb), 1); assert cb.plan[0].student.key == 'scores'
    cb = DiffKDCallback(fields_net(K), output='classes', output_key='scores', verbose=False); fit(make(cb), 1); assert cb.means['kd'] > 0
    with pytest.raises(ValueError, match="no tensor called 'logits', but 'scores'"): fit(make(kd(fields_net(K), output='classes', output_key='logits')), 1)


# ---- other classes, other Learners

@pytest.mark.parametrize('classes', [[4, 0, 3], [4, None, 3]])
def test_classes_of_the_student_among_those_of_the_teacher(classes):
    set_seed(0); teacher, mine = Wide(20, 5), [i for i,c in enumerate(classes) if c is not None]
    theirs = [classes[i] for i in mine]
    learn = Learner(pair_dls(torch.randn(24, 3, 32, 32), torch.arange(24) % 3), Wide(6, 3), loss_func=CrossEntropyLossFlat(), cbs=kd(teacher, classes=classes, temperature=1.))
    look = Expect(teacher, lambda t, s: kl_of(lambda z: Categorical(logits=z))(t[:, theirs], s[:, mine])); fit(learn, 1, cbs=look)
    assert learn.distill.means['kd'] == pytest.approx(look.value(), rel=1e-3)


def test_classes_that_cannot_be():
    def make(cb): return Learner(pair_dls(torch.randn(24, 3, 32, 32), torch.arange(24) % 3), Wide(6, 3), loss_func=CrossEntropyLossFlat(), cbs=cb)
    for bad in ([0, 1], [0, 1, 5], [0, 0, 1], [None]*3, ['a', 'b', 'c']):
        with pytest.raises(ValueError, match="classes must have an entry for each of the student's 3 outputs"): make(kd(Wide(20, 5), classes=bad, inputs=X))
    with pytest.raises(ValueError, match='the student has 3 classes and the teacher 5.*classes='): make(kd(Wide(20, 5), inputs=X))
    with pytest.raises(ValueError, match="DKD uses the class of each sample.*use 'kd' or 'dist'"): make(kd(Wide(20, 5), method='dkd', classes=[0, None, 1], inputs=X))
    fit(make(kd(Wide(20, 5), method='dkd', classes=[4, 0, 1])), 1)


def named_dls(names, vocab=None, stats=None):
    x, y = torch.rand(24, 3, 16, 16), [names[i % len(names)] for i in range(24)]
    ds = Datasets(list(zip(x, y)), [[ItemGetter(0), lambda o: TensorImage(o)], [ItemGetter(1), Categorize(vocab=vocab, sort=vocab is None)]], splits=(range(16), range(16, 24)))
    return ds.dataloaders(bs=8, device='cpu', after_batch=[] if stats is None else [Normalize.from_stats(*stats)], num_workers=0)


def test_a_teachers_learner_is_asked_what_its_numbers_mean():
    names, half = ['cat', 'dog', 'fox'], ([.5]*3, [.25]*3)
    def make(dls, w=20, **kw): return Learner(dls, Wide(w, 3), loss_func=CrossEntropyLossFlat(), **kw)
    def go(teacher, dls, method='kd', **kw): fit(make(dls, 6, cbs=kd(teacher, method=method, **kw)), 1)
    other = make(named_dls(names, ['fox', 'cat', 'dog']))
    with pytest.raises(ValueError, match='the same in another order'): go(other, named_dls(names))
    go(other, named_dls(names), 'fitnet'); go(other.model, named_dls(names)); go(other, named_dls(names), classes=[1, 2, 0]); go(other, named_dls(names, ['fox', 'cat', 'dog']))
    with pytest.raises(ValueError, match="the teacher's input is normalised by .* and the student's not normalised"): go(make(named_dls(names, stats=half)), named_dls(names))
    go(make(named_dls(names, stats=half)), named_dls(names, stats=half)); go(make(named_dls(names, stats=half)), named_dls(names), teacher_transform=lambda x: (x - .5)/.25)


# ---- maps of scores, tables, text

def test_scores_of_positions():
    maps = lambda w, k=5: nn.Sequential(nn.Conv2d(3, w, 3, padding=1), nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, k, 1))
    set_seed(0); x, y = torch.randn(24, 3, 8, 8), torch.randint(0, 5, (24, 8, 8))
    def make(student, cb, axis=1): return Learner(pair_dls(x, y), student, loss_func=CrossEntropyLossFlat(axis=axis), cbs=cb)
    learn = make(maps(4), kd(maps(16), temperature=1.)); rows = lambda z: z.permute(0, 2, 3, 1).flatten(0, 2)
    look = Expect(learn.distill.teacher, lambda t, s: kl_of(lambda z: Categorical(logits=z))(rows(t), rows(s))); fit(learn, 1, cbs=look)
    assert learn.distill.means['kd'] == pytest.approx(look.value(), rel=1e-3)
    cb = DiffKDCallback(maps(16), taps=['feature'], verbose=False); fit(make(maps(4), cb), 1)
    assert (cb.plan[0].student.shape, cb.plan[0].teacher.shape) == ((4, 8, 8), (16, 8, 8))      # the map before the scores
    with pytest.raises(ValueError, match='DKD compares one set of scores'): fit(make(maps(4), kd(maps(16), method='dkd')), 1)


@pytest.mark.slow
def test_a_unet():
    set_seed(0); x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8, 32, 32))
    net = lambda arch: create_unet_model(arch, 3, (32, 32), pretrained=False)
    learn = Learner(pair_dls(x, y, 4), net(resnet18), loss_func=CrossEntropyLossFlat(axis=1), cbs=kd(net(resnet34))); fit(learn, 1)
    assert learn.distill.plan[0].student.shape == (3, 32, 32) and learn.distill.means['kd'] > 0
    learn = Learner(pair_dls(x, y, 4), net(resnet18), loss_func=CrossEntropyLossFlat(axis=1), cbs=DiffKDCallback(net(resnet34), taps=['feature'], latent=16, verbose=False)); fit(learn, 1)
    assert learn.diff_kd.plan[0].student.shape[1:] == (32, 32)


def table_learner(bunch, width, cb=None, columns=None, values=False):
    "A Learner of one of scikit-learn's tables, of the first columns alone where a number is given"
    from fastai.tabular.all import RegressionBlock, TabularDataLoaders, TabularModel, tabular_config
    class Narrow(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, cat, cont): return self.model(cat, cont[:, :columns])
    df = bunch.frame.sample(96, random_state=0); names = [c for c in df if c != 'target']
    dls = TabularDataLoaders.from_df(df, procs=[Normalize], cont_names=names, y_names='target', y_block=RegressionBlock() if values else CategoryBlock(), valid_idx=range(64, 96), bs=32, device='cpu', num_workers=0)
    set_seed(0); model = TabularModel([], columns or len(names), 1 if values else dls.c, [width, width])
    return Learner(dls, Narrow(model) if columns else model, loss_func=MSELossFlat() if values else CrossEntropyLossFlat(), cbs=cb)


@pytest.mark.parametrize('values', [False, True], ids=['wine', 'diabetes'])
@pytest.mark.parametrize('columns', [None, 4])
def test_tables(values, columns):
    from sklearn.datasets import load_diabetes, load_wine
    bunch = (load_diabetes if values else load_wine)(as_frame=True); hidden = 'model.layers.1' if columns else 'layers.1'
    teacher = table_learner(bunch, 64, values=values); fit(teacher, 2, 1e-2)
    for cb in (kd(teacher), kd(teacher, method='fitnet', taps=[(hidden, 'layers.1')]), DiffKDCallback(teacher, taps=[(hidden, 'layers.1'), 'logits'], verbose=False)):
        learn = table_learner(bunch, 8, cb, columns, values); fit(learn, 2, 1e-3)
        assert all(np.isfinite(v) for v in cb.means.values()) and [t.student.shape[0] for t in cb.plan if t.kind == 'feature'] in ([], [8])
        assert {t.output for t in cb.plan if t.kind == 'logits'} <= {'values' if values else 'classes'}


def test_a_teacher_that_sees_fewer_columns():
    from sklearn.datasets import load_wine
    from fastai.tabular.all import TabularModel
    seen = []
    teacher = TabularModel([], 4, 3, [16]); teacher.register_forward_pre_hook(lambda m, xb: seen.append(xb[1]))
    learn = table_learner(load_wine(as_frame=True), 8, kd(teacher, teacher_transform=lambda cat, cont: (cat, cont[:, :4]))); fit(learn, 1)
    assert {x.shape[1] for x in seen} == {4}


@pytest.mark.parametrize('cb', [kd, lambda t: DiffKDCallback(t, taps=['logits'], verbose=False)], ids=['kd', 'diffkd'])
def test_text(cb):
    from fastai.text.all import AWD_LSTM, ModelResetter, RNNCallback, get_text_classifier
    config = lambda w: dict(emb_sz=w, n_hid=2*w, n_layers=2, pad_token=1, bidir=False, output_p=.1, hidden_p=.1, input_p=.1, embed_p=.02, weight_p=.1)
    set_seed(0); net = lambda w: get_text_classifier(AWD_LSTM, 50, 3, seq_len=8, config=config(w), lin_ftrs=[10])
    x, cb = torch.randint(2, 50, (24, 12)), cb(net(16))
    learn = Learner(pair_dls(x, torch.arange(24) % 3), net(8), loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback(), cb]); fit(learn, 1, 1e-3)
    assert (cb.plan[0].student.key, cb.plan[0].teacher.key, cb.plan[0].student.shape[0]) == (0, 0, 3) and cb.means['kd'] > 0


# ---- reports

def test_a_loader_with_its_own_generator_keeps_its_order():
    def order(cb):
        seen, g = [], torch.Generator().manual_seed(3); x = torch.randn(24, 3, 16, 16); x[:, 0, 0, 0] = torch.arange(24.)
        class Keep(Callback):
            def before_batch(self): seen.extend(self.xb[0][:, 0, 0, 0].tolist()) if self.training else None
        data = torch.utils.data.TensorDataset(x, torch.arange(24) % K)
        train, valid = torch.utils.data.DataLoader(data, 8, shuffle=True, generator=g), torch.utils.data.DataLoader(data, 8)
        fit(Learner(DataLoaders(train, valid), sequential(6), loss_func=CrossEntropyLossFlat(), cbs=[Keep(), *cb]), 2); return seen
    assert order([]) == order([kd()])


def test_a_callback_that_swaps_the_model():
    class Swap(Callback):
        order = -10
        def before_epoch(self):
            if self.epoch == 1: self.learn.model = sequential(7); self.learn.create_opt()
    cb = DiffKDCallback(sequential(20), verbose=False); learn = learner_of(sequential(6), cb); fit(learn, 2, cbs=Swap())
    assert cb.plan[0].student.shape[0] == 14 and n_hooks(learn.model) == 0 and '_do_epoch' not in vars(learn)


def test_images_of_another_size():
    cb = DiffKDCallback(sequential(20), verbose=False); learn = learner_of(sequential(6), cb, size=32); fit(learn, 1)
    d = cb.distiller; learn.dls = tensor_dls(48); fit(learn, 1); assert cb.distiller is d


@pytest.mark.parametrize('method', ['kd', 'fitnet', 'diffkd', 'rkd', 'srrl'])
def test_a_teacher_in_inference_mode(method):
    class Serving(nn.Module):
        def __init__(self): super().__init__(); self.net = sequential(20)
        @torch.inference_mode()
        def forward(self, x): return self.net(x)
    fit(learner_of(sequential(6), cb := kd(Serving(), method=method)), 1); assert all(np.isfinite(v) for v in cb.means.values())


@pytest.mark.parametrize('method', ['kd', 'fitnet'])
def test_an_int8_teacher(method):
    import torch.ao.quantization as q
    class Int8(nn.Module):
        def __init__(self): super().__init__(); self.net,self.quant,self.dequant = sequential(20),q.QuantStub(),q.DeQuantStub()
        def forward(self, x): return self.dequant(self.net(self.quant(x)))
    t = Int8().eval(); t.qconfig = q.get_default_qconfig('x86' if 'x86' in torch.backends.quantized.supported_engines else 'fbgemm')
    q.fuse_modules(t.net, [['0', '1', '2'], ['3', '4', '5']], inplace=True); p = q.prepare(t); p(torch.randn(4, 3, 32, 32)); t = q.convert(p)
    fit(learner_of(sequential(6), cb := kd(t, method=method)), 1); assert cb.means[method] > 0


def test_data_parallel_is_named():
    class Two(nn.DataParallel):
        def __init__(self, m): super().__init__(m); self.device_ids = [0, 1]
    with pytest.raises(ValueError, match='nn.DataParallel.*DistributedDataParallel'): fit(learner_of(Two(sequential(6)), kd()), 1)


@pytest.mark.slow
def test_googlenet_with_auxiliary_outputs():
    class Main(nn.Module):
        def forward(self, out, y): return F.cross_entropy(out, y) if torch.is_tensor(out) else F.cross_entropy(out.logits, y) + .3*sum(F.cross_entropy(o, y) for o in out[1:])
    student = torchvision.models.googlenet(num_classes=K, aux_logits=True, init_weights=False)
    cb = kd(output='classes'); fit(Learner(tensor_dls(64, 16), student, loss_func=Main(), cbs=cb), 1, 1e-4)
    assert cb.plan[0].student.key == 'logits' and cb.means['kd'] > 0


def test_a_students_auxiliary_outputs_by_name():
    from diffkd_nb.models import make_model
    assert make_model('torchvision:googlenet', 4).train()(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_the_cache_knows_two_calls_of_a_module_and_two_choices_of_classes(tmp_path):
    from diffkd_nb.data import ImageArrays, array_dls
    from diffkd_nb.teacher_cache import TeacherCache
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.relu,self.fc = nn.Conv2d(3, 8, 3, padding=1),nn.Conv2d(8, 8, 3, padding=1),nn.ReLU(),nn.Linear(8, K)
        def forward(self, x): return self.fc(self.relu(self.b(self.relu(self.a(x)))).mean((2, 3)))
    g = torch.Generator().manual_seed(0); x, y = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=g), torch.arange(32) % 3
    data, teacher = ImageArrays(x, y, x[:8], y[:8], list('abc'), 'd'), Twice()
    def means(cached, **kw):
        set_seed(0); cb = kd(teacher, cache=TeacherCache(tmp_path) if cached else None, **kw)
        fit(Learner(array_dls(data, 8, ()), Wide(6, 3), loss_func=CrossEntropyLossFlat(), cbs=cb), 2, 1e-3); return cb.means
    for kw in (dict(method='fitnet', taps=[('body.2', 'relu#1')]), dict(method='fitnet', taps=[('body.2', 'relu#2')]), dict(classes=[0, 1, 2]), dict(classes=[5, 7, 9])):
        assert means(True, **kw) == pytest.approx(means(False, **kw), rel=1e-4)
