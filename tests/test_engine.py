"A folded teacher answers as the teacher does, and the teacher stays what it was"
import threading, time
import pytest, torch
from torch import nn
from diffkd_nb import callback
from diffkd_nb.callback import DiffKDCallback, DistillCallback, distillation
from diffkd_nb.distillation import Distillation
from diffkd_nb.engine import make_engine
from diffkd_nb.taps import plan_taps
from diffkd_nb.capture import Capture
from pairs import *


def lively(model):
    "Statistics and weights of BatchNorms that folding must get right"
    g = torch.Generator().manual_seed(1)
    for m in model.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for t, low, high in ((m.running_mean, -.3, .3), (m.running_var, .5, 2), (m.weight.data, .5, 1.5), (m.bias.data, -.3, .3)):
            t.copy_(low + (high - low)*torch.rand(t.shape, generator=g))
    return model


@pytest.mark.parametrize('name', list(PAIRS))
def test_maps_are_equal_to_rounding(name):
    student, teacher, size = PAIRS[name]
    student, teacher, x = student(), lively(teacher()).eval(), torch.randn(4, 3, size, size)
    places = {t.name: t.teacher for t in plan_taps(student, teacher, x[:2])}
    engine, why = make_engine(teacher, places, [x])
    if engine is None:
        assert why == 'no BatchNorm can be folded' and not any(isinstance(m, nn.BatchNorm2d) for m in teacher.modules())
        return
    with torch.no_grad(), Capture(teacher, places) as c:
        teacher(x)
        want = c.maps()
    for n, got in engine(x).items(): assert (got - want[n]).abs().max() <= 1e-5*want[n].abs().max()


def test_in_bf16_within_the_rounding_of_a_layer_a_layer():
    "2^-8 is the rounding of one bfloat16 number; twenty layers round twenty times"
    student, teacher, size = PAIRS['resnet18<-resnet34']
    student, teacher, x = student(), lively(teacher()).eval(), torch.randn(4, 3, size, size)
    places = {t.name: t.teacher for t in plan_taps(student, teacher, x[:2])}
    engine, _ = make_engine(teacher, places, [x])
    exact = engine(x)
    with torch.autocast('cpu', torch.bfloat16): half = engine(x)
    for n, z in exact.items(): assert (half[n].float() - z).norm() <= 36*2**-8*z.norm()


def test_a_teacher_in_bf16_for_a_student_in_float32():
    "Its maps are float32 within the same bound, and are those of autocast; the student computes in float32"
    student, teacher, x = tv('resnet18'), lively(tv('resnet34')), torch.randn(4, 3, 32, 32)
    plain, half = (Distillation(student, teacher, 'diffkd', xb=x[:2], seed=0, teacher_engine=e) for e in ('plain', 'bf16'))
    with plain: exact = plain.teacher_maps(x)
    with half:
        maps = half.teacher_maps(x)
        step = (student(x), half(x))[1]
    with plain, torch.autocast('cpu', torch.bfloat16): cast = plain.teacher_maps(x)
    for n, z in exact.items():
        assert maps[n].dtype == torch.float32 and torch.equal(maps[n], cast[n].float()) and not torch.equal(maps[n], z)
        assert (maps[n] - z).norm() <= 36*2**-8*z.norm()
    assert all(m.dtype == torch.float32 for m in step.student.values()) and half.engine_note == 'bf16'


def test_a_tapped_convolution_keeps_its_own_output():
    teacher, student, x = lively(sequential(20)).eval(), sequential(6), torch.randn(4, 3, 32, 32)
    places = {t.name: t.teacher for t in plan_taps(student, teacher, x[:2], taps=[('0', '0'), ('3', '4')])}
    engine, _ = make_engine(teacher, places, [x])
    with torch.no_grad(): want = [teacher[0](x), teacher[:5](x)]
    for got, w in zip(engine(x).values(), want): torch.testing.assert_close(got, w, rtol=1e-4, atol=1e-5)


def test_a_teacher_with_hooks_answers_itself():
    teacher = sequential(20).eval()
    teacher[0].register_forward_hook(lambda *a: None)
    kd = Distillation(sequential(6), teacher, 'kd', xb=torch.randn(2, 3, 32, 32), teacher_engine='auto')
    with kd: kd.teacher_maps(torch.randn(2, 3, 32, 32))
    assert kd.engine_note == 'plain, since the teacher has hooks'


