"The methods since: numbers of the authors' programs, and what all methods have in common"
import json, math
import pytest
from pairs import *
from diffkd_nb.callback import DiffKDCallback, DistillCallback, distillation
from diffkd_nb.distillation import Distillation
from diffkd_nb.diffkd import DiffKDDistiller
from diffkd_nb.distiller import Context, edge_weights
from diffkd_nb.comparison import compare
from diffkd_nb.features_since import CrossAttention, lsh_loss
from diffkd_nb.head import TeacherHead, find_classifier
from diffkd_nb.losses import kl_loss
from diffkd_nb.methods import *
from diffkd_nb.models import make_model
from diffkd_nb.recipes import get_recipe
from diffkd_nb.rng import Draws
from diffkd_nb.run import run
from diffkd_nb.taps import plan_taps
from diffkd_nb.verify import verify
from diffkd_nb.weights import read_weights, save_weights, state_hash
import test_methods as old
from test_methods import LOGITS, N, call, check_sizes, draws, finite, gradients, inputs, place, places, plan_of, sizes, tap, teacher_of

pytestmark = pytest.mark.filterwarnings("ignore:the teacher's classifier:UserWarning")      # tensors here are made up

LOGIT = ['ttm', 'wttm', 'gdkd', 'taid', 'pskd', 'meal']
SINCE = LOGIT + ['fmkt', 'lshfm', 'cankd', 'dskd', 'cwd', 'cirkd', 'maskd']
LABELLED = [n for n in SINCE if METHODS[n].hard_labels]
every = pytest.mark.parametrize('name', SINCE)


def build(name, plan=None, **kw):
    torch.manual_seed(0)
    plan = plan or plan_of(name)
    cls = get_method(name)
    channels = next((t.teacher.shape[0] for t in plan if t.kind == 'feature'), 4)
    d = cls(plan, **Context(teacher_of(channels), N).of(cls), **kw)
    d.expect(4, 40)
    return d, plan


# ---- numbers that the authors' programs gave, once, on these inputs

def wave(*shape, k=1., a=2.): return a*torch.sin(k*(torch.arange(math.prod(shape), dtype=torch.float)+1)**1.1).view(shape)

def fill(*parameters):
    for i,p in enumerate(parameters): p.data.copy_(wave(*p.shape, k=.3+.1*i, a=.5).view(p.shape))

S, T, Y = wave(6, 10), wave(6, 10, k=1.7, a=4.), torch.arange(6)
CLASSES = [tap('logits', (10, 1, 1), (10, 1, 1), 'logits')]
def maps(z, **more): return {'logits': z[..., None, None], **more}
def near(x): return pytest.approx(x, rel=2e-5)


def test_ttm_and_wttm():
    assert TTM(CLASSES, .1, 1.)(maps(S), maps(T))['ttm'].item() == near(.8428232073783875)
    assert WTTM(CLASSES, .2, 1.)(maps(S), maps(T))['wttm'].item() == near(4.244346618652344)


def test_gdkd():
    out = GDKD(CLASSES, w2=1.)(maps(S), maps(T))
    assert [v.item() for v in out.values()] == near([2.981916666030884, 1.1311036348342896, 1.5088564157485962])


def test_taid():
    d, seen = TAID(CLASSES, alpha=.2), []
    d.expect(1, 10)
    for i in range(5): seen += [d(maps(S + .3*i*(T - S)), maps(T))['taid'].item(), d.t.item()]
    assert seen == near([2.151573419570923, .4, 1.646860957145691, .4600703716278076, 1.4402233362197876, .52, 1.3300988674163818, .58, 1.2683733701705933, .64])


def test_meal_discriminator():
    d = MEAL(CLASSES)
    d.adapters[0] = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2), nn.ReLU())
    fill(*d.adapters[0].parameters())
    out = d(maps(S), maps(T))
    assert out['discriminator'].item() == near(.954578697681427) and out['similarity'].item() == near(kl_loss(S, T).item())


