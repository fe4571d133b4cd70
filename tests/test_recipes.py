"The recipes against the paper's table 1, and what a Learner makes of them"
import json, math, pickle, zipfile
from copy import deepcopy
import pytest, torch
from torch import nn
from fastai.vision.all import Callback, DataLoaders, Learner, load_learner
from diffkd_nb.files import InputError
from diffkd_nb.published import all_published, published
from diffkd_nb.recipes import MixOrCut, RECIPES, Constant, Cosine, Every, OneCycle, Recipe, Steps, get_recipe, recipe_table

# Table 1 of the paper, typed from it; then the sentence below it: momentum 0.9
TABLE = {
    'A1': dict(data='CIFAR-100', epochs='240', batch='64', lr='0.05', optimiser='SGD', weight_decay=5e-4, label_smoothing='-', EMA='-', schedule='x0.1 at 150, 180, 210', augmentation='crop + flip'),
    'B1': dict(data='ImageNet', epochs='100', batch='256', lr='0.1', optimiser='SGD', weight_decay=1e-4, label_smoothing='-', EMA='-', schedule='x0.1 every 30', augmentation='crop + flip'),
    'B2': dict(data='ImageNet', epochs='450', batch='768', lr='0.048', optimiser='RMSProp', weight_decay=1e-5, label_smoothing='0.1', EMA='0.9999', schedule='x0.97 every 2.4 epochs',
               augmentation='crop + flip + randaugment + random erasing'),
    'B3': dict(data='ImageNet', epochs='300', batch='1024', lr='0.0005', optimiser='AdamW', weight_decay=5e-2, label_smoothing='0.1', EMA='-', schedule='cosine',
               augmentation='crop + flip + randaugment + random erasing + color jitter + Mixup + CutMix')}


@pytest.mark.parametrize('name', TABLE)
def test_every_field_of_table_1(name):
    row, want = RECIPES[name].row(), dict(TABLE[name])
    assert float(row['weight decay']) == want.pop('weight_decay')
    assert {k.replace('_', ' '): v for k,v in want.items()} == {k: row[k] for k in map(lambda k: k.replace('_', ' '), want)}
    assert row['momentum'] == {'A1': '0.9', 'B1': '0.9 (Nesterov)', 'B2': '0.9', 'B3': '-'}[name]
    assert str(RECIPES[name]).splitlines()[1].split()[:3] == [name, want['data'], want['epochs']]
    assert list(recipe_table([RECIPES[name]]).loc[name]) == list(row.values())[1:]


@pytest.mark.parametrize('name,epoch,factor', [
    ('A1', 0, 1), ('A1', 149.99, 1), ('A1', 150, .1), ('A1', 179.99, .1), ('A1', 180, .01), ('A1', 209.99, .01), ('A1', 210, .001), ('A1', 239.99, .001),
    ('B1', 29.99, 1), ('B1', 30, .1), ('B1', 59.99, .1), ('B1', 60, .01), ('B1', 89.99, .01), ('B1', 90, .001), ('B1', 99.99, .001),
    ('B2', 0, 0), ('B2', 1.5, .5), ('B2', 2.4, .8), ('B2', 2.99, 2.99/3), ('B2', 3, .97), ('B2', 4.79, .97), ('B2', 4.8, .97**2), ('B2', 240, .97**100), ('B2', 449.9, .97**187),
    ('B3', 0, 0), ('B3', 10, .5), ('B3', 19.99, 19.99/20), ('B3', 20, (1 + math.cos(math.pi/15))/2), ('B3', 150, .5), ('B3', 75, (1 + math.sqrt(.5))/2), ('B3', 300, 0)])
def test_rate_at_every_boundary(name, epoch, factor):
    r = RECIPES[name]
    assert r.lr_at(epoch) == pytest.approx(r.lr*factor, rel=1e-5, abs=r.lr*1e-6)


