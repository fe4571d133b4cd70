"Segmentation by the one line: models of three families, odd sizes, void batches, wrong input; DiffKD and its rivals on class maps"
import pytest
from pairs import *
from PIL import Image
from diffkd_nb.callback import DiffKDCallback, DistillCallback, distillation
from diffkd_nb.distillation import Distillation
from diffkd_nb.distiller import toy_tap
from diffkd_nb.losses import PixelCrossEntropy, dist_loss, kl_loss
from diffkd_nb.methods import get_method
from diffkd_nb.rng import Draws
from diffkd_nb.taps import plan_taps

K, VOID = 5, 255
METHODS = ['diffkd', 'kd', 'dist', 'cwd', 'cirkd', 'maskd', 'fitnet']
SMALL = dict(cirkd=dict(pixel_memory=64, region_memory=16, sample=(64, 32)))
CE = CrossEntropyLossFlat(axis=1, ignore_index=VOID)
smp = lambda name, **kw: getattr(pytest.importorskip('segmentation_models_pytorch'), name)(encoder_weights=None, classes=K, **kw)
tv = lambda name, **kw: torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=K, **kw)
def body(c): return nn.Sequential(*[nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()) for i,o in ((3, c), (c, 2*c), (2*c, 4*c))])
def unet(c, size): return DynamicUnet(body(c), K, size, last_cross=False)


class Dict(nn.Module):
    "Gives scores and those of an auxiliary head, as torchvision's models do"
    def __init__(self, c): super().__init__(); self.body,self.head,self.aux = body(c),nn.Conv2d(4*c, K, 1),nn.Conv2d(4*c, K, 1)
    def forward(self, x):
        f = self.body(x)
        large = lambda m: F.interpolate(m, x.shape[2:], mode='bilinear')
        return dict(out=large(self.head(f)), aux=large(self.aux(f)))


class Other(nn.Module):
    "Enlarges its scores of k classes by a module of its own"
    def __init__(self, k): super().__init__(); self.net = nn.Sequential(body(4), nn.Conv2d(16, k, 1), nn.Upsample(scale_factor=8, mode='bilinear'))
    def forward(self, x): return self.net(x)


class Out(nn.Module):
    "torchvision's answer alone"
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(x)['out']


# student, teacher, (height, width), where the class map must be found: student, teacher
MODELS = {
    'unet': (lambda s: unet(4, s), lambda s: unet(8, s), (24, 40), ('', '')),
    'unet, odd': (lambda s: unet(4, s), lambda s: unet(8, s), (25, 39), ('', '')),
    'smp fpn': (lambda s: smp('FPN', encoder_name='tu-mobilenetv3_small_050', decoder_pyramid_channels=16, decoder_segmentation_channels=32),
                lambda s: smp('FPN', encoder_name='tu-mobilenetv3_small_075', decoder_pyramid_channels=32, decoder_segmentation_channels=32), (32, 64),
                ('segmentation_head.0', 'segmentation_head.0')),
    'torchvision lraspp': (lambda s: Out(tv('lraspp_mobilenet_v3_large')), lambda s: Dict(8), (33, 47), ('model.classifier', 'head')),
    'dict of unet': (lambda s: Dict(4), lambda s: unet(8, s), (24, 40), ('head', '')),
}
MANY = {
    'unet_learner, resnet18': (lambda s: create_unet_model(resnet18, K, s, pretrained=False), lambda s: create_unet_model(resnet34, K, s, pretrained=False), (32, 48), ('', '')),
    'smp deeplabv3': (lambda s: smp('DeepLabV3', encoder_name='resnet18', encoder_output_stride=8), lambda s: smp('DeepLabV3', encoder_name='resnet34', encoder_output_stride=8),
                      (40, 56), ('segmentation_head.0', 'segmentation_head.0')),
    'smp pspnet': (lambda s: smp('PSPNet', encoder_name='resnet18'), lambda s: smp('PSPNet', encoder_name='resnet34'), (48, 64), ('segmentation_head.0', 'segmentation_head.0')),
    'smp unet from deeplab': (lambda s: smp('Unet', encoder_name='resnet18'), lambda s: smp('DeepLabV3', encoder_name='resnet18', encoder_output_stride=8), (32, 64), ('', 'segmentation_head.0')),
    'torchvision deeplabv3, aux': (lambda s: tv('deeplabv3_mobilenet_v3_large', aux_loss=True), lambda s: tv('deeplabv3_resnet50', aux_loss=True), (48, 65), ('classifier', 'classifier')),
    'torchvision fcn': (lambda s: Out(tv('fcn_resnet50')), lambda s: Out(tv('fcn_resnet50')), (40, 56), ('model.classifier', 'model.classifier')),
}