def fit(engine, steps, monkeypatch, verbose=False):
    monkeypatch.setattr(callback, 'ENGINE_STEPS', steps)
    set_seed(0)
    student, teacher = sequential(6), lively(sequential(20))
    before = snapshot(teacher)
    learn = make_learner(student, cbs=DistillCallback(teacher, 'diffkd', verbose=verbose, seed=1, teacher_engine=engine), lr=1e-3)
    with quiet(learn): learn.fit(2)
    same(before, snapshot(teacher))
    return learn


def test_only_a_long_fit_folds(monkeypatch, capsys):
    "And trains the same student, to rounding"
    plain, short, long = (fit(*a, monkeypatch, verbose=True) for a in (('plain', 1), ('auto', 7), ('auto', 6)))
    said = capsys.readouterr().out
    assert 'teacher engine: plain, 6 steps (7 or more pay)' in said and 'teacher engine: folded, 6 steps' in said
    assert [l.distill.kd.engine_note for l in (plain, short, long)] == ['plain', 'plain', 'folded'] and long.distill.kd.engine is None
    a, b, c = (l.model.state_dict() for l in (plain, short, long))
    for k in a:
        assert torch.equal(a[k], b[k])
        torch.testing.assert_close(a[k], c[k], rtol=1e-3, atol=1e-4)


def test_a_run_has_its_engine_on_record(tmp_path, monkeypatch):
    from diffkd_nb.experiment import run
    from diffkd_nb.recipes import get_recipe
    monkeypatch.setattr(callback, 'ENGINE_STEPS', 1)
    recipe = get_recipe('tiny').replace(epochs=1)
    go = lambda teacher, method, out, **kw: run(recipe, 'digits', teacher, 'small:4', method, 0, tmp_path/out, progress=False, **kw)
    go(None, 'alone', 't')
    teacher = f"small:4@{tmp_path/'t'/'student.safetensors'}"
    plain, auto = go(teacher, 'kd', 'p'), go(teacher, 'kd', 'a', teacher_engine='auto')
    assert 'teacher_engine' not in plain['settings'] and 'teacher_engine' not in plain['cost']
    assert auto['settings']['teacher_engine'] == 'auto' and auto['cost']['teacher_engine'] == 'folded'
    assert auto['result']['valid_loss'] == pytest.approx(plain['result']['valid_loss'], rel=1e-3)
    with pytest.raises(ValueError, match="teacher_engine must be 'plain', 'auto', 'compile' or 'bf16', got 'fast'"): go(teacher, 'kd', 'x', teacher_engine='fast')


