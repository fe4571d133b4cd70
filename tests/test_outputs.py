"What outputs mean: read from every loss of torch, fastai and timm; distances against closed forms; which method is defined for what"
import inspect
from functools import partial
import fastai.losses, numpy as np, pytest, timm.loss, torch
from fastai.losses import *
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from torch.nn import functional as F
from diffkd_nb.distiller import Context, Distiller, output_refusal, toy_tap
from diffkd_nb.losses import OUTPUTS, Standardise, dist_loss, get_distance, kl_loss, labels_loss, values_loss
from diffkd_nb.methods import METHODS, Method, get_method
from diffkd_nb.outputs import LEARNERS, check_kind, check_values, method_table, output_kind
from diffkd_nb.rng import Draws
from diffkd_nb.taps import Tap

B, K, N = 6, 5, 12
C, L, V, P, LP, NO = 'classes', 'labels', 'values', 'probabilities', 'label_probabilities', None

# ---- reading the loss: by hand, for all that the libraries have; NO: no distribution is known

TORCH = dict(AdaptiveLogSoftmaxWithLoss=NO, BCELoss=LP, BCEWithLogitsLoss=L, CTCLoss=NO, CosineEmbeddingLoss=NO, CrossEntropyLoss=C, GaussianNLLLoss=NO,
             HingeEmbeddingLoss=NO, HuberLoss=V, KLDivLoss=C, L1Loss=V, LinearCrossEntropyLoss=NO, MSELoss=V, MarginRankingLoss=NO, MultiLabelMarginLoss=NO,
             MultiLabelSoftMarginLoss=L, MultiMarginLoss=NO, NLLLoss=C, NLLLoss2d=C, PoissonNLLLoss=V, SmoothL1Loss=V, SoftMarginLoss=L, TripletMarginLoss=NO,
             TripletMarginWithDistanceLoss=NO)
FUNCTIONS = dict(binary_cross_entropy=LP, binary_cross_entropy_with_logits=L, cosine_embedding_loss=NO, cross_entropy=C, ctc_loss=NO, gaussian_nll_loss=NO,
                 hinge_embedding_loss=NO, huber_loss=V, kl_div=C, l1_loss=V, linear_cross_entropy=NO, margin_ranking_loss=NO, mse_loss=V, multi_margin_loss=NO,
                 multilabel_margin_loss=NO, multilabel_soft_margin_loss=L, nll_loss=C, poisson_nll_loss=V, smooth_l1_loss=V, soft_margin_loss=L,
                 triplet_margin_loss=NO, triplet_margin_with_distance_loss=NO)
FASTAI = dict(BaseLoss=C, CrossEntropyLossFlat=C, FocalLoss=C, FocalLossFlat=C, BCEWithLogitsLossFlat=L, BCELossFlat=LP, MSELossFlat=V, L1LossFlat=V,
              LabelSmoothingCrossEntropy=C, LabelSmoothingCrossEntropyFlat=C, DiceLoss=C)
TIMM = dict(AsymmetricLossMultiLabel=L, AsymmetricLossSingleLabel=NO, BinaryCrossEntropy=L, DistributionBalancedLoss=NO, JsdCrossEntropy=C,
            LabelSmoothingCrossEntropy=C, PolyBinaryCrossEntropy=NO, PolyCrossEntropy=NO, SoftTargetCrossEntropy=C, TwoWayLoss=NO, ZlprLoss=NO)
ARGS = dict(AdaptiveLogSoftmaxWithLoss=(8, 20, [5]), BaseLoss=(nn.CrossEntropyLoss,))


def bare(cls):
    "An object of a class whose constructor asks for more than a test knows"
    try: return cls(*ARGS.get(cls.__name__, ()))
    except TypeError: return cls.__new__(cls)


def check(loss, kind, name):
    if kind is not NO:
        assert output_kind(loss) == kind and output_kind(partial(loss)) == kind
        return
    with pytest.raises(ValueError, match='say it with output=') as e: output_kind(loss)
    assert name.lower().replace('_', '')[:8] in str(e.value).lower().replace('_', '') and all(repr(k) in str(e.value) for k in OUTPUTS)