def test_lshfm():
    planes, bias, s, t = wave(8, 4, k=.7), wave(8, k=.2), wave(6, 4, k=.9), wave(6, 4, k=1.3)
    right = torch.tensor([True, True, False, True, True, True])
    each = lsh_loss(s, t, planes, bias) + (s - t).square().mean(1)
    assert each[right].mean().item() == near(6.403719902038574)


def test_cankd():
    att, s, t = CrossAttention(6), wave(6, 6, 4, 5, k=.37), wave(6, 6, 4, 5, k=.91)
    fill(*att.parameters())
    assert 5*F.mse_loss(F.instance_norm(att(s, t)), F.instance_norm(t)).item()/2 == near(4.99745512008667)


@pytest.mark.parametrize('align,expect', [('dist', 6.329880237579346), ('kl', 5.768424034118652)])
def test_fmkt(align, expect):
    plan = [tap('feature', (6, 4, 5), (6, 4, 5)), *CLASSES]
    d, s = FMKT(plan, align=align), wave(6, 6, 4, 5, k=.37)
    flow = d.adapters[0]
    fill(*flow.velocity.parameters(), *flow.head.parameters(), *flow.time.parameters())
    got = d(maps(S, feature=s), maps(T, feature=s), Y)['flow'].item()
    assert got == pytest.approx(expect, rel=3e-4 if align == 'dist' else 2e-5)  # its correlation adds 1e-5 to the product of the lengths, ours 1e-8
    assert flow(s).mean(0).double().sum().item() == near(2.629546444863081)


# ---- what all have in common

@every
def test_interface(name):
    d, plan = build(name)
    if name == 'cankd': nn.init.ones_(d.adapters[0][1].out[1].weight)       # 0 at first, and nothing behind it would move
    s, t, y = inputs(plan)
    t = {k: v.requires_grad_() for k,v in t.items()}
    call(d, s, t, y)
    out = call(d, s, t, y)                                                  # PS-KD has a past from here on
    assert tuple(out) == d.loss_names and all(v.dtype == torch.float and v.shape == () for v in out.values())
    assert set(d.stats) == set(d.stat_names) and METHODS[name].use.endswith('.')
    sum(out.values()).backward()
    assert finite(d, s, out) and all(v.grad is None for v in t.values()), 'the teacher got a gradient'
    inside = lambda n: name == 'dskd' and n.endswith('bias')                # a bias before a BatchNorm moves nothing
    for n,p in d.named_parameters(): assert p.grad is not None and (p.grad.abs().max() > 0 or inside(n)), n
    counts = [int(c.replace(',', '')) for c in d.columns().get('added parameters', [])]
    assert sum(counts) == sum(p.numel() for p in d.parameters())


@every
def test_training_lowers_the_loss(name):
    d, plan = build(name, **(dict(t_end=.4) if name == 'taid' else {})) # a target that stays
    s, t, y = inputs(plan)
    opt = torch.optim.Adam([*s.values(), *d.parameters()], lr=.02)
    def step(i):
        opt.zero_grad()
        loss = sum(call(d, s, t, y).values())
        (loss + (F.cross_entropy(s['logits'].flatten(1), y) if name == 'pskd' else 0)).backward(); opt.step()
        return loss.item() if name != 'pskd' else loss.item() + F.cross_entropy(s['logits'].flatten(1), y).item()
    losses = [step(i) for i in range(30)]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@every
def test_autocast_on_the_cpu(name):
    "Only what is learned may run in half precision; the losses are float32"
    d, plan = build(name)
    e, _ = build(name)
    s, t, y = inputs(plan)
    call(d, s, t, y); call(e, s, t, y)
    plain = call(d, s, t, y)
    with torch.autocast('cpu', torch.bfloat16): half = call(e, s, t, y)
    assert all(v.dtype == torch.float for v in half.values())
    exact = name in ('ttm', 'wttm', 'gdkd', 'taid', 'pskd')
    for k in plain: assert half[k].item() == pytest.approx(plain[k].item(), rel=1e-5 if exact else .05, abs=0 if exact else .02), k
    sum(half.values()).backward()
    assert finite(e, s, half)


