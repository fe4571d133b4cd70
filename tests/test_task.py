"""A task that is unlike classification: inputs as a dict, targets of varying length, a metric where less is better and that is no mean over batches.

It trains, resumes, compares and verifies by one line in the list of tasks."""
import json, random, shutil
import pandas as pd, pytest, torch
from resuming import cut_and_resumed
from torch import nn
from torch.nn import functional as F
from fastai.basics import DataLoader, DataLoaders, Metric
from diffkd_nb.comparison import Comparison, compare
from diffkd_nb.files import InputError
from diffkd_nb.weights import load_weights, state_hash
from diffkd_nb.recipes import get_recipe
from diffkd_nb.run import evaluate, run, stored_learner
from diffkd_nb.setup import Setup
from diffkd_nb.task import Task
from diffkd_nb.tasks import TASKS, open_data
from diffkd_nb.verify import verify

WORDS, LONGEST = 6, 8


class BagDL(DataLoader):
    "Batches of a dict and a list of targets"
    n_inp = 1
    def __init__(self, dataset, seed=0, **kwargs):
        super().__init__(dataset, **kwargs)
        self.seed = seed; self.set_epoch(0)
    def set_epoch(self, epoch): self.rng = random.Random(f'{self.seed}-{epoch}')
    def create_batch(self, b):
        words, lengths, targets = zip(*b)
        return dict(words=torch.stack(words), lengths=torch.stack(lengths)), list(targets)


class Bags:
    "Bags of words of varying length; which words occur more than once?"
    task,classes,stats,name,spec,n_train,n_valid = 'bags',list('abcdef'),None,'bags','bags',160,50
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        words = torch.randint(WORDS, (self.n_train + self.n_valid, LONGEST), generator=g)
        lengths = torch.randint(4, LONGEST + 1, (len(words),), generator=g)
        self.items = [(w, n, self.repeated(w[:n])) for w,n in zip(words, lengths)]
    def repeated(self, words):
        found, n = words.unique(return_counts=True)
        return found[n > 1] if (n > 1).any() else found[:1]
    def dls(self, batch_size=64, augmentation=(), seed=0, device=None, eval_batch=None):
        train, valid = self.items[:self.n_train], self.items[self.n_train:]
        return DataLoaders(BagDL(train, seed, bs=batch_size, shuffle=True, drop_last=True, num_workers=0),
                           BagDL(valid, seed, bs=eval_batch or 3, num_workers=0), device=torch.device(device or 'cpu'))
    def hash(self): return 'words:' + state_hash({str(i): torch.cat([w, n[None], t]) for i,(w,n,t) in enumerate(self.items)})
    def example(self, n): return self.dls(n).train.one_batch()[:1]


class Net(nn.Module):
    "Adds up what stands for each word"
    def __init__(self, width):
        super().__init__()
        self.words,self.body,self.head = nn.Embedding(WORDS, width),nn.Linear(width, width),nn.Linear(width, WORDS)
    def forward(self, bag):
        there = torch.arange(LONGEST) < bag['lengths'][:, None]
        return self.head(self.body((self.words(bag['words'])*there[..., None]).sum(1)).relu())


def loss(out, targets): return torch.stack([-F.log_softmax(o, -1)[t].mean() for o,t in zip(out, targets)]).mean()
def misses(o, t): return len(set(t.tolist()) - set(o.topk(len(t)).indices.tolist()))


class Missed(Metric):
    "Words missed, of all words of all targets together"
    def reset(self): self.missed = self.all = 0
    def accumulate(self, learn):
        self.missed += sum(map(misses, learn.pred, learn.yb[0])); self.all += sum(map(len, learn.yb[0]))
    value = property(lambda self: self.missed/self.all)
    name = 'missed'


class BagTask(Task):
    "The whole task"
    name,kinds,metric,larger_is_better,output = 'bags',('bags',),'missed',False,'classes'
    def open(self, spec, download=False): return Bags()
    def model(self, name, data, drop_path=0.): return Net(int(name.partition(':')[2]))
    def teacher(self, spec, data, weights=None): name, _, f = spec.partition('@'); return load_weights(self.model(name, data), f)
    def loss(self, recipe): return loss
    def metrics(self, data): return [Missed()]
    def evaluate(self, model, data, device='cpu', batch=500, augmentation=(), **loader):
        model = model.to(device).eval()
        with torch.no_grad():
            out = [(model(dict(words=w[None], lengths=n[None]))[0], t) for w,n,t in data.items[data.n_train:]]
        return dict(missed=sum(misses(o, t) for o,t in out)/sum(len(t) for _,t in out),
                    valid_loss=sum(loss(o[None], [t]).item() for o,t in out)/len(out))


RECIPE = get_recipe('tiny').replace(epochs=3, batch_size=16)


@pytest.fixture(autouse=True)
def known(monkeypatch): monkeypatch.setitem(TASKS, 'bags', BagTask())         # the one line


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out, TASKS['bags'] = tmp_path_factory.mktemp('teacher'), BagTask()
    run(RECIPE.replace(epochs=30), 'bags', None, 'bag:32', 'alone', 0, out, progress=False)
    return f"bag:32@{out/'student.safetensors'}"