def masks_dls(size, n=8, bs=4, seed=0, void=.1):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, *size, generator=g), torch.randint(0, K, (n, *size), generator=g)
    y[torch.rand(y.shape, generator=g) < void] = VOID
    data = Pairs(zip(x, y))
    return DataLoaders.from_dsets(data, Pairs(data[:4]), bs=bs, device='cpu', num_workers=0)


def learner(student, cb, size=(24, 40), loss=CE, **kw): return Learner(masks_dls(size, **kw), student, loss_func=loss, cbs=cb)


def fit(learn, n=1, lr=1e-3):
    with quiet(learn): learn.fit(n, lr)
    return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))


def check_one_line(models, method):
    make, make_teacher, size, places = models
    set_seed(0); student, teacher = make(size), make_teacher(size)
    seen, keys, hooks = snapshot(teacher), list(student.state_dict()), [n_hooks(student), n_hooks(teacher)]    # DynamicUnet has its own
    calls = CountCalls(teacher)
    cb = DiffKDCallback(teacher, verbose=False) if method == 'diffkd' else DistillCallback(teacher, method, verbose=False, **SMALL.get(method, {}))
    learn = learner(student, cb, size, loss=PixelCrossEntropy() if isinstance(student(torch.randn(2, 3, *size)), dict) else CE)
    plan = calls.n; hooks[1] += 1                                                                              # that of the counter
    values = fit(learn)
    assert all(np.isfinite(v) for v in values.values())
    n = calls.n; learn.validate(); learn.get_preds()
    assert calls.n == n and n - plan <= len(learn.dls.train) + 2      # the plan's two dry runs
    same(seen, snapshot(teacher))
    assert list(student.state_dict()) == keys and [n_hooks(student), n_hooks(teacher)] == hooks
    found = [(t.form, t.student.name, t.teacher.name) for t in cb.plan]
    if method in ('diffkd', 'kd', 'dist', 'cwd', 'maskd'): assert found == [('dense', *places)]
    return learn


@pytest.mark.parametrize('models', [m if i < 2 else pytest.param(m, marks=pytest.mark.slow) for i,m in enumerate(MODELS)])
def test_diffkd_on_models_of_three_families(models): check_one_line(MODELS[models], 'diffkd')


@pytest.mark.parametrize('method', METHODS[1:])
def test_rivals(method): check_one_line(MODELS['dict of unet'], method)


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('models', {**MODELS, **MANY})
def test_every_method_on_every_model(models, method): check_one_line({**MODELS, **MANY}[models], method)


def test_the_teacher_runs_once_a_batch():
    set_seed(0); cb = DiffKDCallback(unet(8, (24, 40)), verbose=False, inputs=torch.randn(2, 3, 24, 40)); calls = CountCalls(cb.teacher)
    learn = learner(unet(4, (24, 40)), cb); calls.n = 0
    fit(learn, 2); assert calls.n == 2*len(learn.dls.train)


# ---- taps

def test_what_is_asked_for():
    size = (24, 40); s, t, x = Dict(4), unet(8, size), torch.randn(2, 3, *size)
    ask = lambda taps: [(p.kind, p.student.name, p.student.shape) for p in plan_taps(s, t, x, taps=taps)]
    assert ask(['logits']) == [('logits', 'head', (K, 3, 5))]
    assert ask(['feature', 'logits']) == [('feature', 'body', (16, 3, 5)), ('logits', 'head', (K, 3, 5))]
    assert ask([('', ''), ('aux', '', 'logits'), ('body.1', 'layers.0')]) == [('logits', '', (K, *size)), ('logits', 'aux', (K, 3, 5)), ('feature', 'body.1', (8, 6, 10))]
    aux, = plan_taps(s, Dict(8), x, taps=['logits'], output_key='aux')
    assert (aux.student.name, aux.teacher.name, aux.form) == ('aux', 'aux', 'dense')
    feature = DiffKDCallback(t, taps=['feature'], latent=8, verbose=False)
    fit(learner(unet(4, size), feature)); assert [p.kind for p in feature.plan] == ['feature']
    joined = DistillCallback(Dict(8), 'kd+fitnet+cwd', verbose=False); fit(learner(Dict(4), joined, loss=PixelCrossEntropy()))
    assert {n: [p for p in m.names] for n,m in joined.distiller.methods.items()} == dict(kd=['logits'], fitnet=['feature'], cwd=['logits'])


