"One clear error for each mistake: what was given, what was expected, what to do; and nothing left behind"
import re
import pytest
from pairs import *
from diffkd_nb.callback import DiffKDCallback, DistillCallback
from diffkd_nb.diffkd import DiffKD
from diffkd_nb.methods import KD


class Dictionary(nn.Module):
    "A teacher whose body gives a dict"
    class Body(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 4, 3)
        def forward(self, x): return {'map': self.conv(x)}
    def __init__(self): super().__init__(); self.body,self.fc,self.flat,self.unused = self.Body(),nn.Linear(4, K),nn.Flatten(0),nn.Linear(4, 4)
    def forward(self, x):
        self.flat(x)
        return self.fc(self.body(x)['map'].mean((2, 3)))


def with_nan():
    m = sequential(8); nn.init.constant_(m[-1].bias, float('nan')); return m

def wide_head(n):
    m = sequential(8); m[-1] = nn.Linear(16, n); return m

def sharing():
    m = sequential(6); m[-1] = STUDENT[-1]; return m

STUDENT = sequential(6)
ok = lambda **kw: (lambda: DiffKDCallback(sequential(8), verbose=False, **kw))
# what is wrong: a function that makes the callback for STUDENT, the error's type, what its message must say
TABLE = {
    'teacher is a string': (lambda: DiffKDCallback('resnet34'), TypeError, ['teacher must be an nn.Module or a fastai Learner', 'str', 'resnet34']),
    'teacher is a class': (lambda: DiffKDCallback(nn.Linear), TypeError, ['teacher must be', 'type']),
    'teacher is a state dict': (lambda: DiffKDCallback(sequential(8).state_dict()), TypeError, ['teacher must be', 'OrderedDict']),
    'teacher is the student': (lambda: DiffKDCallback(STUDENT), ValueError, ['same object', 'deepcopy']),
    'teacher shares parameters': (lambda: DiffKDCallback(sharing()), ValueError, ['share 2 parameters', '8.weight', 'copy of the teacher']),
    'class counts differ': (lambda: DiffKDCallback(wide_head(7)), ValueError, ['student has 10 classes', 'teacher 7', "taps=['feature']"]),
    'teacher wants another input': (lambda: DiffKDCallback(vit(64)), ValueError, ['the teacher (VisionTransformer) fails', '(2, 3, 32, 32)', 'same input']),
    'teacher is not finite': (lambda: DiffKDCallback(with_nan()), ValueError, ["teacher's output", 'not finite', 'weights']),
    'no such student tap': (ok(taps=[('55', '5')]), ValueError, ["student (Sequential) has no module named '55'", "'5'"]),
    'no such teacher tap': (lambda: DiffKDCallback(tv('resnet18'), taps=[('5', 'layer_4')]), ValueError, ['teacher (ResNet)', "'layer4'"]),
    'tap gives no tensor': (lambda: DiffKDCallback(Dictionary(), taps=[('5', 'body')]), ValueError, ["'body'", 'dict, not a tensor']),
    'tap is no map': (lambda: DiffKDCallback(Dictionary(), taps=[('5', 'flat')]), ValueError, ["'flat' of the teacher", '(6144,)', 'Tap another module']),
    'tap does not run': (lambda: DiffKDCallback(Dictionary(), taps=[('5', 'unused')]), ValueError, ["'unused' of the teacher did not run"]),
    'taps is empty': (ok(taps=[]), ValueError, ['taps is empty', "['feature', 'logits']"]),
    'taps is a string': (ok(taps='logits'), ValueError, ['taps must be a list', "'logits'"]),
    'tap of unknown form': (ok(taps=[7]), ValueError, ['a tap is', '7']),
    'tap of unknown kind': (ok(taps=[('5', '5', 'map')]), ValueError, ["'feature' or 'logits'", "'map'"]),
    'tap listed twice': (ok(taps=['logits', 'logits']), ValueError, ['listed twice']),
    'map tapped as logits': (ok(taps=[('5', '5', 'logits')]), ValueError, ['student has 12 classes', 'teacher 16']),
    'no steps': (ok(steps=0), ValueError, ['steps must be an integer from 1 to 500', '0']),
    'too many steps': (ok(steps=501), ValueError, ['steps must be', '501']),
    'steps is no integer': (ok(steps=2.5), ValueError, ['steps must be', '2.5']),
    'unknown start': (ok(start='end'), ValueError, ['start must be', "'paper'", "'end'"]),
    'latent of zero': (ok(latent=0), ValueError, ['latent must be', '0']),
    'unknown distance': (ok(feature_loss='l1'), ValueError, ["unknown distance 'l1'", "'mse'", "'dist'"]),
    'unknown logits distance': (ok(logits_loss='ce'), ValueError, ["unknown distance 'ce'"]),
    'unknown distance of a tap': (ok(distances={'logits': 'l9'}), ValueError, ["unknown distance 'l9'"]),
    'distance for no tap': (ok(distances={'layer4': 'mse'}), ValueError, ["['layer4']", "['feature', 'logits']"]),
    'weight for no tap': (ok(weights={'fc': 1.}), ValueError, ["['fc']", 'the taps are']),
    'negative weight': (ok(kd_weight=-1), ValueError, ["weight of 'kd'", '-1']),
    'weight is nan': (ok(diffusion_weight=float('nan')), ValueError, ["weight of 'diffusion'", 'nan']),
    'temperature of zero': (ok(temperature=0), ValueError, ['temperature must be a positive number']),
    'unknown alignment': (ok(align='both'), ValueError, ['align must be one of', "'smaller'", "'both'"]),
    'unknown denoiser': (ok(denoiser='vae'), ValueError, ['denoiser must be one of', "'identity'"]),
    'unknown option': (ok(stepz=3), TypeError, ["no option 'stepz'", 'steps']),
    'KD on feature taps': (lambda: DistillCallback(sequential(8), KD, taps=['feature']), ValueError, ['feature taps', "taps=['logits']"]),
    'distiller is a number': (lambda: DistillCallback(sequential(8), 3), TypeError, ['distiller must be', 'int']),
    'unknown method': (lambda: DistillCallback(sequential(8), 'dkdd'), ValueError, ['dkdd', "'dkd'"]),
    'unknown option of a method': (lambda: DistillCallback(sequential(8), 'dkd', gamma=2), TypeError, ["'gamma'", 'alpha', 'beta']),
    'options without a name': (lambda: DistillCallback(sequential(8), lambda plan: None, beta=2), TypeError, ["'beta'", 'name']),
}