def test_trains(teacher, tmp_path):
    m = run(RECIPE, 'bags', teacher, 'bag:4', 'kd', 0, tmp_path, progress=False)
    log, r = pd.read_csv(tmp_path/'log.csv'), m['result']
    assert m['settings']['task'] == 'bags' and [t['kind'] for t in m['taps']] == ['logits']
    assert r == dict(missed=log.missed.iloc[-1], best_missed=log.missed.min(), best_epoch=1 + log.missed.argmin(), valid_loss=log.valid_loss.iloc[-1])
    assert evaluate(load_weights(Net(4), tmp_path/'student.safetensors'), 'bags') == pytest.approx((r['missed'], r['valid_loss']), abs=1e-6)
    good = evaluate(load_weights(Net(32), teacher.partition('@')[2]), 'bags')[0]
    torch.manual_seed(0)
    assert good < .2 < evaluate(Net(32), 'bags')[0]             # the teacher has learned something
    # and the metric is no mean over batches
    data, model = open_data('bags'), load_weights(Net(4), tmp_path/'student.safetensors').eval()
    per_batch = [sum(map(misses, model(x), y))/sum(map(len, y)) for x,y in data.dls(16).valid]
    assert abs(sum(per_batch)/len(per_batch) - r['missed']) > 1e-4


@pytest.mark.parametrize('method', ['alone', 'kd'])
def test_resumes(teacher, method, tmp_path, monkeypatch):
    cut_and_resumed(lambda out: run(RECIPE, 'bags', teacher, 'bag:4', method, 1, out, progress=False), tmp_path, monkeypatch)


def test_compares_and_verifies(teacher, tmp_path):
    args = dict(pairs=[(teacher, 'bag:4')], methods=['alone', 'kd'], seeds=2, recipe=RECIPE, data='bags', out=tmp_path, executor='here', threads=1, progress=False)
    c = compare(**args)
    assert not c.failed and c.task.name == 'bags' and len(c.manifests) == 4
    row = c.table().set_index('method').loc['kd']
    runs = c.runs.pivot(index='seed', columns='method', values='missed')
    assert row.missed == pytest.approx(runs.kd.mean()) and row.difference == pytest.approx((runs.kd - runs.alone).mean())
    text = c.markdown()
    assert '| method | verdict | missed | sd |' in text and ': missed of the last epoch' in text and '%)' not in text and 'points' not in c.verdicts()[0]
    assert c.plot().get_xlabel() == 'missed, difference to alone'
    report = verify(tmp_path, teacher=teacher.partition('@')[2])
    assert report, str(report)
    asked = {k.what for k in report}
    assert {'the student gives the missed of the manifest', 'the student gives the loss of the manifest', 'the best missed is that of the log', 'the table is what the runs give'} <= asked
    # a second call finds all finished; another setting is told
    assert compare(**args).manifests == c.manifests
    with pytest.raises(InputError, match='recipe.*name another folder'): compare(**{**args, 'recipe': RECIPE.replace(lr=.5)})


def test_less_is_better(teacher, tmp_path):
    c = compare([(teacher, 'bag:4')], ['alone', 'kd'], 2, RECIPE.replace(epochs=1), 'bags', tmp_path, executor='here', threads=1, progress=False)
    for f,m in c.manifests.items(): m['result']['missed'] = (.3 if '/kd/' in f else .5) + .001*m['settings']['seed']*('/kd/' in f)
    assert c.table().set_index('method').verdict['kd'] == 'better' and 'kd - alone: -0.20' in c.verdicts()[0]


def test_a_better_figure_is_found(tmp_path):
    run(RECIPE, 'bags', None, 'bag:4', 'alone', 0, tmp_path/'a', progress=False)
    assert verify(tmp_path/'a')
    shutil.copytree(tmp_path/'a', tmp_path/'b')
    f = tmp_path/'b'/'log.csv'; lines = f.read_text().splitlines()
    was = json.loads((tmp_path/'b'/'manifest.json').read_text())['result']['missed']
    f.write_text('\n'.join([*lines[:-1], lines[-1].replace(str(was), '0.01')]) + '\n')
    assert {k.what for k in verify(tmp_path/'b') if k.ok is False} == {'log.csv is as it was written', 'the headline is the last epoch of the log', 'the best missed is that of the log'}


def test_a_stored_run_can_be_looked_into(teacher, tmp_path):
    m = run(RECIPE, 'bags', teacher, 'bag:4', 'diffkd:taps=logits,latent=4', 0, tmp_path, progress=False, keep_distiller=True)
    learn = stored_learner(tmp_path, teacher)
    with learn.no_bar(): assert learn.validate()[1] == pytest.approx(m['result']['missed'])


def test_what_a_task_does_not_know_is_told(teacher, monkeypatch):
    with pytest.raises(InputError, match='teacher_stats does not go with bags'): Setup(RECIPE, 'bags', 'bag:4', (teacher,), 'kd', teacher_stats='imagenet').open()
    with pytest.raises(InputError, match="no module named 'tail'"): Setup(RECIPE, 'bags', 'bag:4', (teacher,), 'kd', taps=[('tail', 'head')]).open().plan()
    monkeypatch.delitem(TASKS, 'bags')
    with pytest.raises(InputError, match="is not a folder"): open_data('bags')