@every
@pytest.mark.parametrize('dtype', [torch.half, torch.bfloat16])
def test_huge_logits_in_half_precision(name, dtype):
    d, plan = build(name)
    s, t, y = inputs(plan)
    def to(v, big): return (v.detach()*(1e4 if big else 1)).clamp(-6e4, 6e4).to(dtype)
    s, t = {k: to(v, k == 'logits').requires_grad_() for k,v in s.items()}, {k: to(v, k == 'logits') for k,v in t.items()}
    for _ in range(2): out = call(d, s, t, y)
    sum(out.values()).backward()
    assert finite(d, s, out) and all(v.dtype == torch.float for v in out.values())


@every
@pytest.mark.parametrize('value', [0., 2.])
def test_constant_maps(name, value):
    for zscore in (False, True)[:1 + ('zscore' in option_defaults(METHODS[name]))]:
        d, plan = build(name, **({'zscore': True} if zscore else {}))
        s, t, y = inputs(plan)
        s = {k: torch.full_like(v, value).requires_grad_() for k,v in s.items()}
        for teacher in (t, {k: torch.full_like(v, value) for k,v in t.items()}):
            for _ in range(2): out = call(d, s, teacher, y)
            sum(out.values()).backward()
            assert finite(d, s, out)


@every
@sizes(((3, 2, 2), (5, 1, 2)), ((2, 2, 2), (4, 1, 3)))              # instance norm needs two positions
def test_sizes(name, s, t): check_sizes(*build(name, plan_of(name, s, t)))


@every
def test_state_dict_and_resume(name):
    a, plan = build(name)
    s, t, y = inputs(plan)
    call(a, s, t, y)
    state = {k: v.clone() for k,v in a.state_dict().items()}
    b = build(name)[0]
    with torch.no_grad(): [p.add_(1) for p in b.parameters()]
    b.load_state_dict(state); a.expect(3, 39); b.expect(3, 39)
    for seed in range(3):
        x, z = call(a, s, t, y, seed=seed), call(b, s, t, y, seed=seed)
        assert all(torch.equal(x[k], z[k]) for k in x)
    assert all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))
    assert not any('head.' in k for k in state if name == 'dskd'), 'the teacher is in the state'


@every
def test_batch_of_one(name):
    d, plan = build(name)
    s, t, y = inputs(plan, b=1)
    if name == 'dskd':
        with pytest.raises(ValueError, match='at least 2 samples'): call(d, s, t, y)
        d.eval()
    if name == 'cankd': d.eval()
    out = call(d, s, t, y)
    sum(out.values()).backward()
    assert finite(d, s, out)


@pytest.mark.slow
@every
def test_compiles_whole(name):
    torch._dynamo.reset()
    d, plan = build(name)
    e = build(name)[0]
    s, t, y = inputs(plan)
    run = torch.compile(e, fullgraph=True, backend='aot_eager')
    for seed in range(2):
        more = dict(index=places(y)) if 'index' in d.needs else {}
        torch.manual_seed(seed); x = d(s, t, y, **more)
        torch.manual_seed(seed); z = run(s, t, y, **more)
        for k in x: assert z[k].item() == pytest.approx(x[k].item(), rel=1e-4, abs=1e-5)
    sum(z.values()).backward()


@pytest.mark.parametrize('name', LABELLED)
@pytest.mark.parametrize('y', [None, torch.rand(old.B, old.K), torch.zeros(old.B, 1, dtype=torch.long)], ids=['none', 'one-hot', 'column'])
def test_wrong_labels(name, y):
    d, plan = build(name)
    s, t, _ = inputs(plan)
    with pytest.raises(ValueError, match='one class index per sample'): d(s, t, y, draws(), torch.arange(old.B))


