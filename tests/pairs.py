"Students, teachers and small data that the tests share"
import numpy as np, pytest, timm, torch, torchvision
from fastai.vision.all import *

for _name in [n for n in globals() if n.startswith('test')]: del globals()[_name] # fastcore's test_eq and the like are no tests of ours
K = 10
def sequential(c):
    return nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 2*c, 3, 2, 1), nn.BatchNorm2d(2*c), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2*c, K))
tv = lambda name: torchvision.models.get_model(name, num_classes=K)
tm = lambda name, **kw: timm.create_model(name, num_classes=K, **kw)
vit = lambda size: tm('deit_tiny_patch16_224', img_size=size, depth=2)
swin = lambda size: tm('swin_tiny_patch4_window7_224', img_size=size, window_size=4, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))

# name: student, teacher, image size; the number of channels and the size of the maps differ in most
PAIRS = {
    'resnet18<-resnet34': (lambda: tv('resnet18'), lambda: tv('resnet34'), 32),
    'mobilenet_v2<-timm_resnet26': (lambda: tv('mobilenet_v2'), lambda: tm('resnet26'), 64),
    'resnet10t<-deit': (lambda: tm('resnet10t'), lambda: vit(64), 64),
    'sequential<-swin': (lambda: sequential(6), lambda: swin(64), 64),
    'vit<-resnet18': (lambda: vit(32), lambda: tv('resnet18'), 32),
    'sequential<-sequential': (lambda: sequential(6), lambda: sequential(20), 32),
}
LIGHT = 'sequential<-sequential'
KINDS = 'kd', 'diffkd', 'crd', 'reviewkd', 'taid', 'meal', 'dskd', 'srrl'     # one method of each kind; the others are for the slow tests
def kinds(methods): return [m if m in KINDS else pytest.param(m, marks=pytest.mark.slow) for m in methods]


class Pairs(list):
    "A list of (image, label) that a Learner can export"
    def new_empty(self): return Pairs()


def tensor_dls(size=32, n=24, bs=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, size, size, generator=g), torch.randint(0, K, (n,), generator=g)
    data = Pairs(zip(x, y))
    return DataLoaders.from_dsets(data, Pairs(data[:8]), bs=bs, device='cpu', num_workers=0)


def make_learner(student, size=32, cbs=None, **kw):
    return Learner(kw.pop('dls', None) or tensor_dls(size), student, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, **kw)


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging(): yield learn


def snapshot(model):
    "All that must not change: tensors, modes, flags, hooks, attributes of the class"
    return ({k: v.clone() for k,v in model.state_dict().items()}, {n: m.training for n,m in model.named_modules()},
            {n: (p.requires_grad, p.grad is None) for n,p in model.named_parameters()}, type(model), set(model.__dict__))


def same(a, b):
    assert list(a[0]) == list(b[0]) and all(torch.equal(a[0][k], b[0][k]) for k in a[0]), 'weights or statistics changed'
    assert a[1:] == b[1:], 'modes, flags, class or attributes changed'


def n_hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


class CountCalls:
    "Counts the forward passes of a model while it is in use"
    def __init__(self, model): self.n,self.handle = 0,model.register_forward_hook(self._hook)
    def _hook(self, *a): self.n += 1