@pytest.mark.parametrize('name', TABLE)
def test_rates_of_a_learner(name):
    # a tenth or less of the length, whole steps: the rates that were really used, at the start of each step
    epochs = {'A1': 24, 'B1': 10, 'B2': 15, 'B3': 10}[name]
    r = RECIPES[name].scaled(epochs).replace(batch_size=10, mixup=0., cutmix=0., ema=0., drop_path=0.)
    data = [(torch.randn(4), torch.tensor(i % 3)) for i in range(20)]
    learn = Learner(DataLoaders.from_dsets(data, data[:4], bs=10, device='cpu', num_workers=0), nn.Linear(4, 3), lr=r.lr, loss_func=r.loss_func(), opt_func=r.opt_func(), cbs=r.callbacks())
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    by = RECIPES[name].epochs/epochs
    assert learn.recorder.lrs == pytest.approx([RECIPES[name].lr_at(by*step/2) for step in range(2*epochs)], rel=1e-4, abs=1e-6)
    want = {'A1': (torch.optim.SGD, dict(momentum=.9, nesterov=False)), 'B1': (torch.optim.SGD, dict(momentum=.9, nesterov=True)),
            'B2': (None, dict(momentum=.9, alpha=.9, eps=1e-3)), 'B3': (torch.optim.AdamW, {})}[name]
    opt = learn.opt.opt
    assert (want[0] is None and type(opt).__name__ == 'RMSpropTF' or isinstance(opt, want[0])) and want[1].items() <= opt.param_groups[0].items()
    assert opt.param_groups[0]['weight_decay'] == RECIPES[name].weight_decay


def test_label_smoothing():
    z, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    logp = z.log_softmax(1)
    want = -(.9*logp[range(5), y] + .1*logp.mean(1)).mean()
    assert RECIPES['B3'].loss_func()(z, y) == pytest.approx(want.item(), rel=1e-5)


def test_mixup_or_cutmix_one_per_batch():
    class Look(Callback):
        order = 5
        def before_fit(self): self.kinds = []
        def before_batch(self):
            if self.training: x = self.x; self.kinds.append('cut' if set(x.unique().tolist()) <= set(range(8)) else 'mix')
    data = [(torch.full((1, 8, 8), float(i)), torch.tensor(i % 2)) for i in range(8)]
    torch.manual_seed(0)
    learn = Learner(DataLoaders.from_dsets(data*10, data, bs=8, device='cpu', num_workers=0), nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), loss_func=RECIPES['B3'].loss_func(), cbs=[MixOrCut(.8, 1.), Look()])
    with learn.no_bar(), learn.no_logging(): learn.fit(4, 0.)
    n = learn.look.kinds.count('cut')
    assert len(learn.look.kinds) == 40 and 8 <= n <= 32


@pytest.mark.parametrize('change,says', [(dict(epochs=0), 'epochs'), (dict(lr=-1.), 'lr'), (dict(lr=float('nan')), 'lr'), (dict(batch_size='64'), 'batch_size'), (dict(momentum=1.), 'momentum'), (dict(augmentation='crop'), 'augmentation'),
                                         (dict(nesterov=True, optimizer='adamw'), 'nesterov'), (dict(weight_decay=-1), 'weight_decay')])
def test_a_mistake_names_field_and_value(change, says):
    with pytest.raises(ValueError, match=says) as e: get_recipe('A1').replace(**change)
    assert repr(change[says]) in str(e.value)


def test_json_round_trip_of_changed_recipes():
    for r in (get_recipe('B3').scaled(7), get_recipe('A1').replace(schedule=Steps((1, 2.5), .2)), get_recipe('tiny').replace(warmup=2, clip=1.)):
        assert Recipe.from_dict(json.loads(json.dumps(r.to_dict()))) == r


# ---- on a Learner

class Items(list):
    "A list that fastai can export"
    def new_empty(self): return Items()


def small_learner(recipe, tmp_path='.', cbs=()):
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    data = Items(zip(x, y))
    dls = DataLoaders.from_dsets(data, Items(data[:16]), bs=recipe.batch_size, device='cpu', num_workers=0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    return Learner(dls, model, lr=recipe.lr, loss_func=recipe.loss_func(), opt_func=recipe.opt_func(), cbs=[*recipe.callbacks(), *cbs], path=tmp_path)


def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)
    return learn


WITH_EMA = get_recipe('A1').scaled(2).replace(batch_size=16, ema=.7)
weights = lambda m: {k: v.clone() for k,v in m.state_dict().items()}
same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Watch(Callback):
    "Weights after each step, and those that validation saw"
    order = 90
    def before_fit(self): self.steps, self.seen = [], None
    def after_step(self): self.steps.append(weights(self.learn.model))
    def after_batch(self):
        if not self.training and self.seen is None: self.seen = weights(self.learn.model)


def by_hand(steps, decay):
    mean = dict(steps[0])
    for w in steps[1:]: mean = {k: decay*mean[k] + (1 - decay)*w[k] if w[k].is_floating_point() else w[k] for k in w}
    return mean