@pytest.mark.parametrize('name', [n for n in dir(nn) if n.endswith('Loss') or n in TORCH])
def test_every_loss_of_torch(name): check(bare(getattr(nn, name)), TORCH[name], name)


@pytest.mark.parametrize('name', [n for n in dir(F) if 'loss' in n or 'cross_entropy' in n or n == 'kl_div'])
def test_every_function_of_torch(name): check(getattr(F, name), FUNCTIONS[name], name)


@pytest.mark.parametrize('name', fastai.losses.__all__)
def test_every_loss_of_fastai(name):
    f = getattr(fastai.losses, name)
    check(f(*ARGS.get(name, ())), FASTAI[name], name)
    if name != 'BaseLoss' and name.endswith('Flat'): check(f(axis=1), FASTAI[name], name)


@pytest.mark.parametrize('name', [n for n,c in vars(timm.loss).items() if inspect.isclass(c) and issubclass(c, nn.Module)])
def test_every_loss_of_timm(name): check(bare(getattr(timm.loss, name)), TIMM.get(name, NO), name)


def test_wrapped_inherited_and_foreign_losses():
    class Weighted(nn.CrossEntropyLoss): pass
    class OwnFlat(BaseLoss):
        def __init__(self): super().__init__(nn.SmoothL1Loss)
    class Mine(nn.Module):
        def forward(self, x, y): return x.sum()
    class CrossEntropyLossFlat: # of nobody's library
        func = nn.CrossEntropyLoss()
    assert output_kind(Weighted()) == C and output_kind(OwnFlat()) == V and output_kind(BaseLoss(partial(nn.BCEWithLogitsLoss, weight=torch.ones(3)))) == L
    assert output_kind(torch.compile(nn.BCEWithLogitsLoss())) == L and output_kind(partial(partial(F.mse_loss), reduction='sum')) == V
    for loss in (Mine(), CrossEntropyLossFlat(), lambda x, y: x.sum(), nn.MSELoss, None):
        with pytest.raises(ValueError, match='output='): output_kind(loss)
        assert output_kind(loss, 'labels') == L
    with pytest.raises(ValueError, match="'classes', 'labels', 'values', 'probabilities'.*got 'softmax'"): output_kind(nn.MSELoss(), 'softmax')
    assert check_kind(values_loss) is values_loss and output_kind(nn.MSELoss(), values_loss) is values_loss


@pytest.mark.parametrize('mix', ['MixUp', 'CutMix'])
def test_the_loss_is_read_while_samples_are_mixed(mix):
    from fastai.callback import mixup
    from pairs import Callback, make_learner, quiet, sequential
    seen = []
    class Look(Callback):
        order = 5
        def after_pred(self): seen.append((self.training, output_kind(self.learn.loss_func)))
    learn = make_learner(sequential(4), cbs=[getattr(mixup, mix)(), Look()])
    with quiet(learn): learn.fit(1)
    assert (True, C) in seen and (False, C) in seen and {k for _,k in seen} == {C}


# ---- distances

torch.manual_seed(0)
S, T = torch.randn(B, K)*2, torch.randn(B, K)*2
def plan_of(output, k=K): return [toy_tap((k,), (k,), 'logits', output=output)]
def made(name, output, s, t, k=K, **kw): return Method(name, kw).make(plan_of(output, k))({'logits': s[..., None, None]}, {'logits': t[..., None, None]})
def mean_kl(f, t, s): return kl_divergence(f(t), f(s)).reshape(len(t), -1).sum(1).mean()