def test_a_user_of_plain_pytorch():
    s, t, x = Dict(4), Dict(8), torch.randn(4, 3, 24, 40)
    kd = Distillation(s, t, 'diffkd', xb=x, seed=0)
    with kd: s(x); step = kd(x)
    assert [(p.form, p.student.name) for p in kd.plan] == [('dense', 'head')] and step.student['logits'].shape == (4, K, 3, 5)
    step.total.backward(); assert s.head.weight.grad.abs().max() > 0 and s.aux.weight.grad is None


@pytest.mark.parametrize('swap', [False, True])
def test_maps_of_different_size_meet_at_the_smaller_one(swap):
    size, pair = (24, 40), [unet(4, (24, 40)), Dict(8)]
    student, teacher = pair[::-1] if swap else pair
    seen = []
    cb = DiffKDCallback(teacher, verbose=False); learn = learner(student, cb, loss=PixelCrossEntropy()); fit(learn)
    cb.distiller.taps[0].register_forward_hook(lambda m, i, o: seen.append(tuple(o.denoised.shape[1:])))
    fit(learn); assert set(seen) == {(K, 3, 5)}
    for method in ('kd', 'dist', 'cwd'): assert fit(learner(student, DistillCallback(teacher, method, verbose=False), loss=PixelCrossEntropy()))[method] > 0


# ---- numbers

def test_dist_as_in_table_6():
    "Relations over the classes at each position, and over all positions for each class, from NumPy's correlation"
    s, t = (torch.randn(2, K, 3, 4) for _ in 'st')
    p, q = (x.softmax(1).permute(0, 2, 3, 1).reshape(-1, K).numpy() for x in (s, t))
    off = lambda a, b: 1 - np.mean([np.corrcoef(u, v)[0, 1] for u,v in zip(a, b)])
    assert dist_loss(s, t).item() == pytest.approx(off(p, q) + off(p.T, q.T), rel=1e-4)
    torch.manual_seed(0); d = get_method('diffkd')([toy_tap((K, 3, 4), (K, 3, 4), 'logits')], denoiser='identity', adapter=False)
    out = d.taps[0].eval()(s, t)
    assert d({'logits': s}, {'logits': t})['kd'].item() == pytest.approx(dist_loss(out.denoised, t).item(), rel=1e-5)