def test_average_by_hand_with_batchnorm_and_own_weights_afterwards():
    learn = fit(small_learner(WITH_EMA, cbs=[Watch()]))
    watch, want = learn.watch, by_hand(learn.watch.steps, .7)
    assert len(watch.steps) == 4 and same(weights(learn.model), watch.steps[-1])
    for k in want:
        if want[k].is_floating_point(): assert torch.allclose(watch.seen[k], want[k], atol=1e-6), k
    assert not torch.equal(watch.seen['1.running_mean'], watch.steps[-1]['1.running_mean'])     # statistics are averaged too


def test_validation_and_prediction_outside_a_fit_use_the_model_as_it_is():
    learn = fit(small_learner(WITH_EMA, cbs=[Watch()]))
    own, learn.watch.seen = weights(learn.model), None
    with learn.no_bar(): learn.validate()
    assert same(learn.watch.seen, own) and same(weights(learn.model), own)


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_an_error_in_validation_leaves_the_trained_weights(error):
    class Boom(Callback):
        order = 95
        def after_batch(self):
            if not self.training and self.armed: raise error('now')
    learn = small_learner(WITH_EMA, cbs=[Watch(), Boom()]); learn.boom.armed = True
    with pytest.raises(error): fit(learn)
    assert same(weights(learn.model), learn.watch.steps[-1])
    learn.boom.armed = False
    other = {k: v + 1 for k,v in weights(learn.model).items()}
    learn.model.load_state_dict(other)                      # nothing stale comes back over what was loaded
    class Begin(Callback):
        order = 1
        def before_batch(self):
            if self.training and not hasattr(self, 'w'): self.w = weights(self.learn.model)
    learn.add_cb(Begin()); fit(learn)
    assert same(learn.begin.w, other)


def test_lr_find_leaves_the_average_alone(tmp_path):
    learn = fit(small_learner(WITH_EMA, tmp_path))
    ema = next(c for c in learn.cbs if hasattr(type(c), 'use_average'))
    before = ema.state_dict()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert same(ema.state_dict(), before)


def test_average_goes_on_bit_equal_from_its_state():
    whole = fit(small_learner(WITH_EMA), 1); a = next(c for c in whole.cbs if hasattr(type(c), 'use_average'))
    other = small_learner(WITH_EMA); b = next(c for c in other.cbs if hasattr(type(c), 'use_average'))
    b.load_state_dict(a.state_dict()); other.model.load_state_dict(whole.model.state_dict())
    for learn, ema in ((whole, a), (other, b)):
        with torch.no_grad(): [p.add_(.5) for p in learn.model.parameters()]
        ema.after_step()
    assert same(a.state_dict(), b.state_dict())
    assert int(a.state_dict()['n_averaged']) == 5


ALL = dict(A1=WITH_EMA, B3=get_recipe('B3').scaled(2).replace(batch_size=16, ema=.7, mixup=0., cutmix=0., clip=1.),
           mixed=get_recipe('B3').scaled(2).replace(batch_size=16))


@pytest.mark.parametrize('name', ALL)
def test_export_has_nothing_of_this_package(name, tmp_path):
    learn = small_learner(ALL[name], tmp_path)
    if name != 'mixed': fit(learn)                          # CutMix wants images; its callback is saved all the same
    want = weights(learn.model)
    learn.export('e.pkl')
    pickled = zipfile.ZipFile(tmp_path/'e.pkl').open('e/data.pkl').read()
    assert b'diffkd' not in pickled
    again = load_learner(tmp_path/'e.pkl', pickle_module=pickle)
    assert same(weights(again.model), want)
    again.dls = learn.dls
    with again.no_bar(): assert again.get_preds(1)[0].shape == (16, 3)


def test_a_copied_learner_goes_on_as_its_original():
    learn = fit(small_learner(WITH_EMA))
    copy = deepcopy(learn)
    assert [type(c) for c in copy.cbs] == [type(c) for c in learn.cbs]
    for l in (learn, copy): torch.manual_seed(1); fit(l)
    assert same(weights(learn.model), weights(copy.model)) and copy.recorder.lrs == learn.recorder.lrs
    a, b = (next(c for c in l.cbs if hasattr(type(c), 'use_average')) for l in (learn, copy))
    assert same(a.state_dict(), b.state_dict()) and a.average is not b.average and b.learn is copy