@pytest.mark.parametrize('tau', [1., 4.])
def test_kd_is_the_divergence_of_torchs_distributions(tau):
    width = T.std(0, correction=0)
    want = {C: tau**2*mean_kl(lambda z: Categorical(logits=z/tau), T, S), L: tau**2*mean_kl(lambda z: Bernoulli(logits=z/tau), T, S),
            V: mean_kl(lambda z: Normal(z, width), T, S)}
    for kind,value in want.items(): torch.testing.assert_close(made('kd', kind, S, T, temperature=tau)['kd'], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made('kd', P, S.softmax(1), T.softmax(1), temperature=tau)['kd'], want[C], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made('kd', LP, S.sigmoid(), T.sigmoid(), temperature=tau)['kd'], want[L], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made('kd', None, S, T, temperature=tau)['kd'], want[C], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made('kd', F.mse_loss, S, T)['kd'], ((S - T)**2).mean())


def test_probabilities_at_temperature_one_are_compared_as_they_are():
    p, q = T.softmax(1), S.softmax(1)
    torch.testing.assert_close(made('kd', P, q, p, temperature=1.)['kd'], mean_kl(lambda x: Categorical(probs=x), p, q), rtol=1e-4, atol=1e-6)
    a, b = T.sigmoid(), S.sigmoid()
    torch.testing.assert_close(made('kd', LP, b, a, temperature=1.)['kd'], mean_kl(lambda x: Bernoulli(probs=x), a, b), rtol=1e-4, atol=1e-6)


def test_one_label_is_two_classes():
    s, t = S[:, :1], T[:, :1]
    def pair(z): return torch.cat([torch.zeros_like(z), z], 1)
    torch.testing.assert_close(made('kd', L, s, t, 1)['kd'], made('kd', C, pair(s), pair(t), 2)['kd'], rtol=1e-4, atol=1e-6)


