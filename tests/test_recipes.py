"The recipes against the paper's table 1, and what a Learner makes of them"
import json, math
import pandas as pd, pytest, torch
from torch import nn
from fastai.vision.all import Callback, DataLoaders, Learner
from diffkd_nb.recipes import MixOrCut, RECIPES, Cosine, Every, Recipe, Steps, get_recipe, recipe_table

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
    ('B2', 2.39, 1), ('B2', 2.4, .97), ('B2', 4.79, .97), ('B2', 4.8, .97**2), ('B2', 240, .97**100), ('B2', 449.9, .97**187),
    ('B3', 0, 1), ('B3', 150, .5), ('B3', 75, (1 + math.sqrt(.5))/2), ('B3', 300, 0)])
def test_rate_at_every_boundary(name, epoch, factor):
    r = RECIPES[name]
    assert r.lr_at(epoch) == pytest.approx(r.lr*factor, rel=1e-6, abs=1e-10)


@pytest.mark.parametrize('name', TABLE)
def test_rates_of_a_learner(name):
    # a tenth or less of the length, whole steps: the rates that were really used, at the start of each step
    epochs = {'A1': 24, 'B1': 10, 'B2': 15, 'B3': 10}[name]
    r = RECIPES[name].scaled(epochs).replace(batch_size=10, mixup=0., cutmix=0., ema=0.)
    data = [(torch.randn(4), torch.tensor(i % 3)) for i in range(20)]
    learn = Learner(DataLoaders.from_dsets(data, data[:4], bs=10, device='cpu', num_workers=0), nn.Linear(4, 3), lr=r.lr, loss_func=r.loss_func(), opt_func=r.opt_func(), cbs=r.callbacks())
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    by = RECIPES[name].epochs/epochs
    assert learn.recorder.lrs == pytest.approx([RECIPES[name].lr_at(by*step/2) for step in range(2*epochs)], rel=1e-4, abs=1e-9)
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
