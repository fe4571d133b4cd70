"Every distiller against NumPy in float64 with loops, its degenerate cases, and what all have in common"
import math
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from diffkd_nb.diffkd import DiffKDDistiller
from diffkd_nb.distiller import Distiller, as_distiller
from diffkd_nb.methods import *
from diffkd_nb.rng import Draws
from diffkd_nb.layouts import Layout
from diffkd_nb.taps import Place, Tap

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's classifier:UserWarning")      # tensors here are made up

B, K, N = 6, 4, 12
OURS = ['kd', 'dkd', 'dist', 'fitnet', 'rkd', 'pkt', 'crd', 'srrl', 'vid', 'reviewkd', 'ofa'] # the later ones: test_methods_since
PURE = ['kd', 'dkd', 'dist', 'rkd', 'pkt'] # without parameters: 0 where student and teacher agree
RUNS = [n for n in OURS if n != 'crd']


def place(shape, kind='map', name=''): return Place(name, Layout(kind), tuple(shape))
def tap(name, s, t, kind='feature', where=''): return Tap(name, kind, place(s), place(t, name=where))
LOGITS = tap('logits', (K, 1, 1), (K, 1, 1), 'logits')


def plan_of(name, s=((3, 8, 8), (5, 4, 4)), t=((2, 8, 8), (4, 2, 2))):
    feature = tap('feature', s[-1], t[-1], where='0')
    stages = [tap(f'stage{i+1}', a, b) for i,(a,b) in enumerate(zip(s, t))]
    exits = [tap(f'exit{i+1}', a, (K, 1, 1)) for i,a in enumerate(s)]
    return {'logits': [LOGITS], 'feature': [feature], 'feature logits': [feature, LOGITS], 'stages': stages,
            'exits logits': [*exits, LOGITS]}[' '.join(get_method(name).default_taps)]


def teacher_of(channels, grid=1):
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(channels*grid**2, K))


def build(name, plan=None, **kw):
    torch.manual_seed(0)
    plan = plan or plan_of(name)
    if name == 'srrl': kw.setdefault('teacher', teacher_of(plan[0].teacher.shape[0]))
    if name == 'crd': kw = dict(n_data=N, labels=torch.arange(N) % 3, k=7, dim=4) | kw
    return get_method(name)(plan, **kw), plan


def draws(seed=3): return Draws(torch.Generator().manual_seed(seed))
def places(y): return torch.arange(len(y))*2 # of a batch's samples in the training set
def call(d, s, t, y, index=None, seed=3): return d(s, t, y, draws(seed), places(y) if index is None else index)


def inputs(plan, b=B, scale=1., dtype=torch.float, seed=1):
    g = torch.Generator().manual_seed(seed)
    def draw(role): return {t.name: (torch.randn(b, *getattr(t, role).shape, generator=g)*scale).to(dtype) for t in plan}
    s, t = draw('student'), draw('teacher')
    return {k: v.requires_grad_() for k,v in s.items()}, t, torch.arange(b) % K


def gradients(d, s): return [v.grad for v in s.values() if v.grad is not None] + [p.grad for p in d.parameters() if p.grad is not None]
def finite(d, s, out): return all(bool(torch.isfinite(x).all()) for x in [*out.values(), *gradients(d, s)])


# ---- the same in NumPy, float64, from the formulas