@pytest.mark.parametrize('name,step', [
    ('sgd', lambda g, lr: lr*g), ('nesterov', lambda g, lr: lr*1.9*g),       # the first step of a momentum of 0.9: its buffer is the gradient
    ('rmsprop', lambda g, lr: lr*g/(.9 + .1*g*g + 1e-3).sqrt())])             # TensorFlow's: the mean square starts at 1, eps inside the root
def test_weight_decay_is_coupled_in_the_first_step(name, step):
    recipe = get_recipe('A1').scaled(1).replace(batch_size=64, weight_decay=.1, schedule=Constant(), lr=.01, optimizer='rmsprop' if name == 'rmsprop' else 'sgd', nesterov=name == 'nesterov')
    class Grad(Callback):
        def before_step(self): self.kept = self.learn.model[0].weight.grad.clone()
    learn = small_learner(recipe, cbs=[Grad()])
    w = learn.model[0].weight.detach().clone()
    fit(learn)
    assert torch.allclose(learn.model[0].weight, w - step(learn.grad.kept + .1*w, .01), atol=1e-6)


# ---- mistakes, and the paper's figures

@pytest.mark.parametrize('schedule,says', [(Every(0), 'every'), (Every(2., 0.), 'factor'), (Steps(5), 'milestones'), (Steps((3, 1)), 'rising'), (Steps(('1',)), 'milestones'), (Steps((1, 2), -1), 'factor'),
                                           (OneCycle(2.), 'between 0 and 1'), (Cosine(-1.), 'final'), ('cosine', 'Cosine'), (None, 'Cosine')])
def test_a_wrong_schedule_is_one_clear_error(schedule, says):
    with pytest.raises(InputError, match=says) as e: get_recipe('A1').replace(schedule=schedule)
    assert repr(schedule) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('change,says', [
    (lambda d: d.pop('lr'), 'lr'), (lambda d: d.update(foo=1), 'foo'), (lambda d: d['schedule'].update(foo=1), 'foo'), (lambda d: d['schedule'].update(kind='Stairs'), 'Stairs'),
    (lambda d: d.update(schedule='cosine'), 'cosine'), (lambda d: d.update(augmentation=5), 'augmentation'), (lambda d: d.update(lr='fast'), 'fast')])
def test_a_wrong_dict_is_one_clear_error(change, says):
    d = get_recipe('A1').to_dict(); change(d)
    with pytest.raises(InputError, match=says): Recipe.from_dict(d)


def test_a_dict_may_leave_out_what_has_a_default():
    assert Recipe.from_dict(dict(name='x', dataset='y', epochs=1, batch_size=2, lr=.1)) == Recipe('x', 'y', 1, 2, .1)


@pytest.mark.parametrize('name', ['a1', 'A2', None, ['A1']])
def test_an_unknown_recipe_names_the_known_ones(name):
    with pytest.raises(InputError, match='A1, B1, B2, B3'): get_recipe(name)


@pytest.mark.parametrize('teacher,student,method,value,std', [
    ('resnet56', 'resnet20', 'kd', 70.66, .24), ('ResNet-56', 'ResNet-20', 'KD', 70.66, .24), ('wrn_40_2', 'wrn_40_1', 'diffkd', 74.09, None), ('wrn_40_2', 'wrn_40_1', 'dist', 74.73, None),
    ('resnet50_cifar', 'mobilenetv2_cifar', 'diffkd', 69.21, None)])
def test_published_figures(teacher, student, method, value, std):
    got, = published(teacher, student, method)
    assert got['value'] == value and (std is None or got['std'] == std) and got['source'] == 'Huang et al. 2023, table 9'


def test_published_knows_the_six_pairs_of_table_9_and_nothing_else():
    pairs = [('wrn_40_2', 'wrn_40_1'), ('resnet56', 'resnet20'), ('resnet32x4', 'resnet8x4'), ('resnet50_cifar', 'mobilenetv2_cifar'), ('resnet32x4', 'shufflenetv1'), ('resnet32x4', 'shufflenetv2')]
    table = all_published().query("table == '9'")
    assert sum(len(published(t, s)) for t,s in pairs) == len(table)
    assert {r['method'] for r in published(*pairs[0])} == set(table.method)
    assert published('resnet20', 'resnet56') == [] == published('resnet56', 'resnet20', 'simkd') == published('resnet56', 'resnet20', dataset='CIFAR-10')