@pytest.mark.parametrize('make,match', [
    (lambda: TTM([LOGITS], gamma=0), 'gamma must be'), (lambda: GDKD([LOGITS], top=0), 'top must be'), (lambda: GDKD([LOGITS], w1=-1), 'w1 must be'),
    (lambda: TAID([LOGITS], t_start=1.), 't_start'), (lambda: PSKD([LOGITS], 0), 'n_data must be'), (lambda: PSKD([LOGITS], 4, alpha=2.), 'alpha must be at most 1'),
    (lambda: PSKD([LOGITS], 4, output='labels'), 'PSKD is defined for one class'), (lambda: FMKT(plan_of('fmkt'), steps=0), 'steps must be'),
    (lambda: LSHFM(plan_of('lshfm'), std=0.), 'std must be'), (lambda: LSHFM(plan_of('lshfm'), std=1., planes=0), 'number of planes'),
    (lambda: CanKD([tap('feature', (3, 1, 1), (4, 2, 2))]), 'a single one'), (lambda: DSKD(plan_of('dskd'), teacher_of(9)), 'from 9 to 4'),
    (lambda: DSKD(plan_of('dskd'), nn.Conv2d(3, 4, 1)), 'no nn.Linear'), (lambda: MEAL([LOGITS], similarity=-1), 'similarity must be'),
    (lambda: KD([LOGITS._replace(output='labels')], zscore=True), 'one class among several')])
def test_wrong_options(make, match):
    with pytest.raises(ValueError, match=match): make()


@pytest.mark.parametrize('name', ['taid', 'pskd'])
def test_a_loop_must_tell_how_long_it_is(name):
    d = get_method(name)([LOGITS], **Context(n_data=N).of(METHODS[name]))
    s, t, y = inputs([LOGITS])
    with pytest.raises(ValueError, match='how long it is'): call(d, s, t, y)


def test_paced_weighs_what_each_sample_sends_back():
    plan = plan_of('diffkd')
    s, t, y = inputs(plan)
    torch.manual_seed(0); plain = DiffKDDistiller(plan, latent=None)
    torch.manual_seed(0); paced = DiffKDDistiller(plan, latent=None, paced=True)
    a, b = (d(s, t, y, draws()) for d in (plain, paced))
    assert all(a[k].item() == pytest.approx(b[k].item(), rel=1e-5) for k in a) and paced.hard_labels and not plain.hard_labels
    w = edge_weights(s['logits'].flatten(1), y)
    for k in s:
        g, h = (torch.autograd.grad(sum(out.values()), s[k], retain_graph=True)[0] for out in (a, b))
        assert torch.allclose(h, g*w.view(-1, 1, 1, 1), atol=1e-6)
    with pytest.raises(ValueError, match='one class index'): paced(s, t, None, draws())
    for bad in (plan[:1], [plan[1]._replace(output='labels')]):
        with pytest.raises(ValueError, match='one class among several'): DiffKDDistiller(bad, paced=True)


@pytest.mark.parametrize('name', ['kd', 'diffkd'])
def test_paced_goes_without_mixup(name):
    from fastai.callback.mixup import MixUp
    learn = learner(sequential(6), [DistillCallback(sequential(20), name, paced=True, verbose=False), MixUp()], dls=dls_of((32, 32)))
    with quiet(learn), pytest.raises(ValueError, match='MixUp mixes samples of two classes'): learn.fit(1)
    learn = learner(sequential(6), DistillCallback(sequential(20), name, paced=True, verbose=False), dls=dls_of((32, 32)))
    with quiet(learn): learn.fit(1, 1e-3)


@pytest.mark.parametrize('name', ['taid', 'lshfm', 'dskd'])
def test_what_is_kept_of_a_batch_is_that_of_all_processes(name, monkeypatch):
    d, plan = build(name)
    s, t, y = inputs(plan)
    seen = []
    def all_gather(rows, x): seen.append(x); [r.copy_(x + i) for i,r in enumerate(rows)]
    monkeypatch.setattr(torch.distributed, 'all_gather', all_gather)
    def step(): return d(s, t, y, Draws(torch.Generator().manual_seed(0), (0, 2)))
    step()
    kept = {'taid': lambda: d.last, 'lshfm': lambda: d.planes.bias, 'dskd': lambda: d.planes.bias}[name]()
    both = torch.cat([seen[0], seen[0] + 1])
    torch.testing.assert_close(kept, both.mean() if name == 'taid' else -(both @ d.planes.normals.T).median(0).values)
    step(); assert len(seen) == (2 if name == 'taid' else 1)             # the offsets are known