def test_gradients():
    s = S.clone().requires_grad_()
    for f,tau,want in ((kl_loss, 3., lambda: ((S/3).softmax(1) - (T/3).softmax(1))*3/B), (labels_loss, 3., lambda: ((S/3).sigmoid() - (T/3).sigmoid())*3/B),
                       (lambda a, b, _: values_loss(a, b), 1., lambda: (S - T)/B)):
        g, = torch.autograd.grad(f(s, T, tau), s)
        torch.testing.assert_close(g, want(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('kind', [L, V])
@pytest.mark.parametrize('k', [1, K])
def test_dist_is_the_mean_correlation(kind, k):
    s, t = S[:, :k], T[:, :k]
    p, q = ((x/4).sigmoid().numpy() if kind == L else x.numpy() for x in (s, t))
    def off(a, b): return 1 - np.mean([np.corrcoef(x, y)[0, 1] for x,y in zip(a, b)])
    want = (16 if kind == L else 1)*2*(off(p.T, q.T) + (off(p, q) if k > 1 else 0))
    got = made('dist', kind, s, t, k)['dist'].item()
    if kind == V and k > 1: # rows are compared in units of the teacher's spread
        z = lambda x: (x - q.mean(0))/q.std(0)
        want = 2*(off(p.T, q.T) + off(z(p), z(q)))
    assert got == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize('name', ['kd', 'dist', 'diffkd'])
def test_values_have_no_unit(name):
    s, t = torch.randn(B, 3) + 1, torch.randn(B, 3) + 1
    def run(s, t):
        torch.manual_seed(0)
        d = get_method(name)(plan_of(V, 3))
        return d({'logits': s[..., None, None]}, {'logits': t[..., None, None]}, draws=Draws(torch.Generator().manual_seed(1)))
    a, b = run(s, t), run(s*torch.tensor([1e3, 1e-3, 1.]) + torch.tensor([5., 0., -2.]), t*torch.tensor([1e3, 1e-3, 1.]) + torch.tensor([5., 0., -2.]))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-2, atol=1e-4)


def test_spread_is_that_of_all_training_batches_and_is_saved():
    m, batches = Standardise(2), [torch.randn(n, 2)*3 + 100 for n in (1, 5, 2, 8)]
    for b in batches: m(b, b)
    m.eval()(batches[0]*0, batches[0]*0) # eval mode learns nothing
    seen = torch.cat(batches)
    want = (batches[1] - seen.mean(0))/seen.std(0, correction=0)
    torch.testing.assert_close(m(batches[1], batches[1])[0], want, rtol=1e-3, atol=1e-3)
    d, e = (get_method('kd')(plan_of(V, 2)) for _ in range(2))
    for b in batches: d({'logits': b[..., None, None]}, {'logits': b[..., None, None]})
    e.load_state_dict(d.state_dict())
    x = {'logits': torch.randn(3, 2, 1, 1)}, {'logits': torch.randn(3, 2, 1, 1)}
    assert torch.equal(d.eval()(*x)['kd'], e.eval()(*x)['kd']) and len(get_method('kd')(plan_of(C)).state_dict()) == 0


@pytest.mark.parametrize('value', [0., 4.])
@pytest.mark.parametrize('kind', [*OUTPUTS])
@pytest.mark.parametrize('name', ['kd', 'dist', 'diffkd'])
def test_constant_and_extreme_teachers(name, kind, value):
    "An output that never varies, probabilities of 0 and 1, scores as large as float32 holds: finite losses and gradients"
    big = {C: 1e30, L: 1e30, V: 1e15}.get(kind)
    flat = torch.full((B, K), 0. if big is None and value == 0 else value if big else 1/K)
    hard = F.one_hot(torch.arange(B) % K, K).float()*(big or 1.)
    for t in (flat, hard):
        s = (hard.flip(0) if t is hard else S.softmax(1) if big is None else S).clone().requires_grad_()
        d = get_method(name)(plan_of(kind))
        out = d({'logits': s[..., None, None]}, {'logits': t[..., None, None]}, draws=Draws(torch.Generator().manual_seed(1)))
        if name == 'diffkd' and t is hard and kind in (C, L): continue # a linear layer of such scores overflows
        sum(out.values()).backward()
        assert all(torch.isfinite(v) for v in out.values()) and torch.isfinite(s.grad).all()


@pytest.mark.parametrize('kind', [C, L, V, P])
@pytest.mark.parametrize('name', ['kd', 'dist'])
def test_positions_of_a_map_are_samples(name, kind):
    s, t = (torch.randn(2, 3, 2, 2) for _ in 'st')
    if kind == P: s, t = s.softmax(1), t.softmax(1)
    rows = lambda x: x.permute(0, 2, 3, 1).reshape(-1, 3)
    maps = get_method(name)([toy_tap((3, 2, 2), (3, 2, 2), 'logits', output=kind)])({'logits': s}, {'logits': t})[name]
    torch.testing.assert_close(maps, made(name, kind, rows(s), rows(t), 3)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', [L, V, P, LP])
@pytest.mark.parametrize('name', ['kd', 'dist', 'diffkd'])
def test_training_lowers_the_distance(name, kind):
    "A linear student of a linear teacher comes near it, judged by the distance of the kind itself"
    torch.manual_seed(0)
    end = {P: nn.Softmax(1), LP: nn.Sigmoid()}.get(kind, nn.Identity())
    teacher, student, x = (nn.Sequential(nn.Linear(8, K), end) for _ in 'ts'), None, torch.randn(64, 8)
    teacher, student = teacher
    d = get_method(name)(plan_of(kind))
    opt = torch.optim.Adam([*student.parameters(), *d.parameters()], .05)
    t = teacher(x).detach()
    kd = [] # DiffKD's projections may turn the student's outputs: its own distance counts
    def correlation(): # of each output over samples
        a, b = (z - z.mean(0) for z in (student(x).detach(), t))
        return ((a*b).sum(0)/(a.norm(dim=0)*b.norm(dim=0))).mean().item()
    for i in range(60):
        out = d({'logits': student(x)[..., None, None]}, {'logits': t[..., None, None]}, draws=Draws(torch.Generator().manual_seed(i)))
        kd.append(next(iter(out.values())).item())
        opt.zero_grad(); sum(out.values()).backward(); opt.step()
    assert kd[-1] < .5*kd[0] and (name == 'diffkd' or correlation() > .9), (kd[0], kd[-1], correlation())


# ---- which method is defined for what

def learner_of(name, k, output):
    "Plan and context for a method, as a Learner of this kind gives them"
    cls = METHODS[name]
    maps = [toy_tap((3, 4, 4), (2, 4, 4), name='feature')]
    plans = dict(feature=maps, stages=[toy_tap((3, 4, 4), (2, 4, 4), name='stage1'), toy_tap((5, 2, 2), (4, 2, 2), name='stage2')],
                 exits=[toy_tap((3, 4, 4), (k,), name='exit1'), toy_tap((5, 2, 2), (k,), name='exit2')],
                 logits=[toy_tap((k,), (k,), 'logits', output=output)])
    plan = [t for d in cls.default_taps for t in plans[d]]
    teacher = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, k))
    plan = [t._replace(teacher=t.teacher._replace(name='0')) if t.kind == 'feature' else t for t in plan]
    return plan, Context(teacher=teacher, n_data=N, labels=torch.arange(N) % 3, output=output)


