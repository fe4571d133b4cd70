"Equal time: lengths from what steps take, measured once; whole schedules; nothing else differs"
import json
import pandas as pd, pytest
from diffkd_nb import equal_time
from diffkd_nb.comparison import compare
from diffkd_nb.files import InputError
from diffkd_nb.recipes import get_recipe
from diffkd_nb.setup import Job, Setup, Sources
from diffkd_nb.verify import ALIKE_CHECK, verify

RECIPE = get_recipe('tiny').replace(epochs=1)       # 1,000 digits in batches of 32: 31 steps
RATIO = {'alone': 1.25, 'kd': 1., 'fitnet': .4}


def go(teacher, out, **more):
    args = dict(pairs=[(teacher, 'small:4')], methods=['alone', 'kd', 'fitnet'], seeds=1, recipe=RECIPE, data='digits', out=out, executor='here', threads=1, progress=False,
                equal_time='kd')
    return compare(**{**args, **more})


def test_each_method_trains_as_long_as_the_named_one(teacher, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(equal_time, 'step_ratios', lambda cells, reference, sources: asked.append((list(cells), reference)) or
                        {m: dict(ms=1., ratio=RATIO[m], clock='a clock', processor='a processor') for m in cells})
    c = go(teacher, tmp_path, methods=['alone', 'kd'])
    steps = {f.split('/')[1]: m['settings']['recipe'].get('steps') for f, m in c.manifests.items()}
    logs = {f.split('/')[1]: pd.read_csv(tmp_path/f/'log.csv') for f in c.manifests}
    assert steps == dict(alone=39, kd=None) and {m: len(log) for m, log in logs.items()} == dict(alone=2, kd=1)
    assert all(log.lr.iloc[-1] < RECIPE.lr*.01 for log in logs.values())       # the cycle has come to its end
    c = go(teacher, tmp_path)                                                   # a method more: it alone is new, beside the named one
    assert asked == [(['alone', 'kd'], 'kd'), (['kd', 'fitnet'], 'kd')]
    short = next(m for f, m in c.manifests.items() if '/fitnet/' in f)['settings']['recipe']
    assert (short['steps'], short['epochs']) == (12, 1)                         # 31 * 0.4 = 12.4
    table = c.table().set_index('method')
    assert table.epochs.round(3).to_dict() == dict(alone=1.258, kd=1., fitnet=.387) and c.unlike() == []
    text = c.markdown()
    assert 'all train as long as kd' in text and '| epochs |' in text and 'by a clock of a step on a processor' in text
    assert verify(tmp_path, evaluate_students=False)
    go(teacher, tmp_path); assert len(asked) == 2                               # never measured again
    with pytest.raises(InputError, match='begun at equal time with kd'): go(teacher, tmp_path, equal_time='alone')
    with pytest.raises(InputError, match='recipe.*name another folder'): go(teacher, tmp_path, recipe=RECIPE.replace(lr=.5))
    f = tmp_path/'small_4-from-small_8'/'fitnet'/'seed0'/'manifest.json'
    f.write_text(f.read_text().replace('"lr": 0.02', '"lr": 0.03'))             # more than the length is another
    assert ALIKE_CHECK in [c.what for c in verify(tmp_path, evaluate_students=False) if c.ok is False]


def test_what_equal_time_does_not_go_with(teacher, tmp_path):
    for more, says in [(dict(equal_time='dkd'), "'dkd', which is not among the methods"), (dict(cache=str(tmp_path/'cache')), 'equal_time and cache'),
                       (dict(share_teacher=True), 'equal_time and share_teacher')]:
        with pytest.raises(InputError, match=says): go(teacher, tmp_path/'c', **more)


@pytest.mark.slow
def test_steps_that_cost_the_same_give_a_ratio_of_one(teacher, tmp_path):
    "Processor time in turns, on whatever machine; DiffKD's steps cost more than KD's, the student's own less"
    cells = {m: (Setup(RECIPE, 'digits', 'small:4', (teacher,), m), Job(tmp_path/'run', 'cpu')) for m in ('alone', 'kd', 'kd:weight=0.5', 'diffkd')}
    found = equal_time.step_ratios(cells, 'kd', Sources(), rounds=9)
    assert .8 < found['kd:weight=0.5']['ratio'] < 1.25 and found['diffkd']['ratio'] < .9 < 1.05 < found['alone']['ratio']
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_a_measured_comparison_takes_equal_time(teacher, tmp_path):
    c = go(teacher, tmp_path, methods=['kd', 'diffkd'], recipe=RECIPE.replace(epochs=6), reference='kd')
    stored = json.loads((tmp_path/'grid.json').read_text())['equal_time']['ratios']
    spent = {m['settings']['method']: m['cost']['ms_per_step']*m['cost']['steps_per_epoch']*e for m, e in zip(c.manifests.values(), map(c._epochs, c.manifests))}
    assert .5 < spent['diffkd']/spent['kd'] < 2 and stored['small_4-from-small_8/diffkd']['ratio'] < .9 and verify(tmp_path)


@pytest.mark.slow
def test_a_question_at_equal_time_trains(teacher, tmp_path, monkeypatch):
    "The planned question on digits, one seed; the named variant keeps the recipe as it is"
    from dataclasses import replace
    from pathlib import Path
    from diffkd_nb.study import QUESTIONS, SETTINGS, Setting, cost_text, study
    monkeypatch.setitem(SETTINGS, 'toy', Setting('toy', 'small:8', 'small:4', RECIPE, 'digits', {}, .1))
    q = replace(QUESTIONS['1-time'], setting='toy', seeds=(700,))
    c = study(q, None, Path(teacher.partition('@')[2]), tmp_path, progress=False)
    length = {m['settings']['method']: m['settings']['recipe'].get('steps') for m in c.manifests.values()}
    assert c.equal_time == 'kd' and length.pop('kd') is None and all(n < 31 for n in length.values()) and cost_text(q.cost(tmp_path)) == 'all 5 runs are on record'
    assert q.answer(tmp_path).n.tolist() == [1]*5 and verify(tmp_path)