# ---- with a Learner

def learner(student, cb, size=32, dls=None): return make_learner(student, size, cb, dls=dls)

NARROW = (32, 48)
def dls_of(size, n=16, labels=True):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 3, *size, generator=g), torch.randint(0, K, (n,), generator=g)
    data = Pairs(zip(x, y) if labels else [(a,) for a in x])
    return DataLoaders.from_dsets(data, data, bs=8, device='cpu', num_workers=0)

FOUR = {'cnn to cnn, not square': (lambda: sequential(6), lambda: sequential(20), NARROW),
        'transformer to cnn': (lambda: sequential(6), lambda: swin(64), (64, 64)),
        'convnext to resnet': (lambda: tm('resnet10t'), lambda: tm('convnext_atto'), (64, 64)),
        'cnn to transformer': (lambda: vit(32), lambda: sequential(20), (32, 32))}

@every
@pytest.mark.parametrize('pair', [p if i == 0 else pytest.param(p, marks=pytest.mark.slow) for i,p in enumerate(FOUR)])
def test_trains_on_pairs(name, pair):
    student, teacher, size = FOUR[pair]
    set_seed(0)
    student, teacher = student(), teacher()
    seen, keys = snapshot(teacher), list(student.state_dict())
    learn = learner(student, DistillCallback(teacher, name, verbose=False), dls=dls_of(size))
    with quiet(learn): learn.fit(2, 1e-3)
    same(seen, snapshot(teacher))
    assert list(student.state_dict()) == keys and n_hooks(student) == n_hooks(teacher) == 0
    assert all(np.isfinite(v) for row in learn.recorder.values for v in row)
    if name == 'dskd': assert distillation(learn).distiller.stats['head_gap'] < 1e-3


@pytest.mark.parametrize('name', ['kd', 'kd:zscore=True', *[n for n in LOGIT if n != 'pskd']])
def test_data_without_labels(name):
    set_seed(0)
    student, before = sequential(6), None
    learn = learner(student, DistillCallback(sequential(20), name, task_weight=0, verbose=False), dls=dls_of((32, 32), labels=False))
    learn.metrics = []
    before = deepcopy(student.state_dict())
    with quiet(learn), learn.removed_cbs([c for c in learn.cbs if c.name == 'progress']):
        learn.create_opt(); learn._do_epoch_validate = lambda *a, **k: None
        learn.fit(1, 1e-2)
    assert any(not torch.equal(before[k], v) for k,v in student.state_dict().items())


def test_past_epoch_as_teacher():
    set_seed(0)
    learn = learner(sequential(6), DistillCallback(None, 'pskd', verbose=False), dls=dls_of((32, 32)))
    with quiet(learn): learn.fit(3, 1e-2)
    d = distillation(learn).distiller
    assert d.seen.tolist() == [3.]*16 and d.total == 3 and d.stats['alpha'].item() == pytest.approx(.8)
    assert torch.allclose(d.past.sum(1), torch.ones(16), atol=1e-5)
    first, *later = [row[learn.recorder.metric_names.index('pskd') - 1] for row in learn.recorder.values]
    assert first == 0 and all(v != 0 for v in later)
    with pytest.raises(TypeError, match='teacher must be an nn.Module'): DistillCallback(None, 'kd')
    with pytest.raises(TypeError, match='teacher must be an nn.Module'): DistillCallback(None, 'kd+pskd')