@pytest.mark.parametrize('case', TABLE)
def test_mistake_is_told_when_the_learner_is_made(case):
    make, kind, says = TABLE[case]
    before = snapshot(STUDENT)
    with pytest.raises(kind) as e:
        cb = make()
        cb.inputs = torch.zeros(2, 3, 32, 32)
        make_learner(STUDENT, cbs=cb)
    for s in says: assert s in str(e.value), f'{s!r} not in {e.value}'
    assert len(str(e.value)) < 700 and re.search(r' \[help: [a-z-]+\]$', str(e.value))
    same(before, snapshot(STUDENT)); assert n_hooks(STUDENT) == 0


def test_training_set_without_a_batch():
    cb = DiffKDCallback(sequential(8))
    learn = make_learner(sequential(6), cbs=cb, dls=tensor_dls(n=4, bs=8))
    with quiet(learn), pytest.raises(ValueError, match='gives no batch: 4 items with batch size 8'): learn.fit(1)


def test_batch_of_one_sample():
    learn = make_learner(sequential(6), cbs=DiffKDCallback(sequential(8), verbose=False), dls=tensor_dls(n=4, bs=1))
    with quiet(learn), pytest.raises(ValueError, match='at least 2 samples.*got a batch of 1.*drop_last'): learn.fit(1)
    assert n_hooks(learn.model) == 0 and len(learn.opt.all_params()) == len(list(learn.model.parameters()))
    DiffKD(4, 4).eval()(torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3))   # outside training one sample is fine


def test_teacher_that_overflows_during_training():
    teacher = sequential(8)
    learn = make_learner(sequential(6), cbs=DiffKDCallback(teacher, verbose=False, inputs=torch.zeros(2, 3, 32, 32)))
    teacher[0].weight.data.fill_(float('inf'))
    with quiet(learn), pytest.raises(ValueError, match='teacher gave a value that is not finite'): learn.fit(1)
    assert n_hooks(learn.model) == n_hooks(teacher) == 0


def test_non_native_mixed_precision():
    learn = make_learner(sequential(6), cbs=DiffKDCallback(sequential(8), verbose=False))
    learn.non_native_mixed_precision = object()
    with quiet(learn), pytest.raises(ValueError, match='to_fp16'): learn.fit(1)