@pytest.mark.parametrize('engine', ['auto', 'bf16'])
def test_diffkd_callback_takes_an_engine(engine, capsys):
    "By the one line, as by the name of the method"
    torch.manual_seed(0); student, teacher = sequential(6), sequential(20).eval()
    learn = make_learner(student, cbs=DiffKDCallback(teacher, verbose=False, teacher_engine=engine), lr=1e-3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert distillation(learn).teacher_engine == engine and all(torch.isfinite(p).all() for p in student.parameters())
    with pytest.raises(ValueError, match="teacher_engine must be 'plain', 'auto', 'compile' or 'bf16'"):
        make_learner(sequential(6), cbs=DiffKDCallback(teacher, verbose=False, teacher_engine='fast'))


def test_compiling_that_takes_too_long_or_fails_leaves_the_folded_copy(monkeypatch):
    "The time limit ends it; the maps are those of the folded copy, no hook stays"
    student, teacher, x = sequential(6), lively(sequential(20)).eval(), torch.randn(4, 3, 32, 32)
    places = {t.name: t.teacher for t in plan_taps(student, teacher, x[:2])}
    engine, _ = make_engine(teacher, places, [x])
    def slow(*a, **kw):
        def run(*xb): time.sleep(20)
        return run
    def broken(*a, **kw): raise RuntimeError('no compiler')
    want = engine(x)
    for how, says in ((slow, 'compiling took more than 0.2 s'), (broken, 'it cannot be compiled (RuntimeError)')):
        with monkeypatch.context() as m:
            m.setattr(torch, 'compile', how)
            start = time.perf_counter(); assert engine.compile([x], seconds=.2) == says and time.perf_counter() - start < 10
        assert engine.compiled is None and not any(m._forward_hooks for m in engine.modules())
        for n, got in engine(x).items(): assert torch.equal(got, want[n])
    seen = []
    threading.Thread(target=lambda: seen.append(engine.compile([x]))).start()
    while not seen: time.sleep(.01)
    assert seen == ['compiling has no time limit here']


def test_only_a_longer_fit_compiles(monkeypatch, capsys):
    "And says so; here the compiler gives back the model"
    asked = []
    monkeypatch.setattr(torch, 'compile', lambda m, **kw: asked.append(m) or m)
    said = {}
    for steps in (7, 6):
        monkeypatch.setattr(callback, 'COMPILE_STEPS', steps)
        learn = fit('compile', 1, monkeypatch, verbose=True)
        said[steps] = learn.distill.kd.engine_note, len(asked)
    out = capsys.readouterr().out
    assert said == {7: ('folded', 0), 6: ('folded and compiled', 1)}
    assert 'teacher engine: folded, 6 steps (1 or more pay, 7 for compiling)' in out and 'teacher engine: compiled, 6 steps' in out


@pytest.mark.slow
@pytest.mark.parametrize('half', [False, True])
def test_a_compiled_teacher_gives_the_same_maps(half):
    "At every tap, also inside the network; other shapes go to the folded copy, and the compiler is asked once"
    torch._dynamo.reset()
    student, teacher, x = tv('resnet18'), lively(tv('resnet34')), torch.randn(4, 3, 32, 32)
    kd = Distillation(student, teacher, 'diffkd', xb=x[:2], taps=['stages', 'logits'], seed=0, teacher_engine='compile')
    plain = Distillation(student, teacher, 'diffkd', xb=x[:2], taps=['stages', 'logits'], seed=0)
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        with plain: want = [plain.teacher_maps(b) for b in (x, x.flip(0), x[:3])]
        with kd:
            got = [kd.teacher_maps(b) for b in (x, x.flip(0), x[:3])]
            assert kd.engine_note == 'folded and compiled' and kd.engine.compiled is not None
            assert torch._dynamo.utils.counters['frames']['ok'] >= 1
            compiled = dict(torch._dynamo.utils.counters['frames'])
            kd.teacher_maps(x[:2]); kd.teacher_maps(x)
            assert dict(torch._dynamo.utils.counters['frames']) == compiled
    for w, g in zip(want, got):
        assert list(w) == list(g) == ['stage1', 'stage2', 'stage3', 'stage4', 'logits'][-len(w):]
        for n in w: assert (g[n].float() - w[n].float()).norm() <= (36*2**-8 if half else 1e-4)*w[n].float().norm(), n
    assert not any(m._forward_hooks for m in teacher.modules())


@pytest.mark.parametrize('works', [True, False])
def test_a_teacher_without_batchnorm_can_be_compiled(works, monkeypatch):
    "Also one whose input is a dict; where it cannot be, the teacher answers itself"
    class Words(nn.Module):
        def __init__(self, width): super().__init__(); self.table, self.head = nn.Embedding(9, width), nn.Linear(width, 3)
        def forward(self, x): return self.head(self.table(x['ids']).mean(1))
    def compiled(m, **kw):
        if not works: raise RuntimeError('no compiler')
        return m
    monkeypatch.setattr(torch, 'compile', compiled)
    x = dict(ids=torch.randint(9, (4, 5)))
    kd = {e: Distillation(Words(4), Words(8), 'kd', xb=(x,), teacher_engine=e) for e in ('auto', 'compile')}
    for e, d in kd.items():
        with d: maps = d.teacher_maps((x,))
        torch.testing.assert_close(maps['logits'].flatten(1), d.teacher(x))
    assert kd['auto'].engine_note == 'plain, since no BatchNorm can be folded'
    assert kd['compile'].engine_note == ('compiled' if works else 'plain, since it cannot be compiled (RuntimeError)')