def test_two_teachers():
    set_seed(0)
    teachers, x = [sequential(20).eval(), sequential(8).eval()], torch.randn(8, 3, 32, 32)
    kd = Distillation(sequential(6), teachers, 'kd', x[:2], temperature=1.)
    p = sum(t(x).softmax(1) for t in teachers)/2
    with kd:
        z = kd.student(x)
        assert torch.allclose(kd(x).losses['kd'], F.kl_div(z.log_softmax(1), p, reduction='batchmean'), rtol=1e-4)
    seen = [snapshot(t) for t in teachers]
    for name in ('kd', 'meal', 'wttm'):
        learn = learner(sequential(6), DistillCallback(teachers, name, verbose=False), dls=dls_of((32, 32)))
        with quiet(learn): learn.fit(1, 1e-3)
    for a,t in zip(seen, teachers): same(a, snapshot(t))
    learn = learner(sequential(6), DistillCallback(teachers, 'fitnet', verbose=False), dls=dls_of((32, 32)))
    with quiet(learn), pytest.raises(ValueError, match='does not say whose'): learn.fit(1)
    learn = learner(sequential(6), DistillCallback(teachers, 'fitnet', taps=[('5', 'teachers.1.5')], verbose=False), dls=dls_of((32, 32)))
    with quiet(learn): learn.fit(1, 1e-3)
    with pytest.raises(TypeError, match='two or more'): DistillCallback(teachers[:1], 'kd')


def test_learning_the_teacher_first(capsys):
    "The student's batches, random numbers and hooks are those of a training without it"
    seen, drawn = {}, {}
    class Watch(Callback):
        def before_batch(self):
            if self.training: seen.setdefault(steps, []).append(self.xb[0].sum().item())
    for steps in (0, 7):
        set_seed(0)
        teacher = sequential(20).eval(); was = snapshot(teacher)
        cb = DiffKDCallback(teacher, taps=['feature'], pretrain=steps)
        learn = learner(sequential(6), cb, dls=dls_of((32, 32))); learn.add_cb(Watch())
        with quiet(learn): learn.fit(2, 1e-3)
        drawn[steps] = torch.rand(1).item()
        same(was, snapshot(teacher))
        assert cb.kd.pretraining_left() == 0 and getattr(cb.distiller, 'pretrained', 0) == steps
        assert not n_hooks(learn.model) and not n_hooks(teacher)
    assert seen[0] == seen[7] and drawn[0] == drawn[7]
    said = capsys.readouterr().out
    assert said.count('learnt the teacher in 7 steps') == 1                 # once, not in the second epoch
    with pytest.raises(ValueError, match='0 or more, got -1'): DiffKDDistiller(plan_of('diffkd'), pretrain=-1)
    with pytest.raises(ValueError, match='no tap has one'): DiffKDDistiller(plan_of('diffkd'), pretrain=5, denoiser='identity', latent=None)


@pytest.mark.parametrize('options', [dict(predicts='clean', mixing='vp', start='gamma', norms='separate'),
                                     *(pytest.param(kw, marks=pytest.mark.slow) for kw in (dict(predicts='clean'), dict(mixing='vp')))], ids=str)
def test_other_forms_of_the_diffusion_learn(options):
    set_seed(0)
    d, x = DiffKDDistiller(plan_of('diffkd'), **options), None
    s, t = ({p.name: torch.randn(16, *(p.student if r == 's' else p.teacher).shape) for p in plan_of('diffkd')} for r in 'st')
    opt = torch.optim.Adam(d.parameters(), 1e-2)
    seen = []
    for i in range(60):
        losses = d(s, t, draws=Draws(torch.Generator().manual_seed(i)))
        sum(losses.values()).backward(); opt.step(); opt.zero_grad(); seen.append({k: v.item() for k,v in losses.items()})
    mean = lambda rows, k: sum(r[k] for r in rows)/len(rows)
    assert all(mean(seen[-10:], k) < .8*mean(seen[:10], k) for k in ('kd', 'diffusion'))