def softmax(z): e = np.exp(z - z.max()); return e/e.sum()
def kl(p, q): return sum(a*math.log(a/b) for a,b in zip(p, q) if a > 0)
def huber(a, b): e = abs(a - b); return .5*e*e if e < 1 else e - .5
def norm(v): return math.sqrt(sum(x*x for x in v))
def cosine(a, b): return sum(x*y for x,y in zip(a, b))/(norm(a)*norm(b)) if norm(a) > 0 and norm(b) > 0 else 0.
def pool(x, n):
    b, c, h, w = x.shape
    return np.array([[[[x[i, j, h*u//n:h*(u+1)//n, w*v//n:w*(v+1)//n].mean() for v in range(n)] for u in range(n)] for j in range(c)] for i in range(b)])
def flat(x): return x.mean((2, 3))
def nearest(x, n): i = [k*x.shape[2]//n for k in range(n)]; return x[:, :, i][:, :, :, i]
def align(s, t):
    n = min(s.shape[2], t.shape[2])
    return pool(s, n), pool(t, n)
def mse(a, b): return ((a - b)**2).mean()


def conv(m, x, P):
    w, (st, _), (pad, _) = P(m.weight), m.stride, m.padding
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    size, per = (x.shape[2] - w.shape[2])//st + 1, w.shape[1]
    y = np.zeros((len(x), len(w), size, size))
    for o in range(len(w)):
        first = o//(len(w)//m.groups)*per
        for i in range(size):
            for j in range(size):
                y[:, o, i, j] = (x[:, first:first+per, i*st:i*st+w.shape[2], j*st:j*st+w.shape[3]]*w[o]).sum((1, 2, 3))
    return y if m.bias is None else y + P(m.bias)[:, None, None]


def apply(m, x, P):
    if isinstance(m, nn.Sequential):
        for c in m: x = apply(c, x, P)
        return x
    if isinstance(m, nn.Conv2d): return conv(m, x, P)
    if isinstance(m, nn.BatchNorm2d):
        mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        return (x - mean)/np.sqrt(var + m.eps)*P(m.weight)[:, None, None] + P(m.bias)[:, None, None]
    if isinstance(m, nn.ReLU): return np.maximum(x, 0)
    if isinstance(m, nn.AdaptiveAvgPool2d): return pool(x, 1)
    if isinstance(m, nn.Flatten): return x.reshape(len(x), -1)
    if isinstance(m, nn.Linear): return x @ P(m.weight).T + P(m.bias)
    if isinstance(m, nn.Identity): return x
    raise TypeError(type(m))


def ref_kd(d, P, s, t, y):
    return {'kd': 16*np.mean([kl(softmax(b/4), softmax(a/4)) for a,b in zip(s[0][..., 0, 0], t[0][..., 0, 0])])}

def ref_dkd(d, P, s, t, y):
    tckd, nckd = 0, 0
    for a,b,k in zip(s[0][..., 0, 0], t[0][..., 0, 0], y):
        p, q = softmax(b/4), softmax(a/4)
        others = [c for c in range(K) if c != k]
        tckd += kl([p[k], sum(p[others])], [q[k], sum(q[others])])
        nckd += kl(p[others]/sum(p[others]), q[others]/sum(q[others]))
    return {'tckd': 16*tckd/B, 'nckd': 8*16*nckd/B}

def ref_dist(d, P, s, t, y):
    p, q = (np.array([softmax(r/4) for r in x[0][..., 0, 0]]) for x in (s, t))
    r = lambda a, b: np.mean([np.corrcoef(u, v)[0, 1] for u,v in zip(a, b)])
    return {'dist': 16*(2*(1 - r(p, q)) + 2*(1 - r(p.T, q.T)))}

def ref_fitnet(d, P, s, t, y):
    a, b = align(s[0], t[0])
    return {'fitnet': mse(apply(d.adapters[0], a, P), b)}

def ref_rkd(d, P, s, t, y):
    def relations(x):
        x, b = flat(x), len(x)
        dist = [[norm(x[i] - x[j]) for j in range(b)] for i in range(b)]
        mean = np.mean([v for r in dist for v in r if v > 0])
        return np.array(dist)/mean, [[[cosine(x[j] - x[i], x[k] - x[i]) for k in range(b)] for j in range(b)] for i in range(b)]
    (ds, cs), (dt, ct) = relations(s[0]), relations(t[0])
    return {'distance': 25*np.mean([huber(ds[i][j], dt[i][j]) for i in range(B) for j in range(B)]),
            'angle': 50*np.mean([huber(cs[i][j][k], ct[i][j][k]) for i in range(B) for j in range(B) for k in range(B)])}

def ref_pkt(d, P, s, t, y):
    def probs(x):
        k = [[(cosine(a, b) + 1)/2 for b in flat(x)] for a in flat(x)]
        return [[v/sum(r) for v in r] for r in k]
    return {'pkt': 30000*sum(kl(a, b) for a,b in zip(probs(t[0]), probs(s[0])))/B**2}

def ref_crd(d, P, s, t, y):
    pairs = np.concatenate([places(y)[:, None].numpy(), d.negatives(places(y), draws()).numpy()], 1)
    total = 0
    for x,other,memory in ((s, 'student', d.start['memory_teacher']), (t, 'teacher', d.start['memory_student'])):
        m = d.adapters[0][other]
        v = flat(x[0]) @ P(m.weight).T + P(m.bias)
        e = np.array([[math.exp(v[i] @ memory[j]/norm(v[i])/.07) for j in pairs[i]] for i in range(B)])
        z = d.z.setdefault(other, e.mean()*N)
        h = [[c/z/(c/z + 7/N) for c in r] for r in e]
        total -= sum(math.log(r[0]) + sum(math.log(1 - c) for c in r[1:]) for r in h)/B
    return {'crd': .8*total}

def ref_srrl(d, P, s, t, y):
    hs, ht = flat(apply(d.adapters[0], s[0], P)), flat(t[0])
    zs = hs @ d.head.weight.numpy().T + d.head.bias.numpy()
    return {'matching': mse(hs, ht), 'regression': mse(zs, t[1][..., 0, 0])}

def ref_vid(d, P, s, t, y):
    total = 0
    for g,a,b in zip(d.adapters, s, t):
        a, b = align(a, b)
        mu, terms = apply(g.mean, a, P), []
        for c,r in enumerate(P(g.rho)):
            var = math.log(1 + math.exp(r)) + 1e-5
            terms += [.5*((v - m)**2/var + math.log(var)) for v,m in zip(b[:, c].ravel(), mu[:, c].ravel())]
        total += np.mean(terms)
    return {'vid': total}

def ref_reviewkd(d, P, s, t, y):
    def hcl(a, b):
        levels = [(1., a, b)] + [(None, pool(a, n), pool(b, n)) for n in (4, 2, 1) if n < a.shape[2]]
        w = [.5**i for i in range(len(levels))]
        return sum(k*mse(u, v) for k,(_,u,v) in zip(w, levels))/sum(w)
    total, y = 0, None
    for m,a,b in [(d.top, pool(s[-1], 1), pool(t[-1], 1)), *reversed(list(zip(d.adapters, s, t)))]:
        x = apply(m.inner, a, P)
        if y is not None:
            y = nearest(y, x.shape[2])
            w = 1/(1 + np.exp(-conv(m.attention, np.concatenate([x, y], 1), P)))
            x = x*w[:, :1] + y*w[:, 1:]
        y = nearest(x, b.shape[2])
        total += hcl(apply(m.outer, y, P), b)
    return {'review': 5*total}

def ref_ofa(d, P, s, t, y):
    def loss(a, b, eps=1.3):
        total = 0
        for u,v,k in zip(a, b[..., 0, 0], y):
            p, q = softmax(v), softmax(u)
            total -= sum((((p[c] + 1)**eps - 1) if c == k else p[c]**eps)*math.log(q[c]) for c in range(K))
        return total/B
    exits = [apply(m, a, P) for m,a in zip(d.adapters[:2], s)]
    return {'exits': sum(loss(a, b) for a,b in zip(exits, t)), 'logits': loss(s[2][..., 0, 0], t[2])}


@pytest.mark.parametrize('name', OURS)
def test_value_and_gradient(name):
    d, plan = build(name, **(dict(eps=1.3) if name == 'ofa' else {}))
    d.double()
    s, t, y = inputs(plan, dtype=torch.double)
    if name == 'crd': d.start, d.z = {k: v.numpy().copy() for k,v in d.named_buffers() if k.startswith('memory')}, {}
    out = call(d, s, t, y)
    sum(out.values()).backward()
    moved = {}                                      # parameter -> array with which the reference replaces it
    P = lambda p: moved.get(p, p.detach().numpy())
    S, T = [v.detach().numpy() for v in s.values()], [v.numpy() for v in t.values()]
    ref = partial(globals()['ref_' + name], d, P)
    tol = 2e-5 if name in ('kd', 'dist') else 1e-8 if name != 'pkt' else 1e-5 # float32 inside; PKT's 1e-7 in the logarithm
    expect = ref(S, T, y.numpy())
    assert list(out) == list(d.loss_names) == list(expect)
    for k in out: assert out[k].item() == pytest.approx(expect[k], rel=tol), k

    rng, h, tol = np.random.default_rng(0), 1e-6, max(50*tol, 1e-5)
    total = lambda *a: sum(ref(*a).values())
    def check(value, grad, f, what):
        v = rng.normal(size=value.shape)
        slope = (f(value + h*v) - f(value - h*v))/(2*h)
        assert (grad.numpy()*v).sum() == pytest.approx(slope, rel=tol, abs=tol), what
    for i,(k,x) in enumerate(s.items()):
        if x.grad is None: assert name == 'srrl' and k == 'logits'; continue
        check(S[i], x.grad, lambda a: total([*S[:i], a, *S[i+1:]], T, y.numpy()), k)
    for k,p in d.named_parameters():
        def at(a):
            moved[p] = a
            try: return total(S, T, y.numpy())
            finally: del moved[p]
        check(p.detach().numpy(), p.grad, at, k)


@pytest.mark.parametrize('f', [lambda s, t, y: torch.stack(dkd_loss(s, t, y)), lambda s, t, y: torch.stack(rkd_losses(s, t)), lambda s, t, y: pkt_loss(s, t),
                               lambda s, t, y: ofa_loss(s, t, y, 1.4), lambda s, t, y: nce_loss(s),
                               lambda s, t, y: hcl_loss(s.view(2, 1, 2, 5), t.view(2, 1, 2, 5))], ids=['dkd', 'rkd', 'pkt', 'ofa', 'nce', 'hcl'])
def test_gradcheck(f):
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, 5, dtype=torch.double, generator=g) for _ in 'st')
    assert torch.autograd.gradcheck(lambda s: f(s, t, torch.tensor([0, 4, 2, 2])), s.requires_grad_())


# ---- degenerate points

SAME = ((3, 8, 8), (5, 4, 4))

def equal_plan(name): return plan_of(name, SAME, SAME)

@pytest.mark.parametrize('name', OURS)
def test_identical(name):
    d, plan = build(name, equal_plan(name))
    s, _, y = inputs(plan)
    t = {k: v.detach().clone() for k,v in s.items()} if name != 'ofa' else {k: s['logits'].detach().clone() for k in s}
    out = call(d, s, t, y)
    sum(out.values()).backward()
    assert finite(d, s, out)
    if name not in PURE: return
    for v in out.values(): assert abs(v.item()) < 1e-4
    assert max(g.abs().max() for g in gradients(d, s)) < (1e-3 if name != 'pkt' else .1)


@pytest.mark.parametrize('value', [0., 2.], ids=['zeros', 'equal samples'])
@pytest.mark.parametrize('name', OURS)
def test_constant_maps(name, value):
    d, plan = build(name)
    s, t, y = inputs(plan)
    s = {k: torch.full_like(v, value).requires_grad_() for k,v in s.items()}
    for teacher in (t, {k: torch.full_like(v, value) for k,v in t.items()}):
        out = call(d, s, teacher, y)
        sum(out.values()).backward()
        assert finite(d, s, out)


@pytest.mark.parametrize('name', OURS)
def test_one_class_in_the_batch(name):
    d, plan = build(name)
    s, t, y = inputs(plan)
    out = call(d, s, t, torch.full_like(y, 2), torch.tensor([0, 3, 6, 9, 0, 3])) # one class, and samples twice
    sum(out.values()).backward()
    assert finite(d, s, out)


@pytest.mark.parametrize('name', OURS)
@pytest.mark.parametrize('dtype', ['bf16 autocast', 'fp16 inputs', 'bf16 inputs'])
def test_huge_logits_in_half_precision(name, dtype):
    d, plan = build(name)
    s, t, y = inputs(plan)
    logits = lambda k: k == 'logits' or (name == 'ofa')
    def to(v, k, big): return (v.detach()*(1e4 if big else 1)).clamp(-6e4, 6e4).to(torch.float if dtype.startswith('bf16 a') else torch.half if 'fp16' in dtype else torch.bfloat16)
    s = {k: to(v, k, k == 'logits').requires_grad_() for k,v in s.items()}
    t = {k: to(v, k, logits(k)) for k,v in t.items()}
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bf16 autocast'): out = call(d, s, t, y)
    assert all(v.dtype == torch.float for v in out.values())
    sum(out.values()).backward()
    assert finite(d, s, out)


def test_huge_logits_keep_their_value():
    z = torch.tensor([[1e4, 0., 0.]])
    y = torch.tensor([0])
    tckd, nckd = dkd_loss(z.roll(1, 1), z, y, 1.)
    assert tckd.item() == pytest.approx(1e4) and nckd.item() == pytest.approx(1e4 - math.log(2) - 1e4*.5, rel=1e-5)
    assert ofa_loss(z.roll(1, 1), z, y).item() == pytest.approx(1e4)


@pytest.mark.parametrize('name', [*PURE, 'crd', 'srrl'])
def test_autocast_leaves_the_arithmetic_alone(name):
    "Only convolutions of adapters may run in half precision"
    d, plan = build(name)
    s, t, y = inputs(plan)
    d.eval()
    if name == 'srrl': t['logits'] = torch.nn.functional.linear(t['feature'].mean((2, 3)), d.head.weight, d.head.bias)[..., None, None]
    outs = []
    for half in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=half): outs.append(call(d, s, t, y))
    if name == 'srrl': assert d.stats['head_gap'].item() < 1e-5
    else: assert all(outs[1][k].item() == pytest.approx(outs[0][k].item(), rel=1e-5) for k in outs[0])


def test_dkd_two_classes_is_binary():
    s, t = torch.randn(5, 2), torch.randn(5, 2)
    tckd, nckd = dkd_loss(s, t, torch.tensor([0, 1, 1, 0, 0]), 1.)
    assert nckd.item() == pytest.approx(0, abs=1e-7)
    assert tckd.item() == pytest.approx(np.mean([kl(softmax(b), softmax(a)) for a,b in zip(s.double().numpy(), t.double().numpy())]), rel=1e-5)


@pytest.mark.parametrize('name', OURS)
def test_batch_of_one(name):
    d, plan = build(name)
    s, t, y = inputs(plan, b=1)
    if name in ('srrl', 'reviewkd', 'ofa'):
        with pytest.raises(ValueError, match='at least 2 samples'): call(d, s, t, y)
        d.eval()
    out = call(d, s, t, y)
    sum(out.values()).backward()
    assert finite(d, s, out)


# ---- what all have in common

@pytest.mark.parametrize('name', OURS)
def test_interface(name):
    d, plan = build(name)
    s, t, y = inputs(plan)
    t = {k: v.requires_grad_() for k,v in t.items()}
    out = call(d, s, t, y)
    assert tuple(out) == d.loss_names and all(v.dtype == torch.float and v.shape == () for v in out.values())
    assert set(d.stats) == set(d.stat_names)
    sum(out.values()).backward()
    assert all(v.grad is None for v in t.values()), 'the teacher got a gradient'
    for n,p in d.named_parameters(): assert p.grad is not None and p.grad.abs().max() > 0, n
    columns = d.columns()
    if not list(d.parameters()): assert columns == {}
    else:
        counts = [int(c.replace(',', '')) for c in columns['added parameters']]
        assert len(counts) == len(plan) and sum(counts) == sum(p.numel() for p in d.parameters())


def sizes(*tiny):
    "Maps of two stages: larger than the teacher's and smaller, odd, tiny"
    return pytest.mark.parametrize('s,t', [(((3, 8, 8), (5, 4, 4)), ((6, 4, 4), (2, 8, 8))), (((3, 7, 5), (5, 3, 3)), ((4, 6, 9), (2, 2, 4))), tiny],
                                   ids=['larger and smaller', 'odd', 'tiny'])


def check_sizes(d, plan):
    st, te, y = inputs(plan)
    out = call(d, st, te, y)
    sum(out.values()).backward()
    assert finite(d, st, out)


@pytest.mark.parametrize('name', OURS)
@sizes(((3, 2, 2), (5, 1, 1)), ((2, 2, 2), (4, 1, 1)))
def test_sizes(name, s, t): check_sizes(*build(name, plan_of(name, s, t)))


@pytest.mark.parametrize('name', OURS)
def test_weight(name):
    a, b, c = (build(name, **kw)[0] for kw in ({}, dict(weight=0), dict(weight=2*build(name)[0].weight)))
    s, t, y = inputs(plan_of(name))
    a, b, c = (call(d, s, t, y) for d in (a, b, c))
    for k in a: assert b[k].item() == 0 and c[k].item() == pytest.approx(2*a[k].item(), rel=1e-6)
    for bad in (-1, math.nan, math.inf, '1', None):
        with pytest.raises(ValueError, match='weight must be a number >= 0'): build(name, weight=bad)


@pytest.mark.parametrize('name', OURS)
def test_state_dict(name):
    kw = dict(warmup=3) if name in ('dkd', 'reviewkd') else {}
    a, plan = build(name, **kw)
    s, t, y = inputs(plan)
    call(a, s, t, y)
    state = {k: v.clone() for k,v in a.state_dict().items()}
    b = build(name, **kw)[0]
    with torch.no_grad(): [p.add_(1) for p in b.parameters()]
    b.load_state_dict(state)
    for seed in range(2):
        x, z = call(a, s, t, y, seed=seed), call(b, s, t, y, seed=seed)
        assert all(torch.equal(x[k], z[k]) for k in x)
    assert not any('head' in k for k in state), 'the teacher is in the state'


@pytest.mark.parametrize('name', OURS)
def test_training_lowers_the_loss(name):
    d, plan = build(name)
    s, t, y = inputs(plan)
    opt = torch.optim.Adam([*s.values(), *d.parameters()], lr=.02)
    def step():
        opt.zero_grad()
        loss = sum(call(d, s, t, y).values()); loss.backward(); opt.step()
        return loss.item()
    losses = [step() for _ in range(25)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize('name', RUNS)
def test_compiles_whole(name):
    torch._dynamo.reset()
    d, plan = build(name, **(dict(warmup=3) if name == 'dkd' else {}))
    e = build(name, **(dict(warmup=3) if name == 'dkd' else {}))[0]
    s, t, y = inputs(plan)
    run = torch.compile(e, fullgraph=True, backend='aot_eager')
    for _ in range(2):
        x, z = d(s, t, y), run(s, t, y)
        for k in x: assert z[k].item() == pytest.approx(x[k].item(), rel=1e-5)
    sum(z.values()).backward()
    assert e.stats.keys() == d.stats.keys()


# ---- bad input

def test_registry():
    assert METHODS['diffkd'] is DiffKDDistiller and all(get_method(n) is c for n,c in METHODS.items())
    assert set(METHODS) >= {*OURS, 'diffkd'}
    for n in OURS: assert METHODS[n].default_taps and METHODS[n].__doc__
    for bad in ('KDD', 'none', 3):
        with pytest.raises(ValueError, match="unknown method.*'reviewkd'"): get_method(bad)


@pytest.mark.parametrize('name', OURS)
def test_wrong_plan(name):
    stages = plan_of('vid')
    wrong = {'logits': stages[:1], 'feature': [LOGITS], 'stages': [LOGITS], 'feature logits': stages, 'exits logits': [*stages, LOGITS]}[' '.join(get_method(name).default_taps)]
    kw = dict(teacher=teacher_of(2)) if name == 'srrl' else dict(n_data=N) if name == 'crd' else {}
    for plan in (wrong, []):
        with pytest.raises(ValueError, match=r'taps=\['): get_method(name)(plan, **kw)
    if name == 'reviewkd':
        with pytest.raises(ValueError, match='2 or more feature taps'): ReviewKD(stages[:1])


@pytest.mark.parametrize('name', ['dkd', 'ofa'])
@pytest.mark.parametrize('y', [None, torch.rand(B, K), torch.rand(B), torch.zeros(B, 1, dtype=torch.long), torch.zeros(B - 1, dtype=torch.long)],
                         ids=['none', 'one-hot', 'floats', 'column', 'short'])
def test_wrong_labels(name, y):
    d, plan = build(name)
    s, t, _ = inputs(plan)
    with pytest.raises(ValueError, match='one class index per sample'): d(s, t, y)


@pytest.mark.parametrize('make,match', [
    (lambda: KD([LOGITS], temperature=0), 'temperature must be a positive'), (lambda: DKD([LOGITS], beta=-1), 'beta must be'),
    (lambda: DKD([tap('logits', (1, 1, 1), (1, 1, 1), 'logits')]), 'at least 2 classes'), (lambda: VID(plan_of('vid'), variance=0), 'variance'),
    (lambda: ReviewKD(plan_of('vid'), width=0), 'width'), (lambda: OFA(plan_of('ofa'), eps=0), 'eps'), (lambda: OFA(plan_of('ofa'), width=1.5), 'width'),
    (lambda: CRD(plan_of('crd'), 1), 'n_data must be an integer >= 2'), (lambda: CRD(plan_of('crd'), 4, k=0), 'k must be'),
    (lambda: CRD(plan_of('crd'), 4, [0, 1]), '4 training samples'), (lambda: CRD(plan_of('crd'), 4, [1]*4), 'single class'),
    (lambda: SRRL(plan_of('srrl'), teacher_of(9)), 'from 9 to 4'), (lambda: SRRL(plan_of('srrl'), nn.Conv2d(3, 4, 1)), 'no nn.Linear'),
    (lambda: SRRL(plan_of('srrl'), teacher_of(4), classifier='5'), "no module named '5'"), (lambda: SRRL(plan_of('srrl'), teacher_of(4), classifier='0'), "no nn.Linear '0'"),
])
def test_wrong_options(make, match):
    with pytest.raises(ValueError, match=match): make()


# ---- single methods

def test_srrl_grid_and_copy():
    teacher = teacher_of(4, grid=2)
    d, plan = build('srrl', plan_of('srrl', t=((2, 8, 8), (4, 4, 4))), teacher=teacher)
    x = torch.randn(B, 3, 4, 4)
    s, _, y = inputs(plan)
    t = {'feature': teacher[0](x), 'logits': teacher(x)[..., None, None]}
    d(s, t, y)
    assert d.head.grid == (2, 2) and d.stats['head_gap'].item() < 1e-6
    assert not any(p is q for p in d.parameters() for q in teacher.parameters())
    with torch.no_grad(): teacher[3].weight.zero_()
    assert d.head.weight.abs().max() > 0


def test_srrl_refuses_a_class_token():
    class Vit(nn.Module):
        def __init__(self): super().__init__(); self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, K)
    at = Tap('feature', 'feature', place((5, 4, 4)), Place('norm', Layout('tokens', 1), (4, 2, 2)))
    with pytest.raises(ValueError, match='class token'): SRRL([at, LOGITS], Vit())
    SRRL([at, LOGITS], Vit(), classifier='head')


def test_crd_memory():
    d, plan = build('crd')
    s, t, y = inputs(plan)
    d.eval()
    before = {k: v.clone() for k,v in d.state_dict().items()}
    call(d, s, t, y)
    assert all(torch.equal(v, before[k]) or k == 'log_mean' for k,v in d.state_dict().items()) and d.log_mean.isnan().all()
    d.train()
    call(d, s, t, y)
    z, old = d.log_mean.clone(), before['memory_student'][places(y)]
    v = torch.nn.functional.normalize(d.adapters[0]['student'](s['feature'].mean((2, 3)))).detach()
    assert torch.allclose(d.memory_student[places(y)], torch.nn.functional.normalize(.5*old + .5*v), atol=1e-6)
    rest = torch.tensor([i for i in range(N) if i not in places(y)])
    assert torch.equal(d.memory_student[rest], before['memory_student'][rest])
    call(d, s, t, y)
    assert torch.equal(z, d.log_mean), 'Z is that of the first batch'


@pytest.mark.parametrize('labels', [None, torch.tensor([5, -1, 5, 5, 30, 30, 5, -1, 5, 5, 5, 5])], ids=['unknown', 'known'])
def test_crd_negatives(labels):
    d, _ = build('crd', labels=labels, k=20000)
    index = torch.arange(N)
    neg = d.negatives(index, draws())
    for i in range(N):
        allowed = [j for j in range(N) if (j != i if labels is None else labels[j] != labels[i])]
        share = neg[i].bincount(minlength=N)/neg.shape[1]
        assert torch.allclose(share, torch.tensor([1/len(allowed) if j in allowed else 0. for j in range(N)]), atol=5*math.sqrt(.25/20000))
        assert share[[j for j in range(N) if j not in allowed]].sum() == 0


def test_crd_index():
    d, plan = build('crd')
    s, t, y = inputs(plan)
    for bad in (None, torch.arange(B - 1)):
        with pytest.raises(ValueError, match='index'): d(s, t, y, draws(), bad)


def test_ofa_branches_keep_equal_sizes():
    d = OFA([*[tap(f'exit{i}', (6, 4, 4), (K, 1, 1)) for i in range(3)], LOGITS])
    for branch,n in zip(d.adapters, (2, 1, 0)):
        x = torch.randn(2, 6, 4, 4)
        for m in branch[:-3]: x = m(x)
        assert x.shape == (2, 6, 4, 4) and len(branch) == max(n, 1) + 3
        assert all(m.num_features == 6 for m in branch.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize('name', ['dkd', 'reviewkd'])
def test_warmup(name):
    (a, plan), (b, _) = build(name), build(name, warmup=2)
    s, t, y = inputs(plan)
    for share in (.5, 1, 1):
        x, z = a(s, t, y), b(s, t, y)
        for k in x: assert z[k].item() == pytest.approx(share*x[k].item(), rel=1e-5)
    b.eval()
    assert b.calls == 3 and b(s, t, y) and b.calls == 3


def test_ofa_branches_follow_the_sizes():
    s = ((4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4))
    d = OFA([*[tap(f'exit{i}', a, (K, 1, 1)) for i,a in enumerate(s)], LOGITS])
    for branch,shape,n in zip(d.adapters, s, (3, 2, 1, 0)):
        x = torch.randn(2, *shape)
        for m in branch[:-3]: x = m(x)
        assert x.shape == (2, 32, 4, 4) and len(branch) == max(n, 1) + 3


# ---- several processes, several methods, modules of another form

@pytest.mark.parametrize('name', ['diffkd', 'kd+diffkd'])
def test_two_processes_draw_the_noise_of_the_whole_batch(name):
    "Noise and times of a sample do not depend on how the batch is shared out, for joined methods either"
    plan = [LOGITS, tap('feature', (3, 4, 4), (2, 4, 4))]
    torch.manual_seed(0)
    d = get_method(name)(plan).eval()
    taps = (d.methods['diffkd'] if '+' in name else d).taps
    drawn = []
    for t in taps:
        plain = t.draw
        t.draw = lambda *a, plain=plain: drawn.append(plain(*a)) or drawn[-1]
    s, t, y = inputs(plan)

    def share(i, n):
        drawn.clear()
        rows = slice(i*B//n, (i+1)*B//n)
        pick = lambda maps: {k: v[rows] for k,v in maps.items()}
        return d(pick(s), pick(t), y[rows], Draws(torch.Generator().manual_seed(1), (i, n))), [list(x) for x in drawn]
    (whole, noise), (first, a), (second, b) = share(0, 1), share(0, 2), share(1, 2)
    for w,x,z in zip(noise, a, b):
        for p,q,r in zip(w, x, z): assert torch.equal(p, torch.cat([q, r]))
    for k in whole: assert whole[k].item() == pytest.approx((first[k].item() + second[k].item())/2, rel=1e-4)


def test_joined_methods_pass_everything_on():
    seen = []
    class Notes(Distiller):
        loss_names, needs, hard_labels = ('note',), ('draws', 'index'), True
        def losses(self, student, teacher, target=None, draws=None, index=None):
            seen.append((target, draws, index))
            return {'note': student[0].sum()}
    plan = plan_of('fitnet')
    METHODS['notes'] = Notes
    try: d = get_method('fitnet+notes')(plan)
    finally: del METHODS['notes']
    assert d.hard_labels and set(d.needs) == {'draws', 'index'} and d.loss_names == ('fitnet.fitnet', 'notes.note') and d.pieces() == list(d.methods.values())
    s, t, y = inputs(plan)
    source, index = draws(), places(y)
    d(s, t, y, source, index)
    assert seen == [(y, source, index)]


@pytest.mark.parametrize('name', [*OURS, 'diffkd', 'kd+fitnet'])
def test_every_method_is_a_distiller(name):
    cls = get_method(name)
    assert issubclass(cls, Distiller) and isinstance(cls.loss_names, tuple) and isinstance(cls.needs, tuple) and cls.default_taps


def test_a_module_of_another_form():
    class Other(nn.Module):
        def __init__(self): super().__init__(); self.lin = nn.Linear(3, 3)
        def forward(self, student, teacher, target, index): return {'a': student['feature'].sum() + index.sum()}
    own = Other()
    d = as_distiller(own)
    assert (d.loss_names, d.stat_names, d.hard_labels, d.default_taps) == (('distill',), (), False, ['feature', 'logits'])
    assert d({'feature': torch.ones(2)}, {}, index=torch.tensor([3]))['a'] == 5
    assert d.state_dict().keys() == own.state_dict().keys() and list(d.parameters()) == list(own.parameters()) and d.pieces() == [d]
    d.load_state_dict({k: v + 1 for k,v in own.state_dict().items()})
    with pytest.raises(AttributeError, match='nothing'): d.nothing