@pytest.mark.parametrize('loss,f', [('kl', kl_loss), ('dist', dist_loss), ('cwd', None), (None, dist_loss)])
@pytest.mark.parametrize('form', ['bottleneck', 'pointwise'])
def test_distances_and_forms_of_a_class_map(loss, f, form):
    from diffkd_nb.losses import cwd_loss
    torch.manual_seed(0)
    d = get_method('diffkd')([toy_tap((K, 6, 8), (K, 6, 8), 'logits')], dense_loss=loss, dense_form=form)
    s, t = torch.randn(2, K, 6, 8, requires_grad=True), torch.randn(2, K, 6, 8)
    out = d.taps[0](s, t, draws=Draws(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(out.kd_loss, (f or cwd_loss)(out.denoised, t))
    (out.kd_loss + out.diffusion_loss).backward()
    assert s.grad.abs().max() > 0 and all(p.grad is not None for p in d.parameters())
    assert out.gamma.shape == (2,) and out.reconstruction_loss == 0


def test_training_brings_the_maps_nearer():
    torch.manual_seed(0); size = (6, 8)
    d, t = get_method('diffkd')([toy_tap((K, *size), (K, *size), 'logits')]), torch.randn(4, K, *size)*2
    s = torch.randn(4, K, *size, requires_grad=True); opt = torch.optim.Adam([s, *d.parameters()], .02); values = []
    for i in range(40):
        out = d({'logits': s}, {'logits': t}, draws=Draws(torch.Generator().manual_seed(i)))
        opt.zero_grad(); sum(out.values()).backward(); opt.step(); values.append([v.item() for v in out.values()])
    assert values[-1][0] < .5*values[0][0] and values[-1][1] < values[0][1]


def test_the_whole_batch_is_drawn_by_every_process():
    tap = toy_tap((K, 3, 4), (K, 3, 4), 'logits'); d = get_method('diffkd')([tap]).eval()
    s, t = torch.randn(4, K, 3, 4), torch.randn(4, K, 3, 4)
    part = lambda i, n: d({'logits': s.chunk(n)[i]}, {'logits': t.chunk(n)[i]}, draws=Draws(torch.Generator().manual_seed(1), (i, n)))
    one, halves = part(0, 1), [part(i, 2) for i in range(2)]
    assert one['diffusion'].item() == pytest.approx(sum(h['diffusion'].item() for h in halves)/2, rel=1e-4)


# ---- void

class Void(Callback):
    "Makes every pixel of the training batches void"
    order = -20
    def before_batch(self):
        if self.training: self.learn.yb = (torch.full_like(self.yb[0], VOID),)


LOSSES = dict(fastai=CE, torch=nn.CrossEntropyLoss(ignore_index=VOID), function=partial(F.cross_entropy, ignore_index=VOID), ours=PixelCrossEntropy())
@pytest.mark.parametrize('method,loss', [*(('diffkd', o) for o in LOSSES), ('kd', 'fastai'), ('cirkd', 'fastai'), ('maskd', 'fastai')])
def test_a_batch_of_void_pixels_counts_0(method, loss):
    set_seed(0); student, loss = Other(K), LOSSES[loss]; before = deepcopy(student.state_dict())
    learn = learner(student, [DistillCallback(Other(K), method, verbose=False, **SMALL.get(method, {})), Void()], loss=loss)
    values = fit(learn)
    assert values['task'] == 0 and all(np.isfinite(v) for v in values.values())
    assert all(torch.isfinite(p).all() for p in student.parameters()) and any(not torch.equal(before[k], v) for k,v in student.state_dict().items())


def test_void_pixels_teach_nothing_of_the_task():
    "Without distillation a void batch leaves the weights alone; with it void pixels count like all others"
    set_seed(0); student = Other(K); before = [p.clone() for p in student.parameters()]
    off = dict(kd_weight=0, diffusion_weight=0)
    learn = Learner(masks_dls((24, 40)), student, loss_func=CE, opt_func=partial(SGD, mom=0.), wd=0., cbs=[DiffKDCallback(Other(K), verbose=False, **off), Void()])
    fit(learn, lr=1.); assert all(torch.equal(a, b) for a,b in zip(before, student.parameters()))
    d, s, t = get_method('kd')([toy_tap((K, 3, 4), (K, 3, 4), 'logits')]), torch.randn(2, K, 3, 4), torch.randn(2, K, 3, 4)
    assert d({'logits': s}, {'logits': t}, torch.full((2, 12, 16), VOID))['kd'] == d({'logits': s}, {'logits': t})['kd']


# ---- wrong input

def test_one_error():
    def says(match, student, teacher, loss=CE, **kw):
        with pytest.raises(ValueError, match=match): fit(learner(student, DiffKDCallback(teacher, verbose=False, **kw), loss=loss))
        assert n_hooks(student) == n_hooks(teacher) == 0
    says('the student has 5 classes and the teacher 7', Other(5), Other(7))
    says('classes on axis 1, and the loss reads axis -1', Other(5), Other(5), CrossEntropyLossFlat())
    says("no tensor called 'top'", Dict(4), Dict(8), PixelCrossEntropy(), output_key='top')
    says('24 x 40 positions and the teacher of 1 x 1', Other(5), nn.Sequential(body(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), taps=[('', '', 'logits')])
    says('dense_form must be', Other(5), Other(5), dense_form='unet'); says('unknown distance', Other(5), Other(5), dense_loss='iou')
    cb = DiffKDCallback(Other(7), verbose=False, classes=[4, 3, 2, 6, None]); fit(learner(Other(5), cb)); assert cb.plan[0].teacher.outputs == (4, 3, 2, 6)


@pytest.mark.parametrize('method', ['cirkd', 'maskd'])
def test_labels_that_are_none(method):
    tap = [toy_tap((4, 3, 4), (4, 3, 4)), toy_tap((K, 3, 4), (K, 3, 4), 'logits')]
    d = get_method(method)(tap[1:] if method == 'maskd' else tap, **SMALL.get(method, {}))
    maps = {'feature': torch.randn(2, 4, 3, 4), 'logits': torch.randn(2, K, 3, 4)}
    for y in (None, torch.rand(2, K), torch.zeros(3, 6, 8, dtype=torch.long)):
        with pytest.raises(ValueError, match='per pixel'): d(maps, maps, y)
    a, b = (d(maps, maps, y, Draws(torch.Generator().manual_seed(0))) for y in (torch.ones(2, 6, 8, dtype=torch.uint8), torch.ones(2, 1, 6, 8, dtype=torch.long)))
    assert a.keys() == b.keys()


# ---- a fastai user

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Pictures of a bright square on noise, and their masks"
    d = tmp_path_factory.mktemp('squares')
    for k in ('images', 'labels'): (d/k).mkdir()
    r = np.random.default_rng(0)
    for i in range(8):
        x, y = r.integers(0, 90, (36, 52, 3), dtype=np.uint8), np.zeros((36, 52), np.uint8)
        a, b = r.integers(0, 16, 2); x[a:a+16, b:b+20] += 120; y[a:a+16, b:b+20] = 1; y[:2] = VOID
        Image.fromarray(x).save(d/'images'/f'{i}.png'); Image.fromarray(y).save(d/'labels'/f'{i}.png')
    return d


def test_unet_learner_from_a_folder_of_pictures(folder, tmp_path, monkeypatch):
    import matplotlib; matplotlib.use('Agg')
    set_seed(0)
    dls = SegmentationDataLoaders.from_label_func(folder, get_image_files(folder/'images'), lambda o: folder/'labels'/o.name, codes=['ground', 'square'], bs=4, valid_pct=.5, seed=1, num_workers=0,
                                                  batch_tfms=[*aug_transforms(size=(32, 48), max_rotate=0, max_zoom=1, max_warp=0), Normalize.from_stats(*imagenet_stats)], device='cpu')
    small = lambda c: (lambda pretrained=False, **kw: nn.Sequential(*body(c), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    arch = lambda c: dict(arch=small(c), pretrained=False, cut=3, loss_func=CE, n_out=2, self_attention=False)
    teacher = unet_learner(dls, **arch(8)); fit(teacher)
    learn = unet_learner(dls, **arch(4), cbs=DiffKDCallback(teacher, verbose=False)); fit(learn)
    assert [t.form for t in learn.diff_kd.plan] == ['dense'] and learn.diff_kd.plan[0].student.shape == (2, 32, 48)
    learn.show_results(max_n=2)
    mask, *_ = learn.predict(get_image_files(folder/'images')[0])
    assert mask.shape == (32, 48) and set(mask.unique().tolist()) <= {0, 1}
    preds, _ = learn.get_preds(); assert preds.shape == (4, 2, 32, 48)
    own = learn.validate()[0]; z, y = learn.get_preds(act=noop); assert own == pytest.approx(F.cross_entropy(z, y.long().as_subclass(Tensor), ignore_index=VOID).item(), rel=1e-3)


def test_export_and_dicts(tmp_path):
    "A model of several outputs, the package's loss: predictions, results, an export that holds no teacher"
    set_seed(0); learn = learner(Dict(4), DiffKDCallback(Dict(8), verbose=False), loss=PixelCrossEntropy()); fit(learn)
    preds, y, decoded = learn.get_preds(with_decoded=True)
    assert preds.shape == (4, K, 24, 40) and torch.allclose(preds.sum(1), torch.ones(4, 24, 40)) and torch.equal(decoded, preds.argmax(1))
    learn.export(tmp_path/'m.pkl'); again = load_learner(tmp_path/'m.pkl')
    x = torch.randn(1, 3, 24, 40); learn.model.eval(); assert torch.equal(again.model.eval()(x)['out'], learn.model(x)['out'])
    assert (tmp_path/'m.pkl').stat().st_size < 4*sum(p.numel() for p in learn.model.parameters()) + 60_000
    assert not any('denoiser' in k or 'teacher' in k for k in learn.model.state_dict())


def test_the_step_waits_for_nothing():
    "No value is read on the host inside a step of the rivals; the memory too works without"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Seen(TorchDispatchMode):
        def __init__(self): super().__init__(); self.names = set()
        def __torch_dispatch__(self, func, types, args=(), kwargs=None): self.names.add(str(func)); return func(*args, **kwargs or {})
    maps = {'feature': torch.randn(2, 4, 3, 4, requires_grad=True), 'logits': torch.randn(2, K, 3, 4, requires_grad=True)}
    taps = [toy_tap((4, 3, 4), (4, 3, 4)), toy_tap((K, 3, 4), (K, 3, 4), 'logits')]
    for name in ('diffkd', 'cwd', 'cirkd', 'maskd'):
        d = get_method(name)(taps if name == 'cirkd' else taps[1:], **SMALL.get(name, {}))
        with Seen() as seen: sum(d(maps, maps, torch.randint(0, K, (2, 6, 8))).values()).backward()
        assert not [n for n in seen.names if any(w in n for w in ('_local_scalar_dense', 'nonzero', 'aten.equal', 'masked_select'))], name


@pytest.mark.parametrize('denoiser', ['mlp', pytest.param('unet', marks=pytest.mark.slow)])
def test_denoisers_of_other_architectures_on_class_maps(denoiser):
    set_seed(0); row = fit(learner(Dict(4), DiffKDCallback(Dict(8), denoiser=denoiser, verbose=False), size=(64, 96), loss=PixelCrossEntropy()))
    assert all(np.isfinite(v) for k,v in row.items() if k in ('train_loss', 'kd', 'diffusion'))