def test_runs_with_two_teachers(tmp_path):
    spec = {n: f"{n}@{tmp_path/n.replace(':', '')}.safetensors" for n in ('small:8', 'small:6')}
    for i,(n,s) in enumerate(spec.items()):
        torch.manual_seed(i); save_weights(make_model(n, 10, 1, 8), s.partition('@')[2])
    files, both = [s.partition('@')[2] for s in spec.values()], ' + '.join(spec.values())
    short = get_recipe('tiny').replace(epochs=1)
    c = compare([(both, 'small:4'), (spec['small:8'], 'small:4')], ['kd', 'meal'], 1, short, 'digits', tmp_path/'c',
                executor='here', threads=1, progress=False)
    assert set(c.runs.teacher) == {'small:8 + small:6', 'small:8'} and len(c.runs) == 4
    assert verify(tmp_path/'c', teacher=files) and not verify(tmp_path/'c', teacher=files[1:], evaluate_students=False)
    out = next(tmp_path.glob('c/small_4-from-small_8_small_6/kd*/seed0'))
    stored = json.loads((out/'manifest.json').read_text())
    joined = {f'teachers.{i}.{k}': v for i,f in enumerate(files) for k,v in read_weights(f).items()}
    assert stored['settings']['teacher_hash'] == state_hash(joined)
    m = run(short, 'digits', both, 'small:4', 'kd', 0, tmp_path/'again', progress=False)
    assert m['student_hash'] == stored['student_hash']


@pytest.mark.parametrize('name', ['diffkd+gdkd', 'wttm+crd', 'kd+pskd', 'fmkt+diffkd', 'kd+dskd', 'taid+cankd'])
def test_joined(name):
    set_seed(0)
    learn = learner(sequential(6), DistillCallback(sequential(20), name, verbose=False), dls=dls_of((32, 32)))
    with quiet(learn): learn.fit(2, 1e-3)
    assert all(np.isfinite(v) for row in learn.recorder.values for v in row)


# ---- the teacher's classifier behind a normalisation

@pytest.mark.parametrize('name', ['timm:convnext_atto', 'timm:swin', 'torchvision:convnext_tiny', 'timm:resnet10t'])
def test_heads_with_a_norm(name):
    torch.manual_seed(0)
    size = 64
    teacher = {'timm:convnext_atto': lambda: tm('convnext_atto'), 'timm:swin': lambda: swin(64), 'timm:resnet10t': lambda: tm('resnet10t'),
               'torchvision:convnext_tiny': lambda: tv('convnext_tiny')}[name]().eval()
    for m in teacher.modules():
        if isinstance(m, nn.LayerNorm): nn.init.uniform_(m.weight, .5, 2); nn.init.normal_(m.bias)
    x = torch.randn(2, 3, size, size)
    feature, logits = plan_taps(teacher, deepcopy(teacher), x)
    if name == 'timm:swin':                                            # its last feature lies behind the norm; here the one before
        feature, logits = plan_taps(teacher, deepcopy(teacher), x, taps=[('layers', 'layers'), 'logits'])
    head, seen = TeacherHead(teacher, feature, K), {}
    h = teacher.get_submodule(feature.teacher.name).register_forward_hook(lambda m, i, o: seen.update(o=o))
    y = teacher(x); h.remove()
    from diffkd_nb.layouts import to_map
    z = to_map(seen['o'], feature.teacher.layout)
    assert torch.allclose(head.logits(z), y, atol=1e-4) and (head.norm is not None) == (name != 'timm:resnet10t')
    assert find_classifier(teacher, feature, K)[1] == (1, 1)


def test_a_run_without_a_teacher_goes_on_after_a_kill(tmp_path, monkeypatch):
    from diffkd_nb.experiment import run
    from diffkd_nb.recipes import get_recipe
    train = lambda name: run(get_recipe('tiny').replace(epochs=3, batch_size=64), 'digits?limit=20', None, 'small:4', 'pskd', 0, tmp_path/name, progress=False)
    m = train('whole')
    assert m['settings']['teacher'] is None and m['settings']['method'] == 'pskd' and m['taps'][0]['kind'] == 'logits'
    assert {'pskd', 'alpha'} <= set((tmp_path/'whole'/'log.csv').read_text().split('\n')[0].split(','))
    class Killed(Exception): pass
    plain = PSKD.losses
    def losses(self, *args, **kw):
        if self.seen.max() >= 2 and self.seen.min() >= 1: raise Killed('now')
        return plain(self, *args, **kw)
    monkeypatch.setattr(PSKD, 'losses', losses)
    with pytest.raises(Killed): train('killed')
    monkeypatch.undo()
    assert train('killed')['student_hash'] == m['student_hash']