@pytest.mark.filterwarnings("ignore:the teacher's classifier:UserWarning")      # tensors here are made up
@pytest.mark.parametrize('kind', [*LEARNERS])
@pytest.mark.parametrize('name', [n for n,c in METHODS.items() if not c.for_boxes])
def test_the_table_is_what_happens(name, kind):
    k, output = LEARNERS[kind]
    plan, context = learner_of(name, k, output)
    said = method_table().loc[name, kind]
    options = {'k': 5, 'dim': 4} if name == 'crd' else {}
    if said != 'works':
        with pytest.raises(ValueError) as e: Method(name, options).make(plan, context)
        assert str(e.value) == f"{said.removeprefix('refused: ')} [help: scores]" and METHODS[name].__name__ in said
        return
    d = Method(name, options).make(plan, context)
    d.expect(4, 40)
    ends = {P: lambda x: x.softmax(1), LP: torch.sigmoid}.get(output, lambda x: x)
    def draw(role): return {t.name: (ends if t.kind == 'logits' or t.teacher.shape == (k, 1, 1) and role == 'teacher' else lambda x: x)(
                                torch.randn(B, *getattr(t, role).shape)) for t in plan}
    s, t = ({n: v.requires_grad_() for n,v in draw('student').items()}, draw('teacher'))
    out = d(s, t, torch.arange(B) % k, draws=Draws(torch.Generator().manual_seed(0)), index=torch.arange(B))
    sum(out.values()).backward()
    grads = [v.grad for v in s.values() if v.grad is not None] + [p.grad for p in d.parameters() if p.grad is not None]
    assert set(out) == set(d.loss_names) and all(torch.isfinite(v).all() for v in [*out.values(), *grads])
    if 'logits' in METHODS[name].default_taps and name not in ('srrl', 'lshfm', 'dskd', 'pskd', 'maskd'): assert s['logits'].grad.abs().max() > 0 # not silently nothing


@pytest.mark.parametrize('name', ['dkd', 'ofa', 'srrl'])
def test_a_softmax_in_the_model_changes_nothing(name):
    "Methods for classes give the same on probabilities as on the logits behind them"
    got = []
    for output in (C, P):
        plan, context = learner_of(name, K, output)
        torch.manual_seed(0)
        if name == 'srrl': context = context._replace(teacher=learner_of(name, K, C)[1].teacher)
        d = Method(name).make(plan, context).eval()
        g = torch.Generator().manual_seed(1)
        def draw(role): return {t.name: torch.randn(B, *getattr(t, role).shape, generator=g) for t in plan}
        s, t = draw('student'), draw('teacher')
        end = (lambda x: x.softmax(1)) if output == P else (lambda x: x.log_softmax(1) if name == 'srrl' else x)
        s['logits'] = end(s['logits'])
        t = {n: end(v) if n == 'logits' or name == 'ofa' else v for n,v in t.items()}
        if name == 'srrl': # the teacher's own classifier made its output
            z = d.head.logits(t['feature'])
            t['logits'] = (z.softmax(1) if output == P else z)[..., None, None]
            got.append(d(s, t)['matching']); d(s, t); assert d.stats['head_gap'] < 1e-4
        else: got.append(sum(d(s, t, torch.arange(B) % K).values()))
    if name != 'srrl': torch.testing.assert_close(*got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [n for n,c in METHODS.items() if 'logits' in c.default_taps])