# ---- found in use

@pytest.mark.parametrize('name,options', [('kd+dist', dict(kd=dict(paced=True))), ('kd:paced=True+dist', {}), ('kd+diffkd', dict(diffkd=dict(paced=True)))])
def test_paced_in_a_joined_method_needs_labels(name, options):
    student, teacher = sequential(6), sequential(20)
    with pytest.raises(ValueError, match='mixes samples of two classes'), quiet(l := learner(student, [DistillCallback(teacher, name, verbose=False, **options), MixUp()])): l.fit(1, 1e-3)
    l = learner(sequential(6), DistillCallback(teacher, name, verbose=False, **options))
    with quiet(l): l.fit(1, 1e-3)
    assert distillation(l).distiller.hard_labels


def test_several_teachers_read_the_loss_of_each_fit():
    "The mean of probabilities is that of classes, then of labels, and the teachers that are given are not changed"
    teachers, cb = [sequential(8), sequential(12)], None
    cb = DistillCallback(teachers, 'kd', temperature=1., verbose=False)
    l = learner(sequential(6), cb)
    with quiet(l): l.fit(1, 0.)
    x = torch.randn(3, 3, *NARROW)
    for t in teachers: t.eval()
    logits = [t(x) for t in teachers]
    with torch.no_grad(): assert torch.allclose(cb.teacher.eval()(x).softmax(1), sum(z.softmax(1) for z in logits)/2, atol=1e-5)
    l.loss_func = lambda p, y: F.binary_cross_entropy_with_logits(p, F.one_hot(y, p.shape[1]).float())
    cb.output = 'labels'
    with quiet(l): l.fit(1, 0.)
    with torch.no_grad(): assert torch.allclose(cb.teacher.eval()(x).sigmoid(), sum(z.sigmoid() for z in logits)/2, atol=1e-5)


def test_each_of_several_teachers_is_compared_with_the_student():
    def one(names, cbs=None):
        "A Learner whose loaders name four classes"
        l = learner(sequential(6), cbs); l.dls.vocab = list(names); return l
    ok, bad = DistillCallback([one('abcd'), one('abcd')], 'kd', verbose=False), DistillCallback([one('abcd'), one('dcba')], 'kd', verbose=False)
    with quiet(l := one('abcd', ok)): l.fit(1)
    with pytest.raises(ValueError, match='in another order'), quiet(l := one('abcd', bad)): l.fit(1)


def test_nothing_to_learn_from_and_what_is_left_out():
    with pytest.raises(ValueError, match='leaves nothing to learn from'): DistillCallback(None, 'pskd', task_weight=0)
    for name in ('acamkd', 'TGeo-KD'):
        with pytest.raises(ValueError, match='left out, since neither'): get_method(name)
    assert method_needs(METHODS['meal']) == 'several teachers (one will do)'


@pytest.mark.parametrize('denoiser', ['mlp', *(pytest.param(d, marks=pytest.mark.slow) for d in ('unet', 'transformer'))])
def test_denoisers_of_other_architectures_train_a_classifier(denoiser):
    student, teacher = sequential(6), sequential(20)
    l = learner(student, DiffKDCallback(teacher, denoiser=denoiser, taps=['feature'], verbose=False), dls=dls_of((64, 64)))
    with quiet(l): l.fit(1, 1e-3)
    assert all(np.isfinite(v) for v in l.recorder.values[-1]) and list(l.recorder.metric_names[1:3]) == ['train_loss', 'valid_loss']
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student[0].parameters())