def test_outputs_of_different_number_and_single_classes(name):
    for output in (None, *OUTPUTS):
        if output_refusal(METHODS[name], output): continue
        plan, context = learner_of(name, K, output)
        other = [t._replace(student=t.student._replace(shape=(3, 1, 1))) if t.kind == 'logits' else t for t in plan]
        with pytest.raises(ValueError, match='the student has 3 outputs, the teacher 5'): Method(name).make(other, context)
    plan, context = learner_of(name, 1, C)
    with pytest.raises(ValueError, match="at least 2 classes.*output='labels' or output='values'"): Method(name).make(plan, context)


def test_joined_methods_are_refused_by_the_name_of_the_part():
    plan, context = learner_of('srrl', K, L)
    with pytest.raises(ValueError, match="DKD is defined for one class among several; this model's outputs are independent labels: use 'kd'."):
        Method('dkd+fitnet').make(plan, context)
    assert set(Method('kd+fitnet').make(plan, context).loss_names) == {'kd.kd', 'fitnet.fitnet'}
    with pytest.raises(ValueError, match='CRD is defined'): Method('kd+crd').make(plan, context)


def test_maps_of_scores_only_where_positions_are_samples():
    tap = toy_tap((3, 2, 2), (3, 2, 2), 'logits')
    with pytest.raises(ValueError, match="DKD compares one set of scores per sample, got maps of 2 x 2: use 'diffkd', 'kd', 'dist' or 'cwd'"): get_method('dkd')([tap])


def test_what_a_batch_tells():
    z = torch.randn(16, 4)*3
    good = {C: z, L: z, V: z, P: z.softmax(1), LP: z.sigmoid()}
    for kind,x in good.items(): check_values(kind, x)
    check_values(C, z.log_softmax(1)); check_values(P, z.view(4, 4, 2, 2).softmax(1))
    for kind,x,says in [(C, good[P], 'student seems to end in a softmax'), (None, good[P], 'softmax'), (P, z, 'between 0 and 1'), (P, good[LP], 'add up'), (LP, z, 'sigmoid')]:
        with pytest.raises(ValueError, match=says): check_values(kind, x, 'student')


@pytest.mark.parametrize('loss', ['kl', 'dist', 'mse'])
def test_diffkd_uses_the_distance_of_the_kind(loss):
    "DiffKD's own distance of the denoised scores, from the parts"
    for kind,of in ((C, kl_loss), (L, labels_loss), (V, values_loss), (P, kl_loss), (LP, labels_loss)):
        d = get_method('diffkd')(plan_of(kind), logits_loss=loss)
        tap, s, t = d.taps[0], S, T
        if kind == P: s, t = s.softmax(1), t.softmax(1)
        if kind == LP: s, t = s.sigmoid(), t.sigmoid()
        out = tap(s, t, draws=Draws(torch.Generator().manual_seed(0)))
        want = {'kl': of, 'dist': partial(dist_loss, output={P: C, LP: L}.get(kind, kind)), 'mse': F.mse_loss}[loss](out.denoised, out.target)
        assert torch.equal(out.kd_loss, want)
        scores = {V: (T - T.mean(0))/T.std(0, correction=0), P: T.log_softmax(1)}.get(kind, T)
        torch.testing.assert_close(out.target, scores, rtol=1e-3, atol=1e-3)


def test_distances_that_cannot_be():
    for tau in (0, -1, float('inf'), float('nan')):
        with pytest.raises(ValueError, match='temperature'): get_distance('kl', tau)
    with pytest.raises(ValueError, match='temperature'): get_method('diffkd')(plan_of(C), temperature=float('inf'))
    with pytest.raises(ValueError, match='the distance itself'): get_method('diffkd')(plan_of(F.mse_loss), logits_loss='dist')
