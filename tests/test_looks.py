"Planned looks: the comparison ends where it is decided; what seeds vary; what is refused"
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest
from diffkd_nb.comparison import Comparison, compare
from diffkd_nb.files import InputError
from diffkd_nb.grid import EXECUTORS
from diffkd_nb.looks import Looks, is_decided
from diffkd_nb.recipes import get_recipe
from diffkd_nb.record import manifest_hash
from diffkd_nb.statistics import contrasts
from diffkd_nb.study import SETTINGS, Question, Setting, study
from diffkd_nb.verify import ALIKE_CHECK, verify

RECIPE = get_recipe('tiny').replace(epochs=1)
GAIN = {'alone': 0., 'kd': 2., 'dist': .05}


@pytest.fixture
def made_up(monkeypatch, teacher):
    "An executor that writes manifests with made-up accuracies; gives the seeds that it was asked for, call by call, and the noise"
    manifest, asked = json.loads((Path(teacher.partition('@')[2]).parent/'manifest.json').read_text()), []
    how = dict(asked=asked, noise=.1, gain=dict(GAIN), fail=())

    def work(todo, tick, deadline=None):
        asked.append(sorted({s.seed for s, _ in todo}))
        failed = {}
        for setup, job in todo:
            if (setup.method.name, setup.seed) in how['fail']: failed[str(job.out)] = 'made up'; continue
            rng = np.random.RandomState(setup.seed), np.random.RandomState(1000*setup.seed + len(str(setup.method)))
            value = (60 + how['gain'][setup.method.name] + 3*rng[0].randn() + how['noise']*rng[1].randn())/100
            m = {**manifest, 'settings': setup.open().settings, 'files': {}, 'result': {**manifest['result'], 'accuracy': value, 'best_accuracy': value}}
            job.out.mkdir(parents=True, exist_ok=True)
            (job.out/'manifest.json').write_text(json.dumps({**m, 'hash': manifest_hash(m)}))
        return failed
    monkeypatch.setitem(EXECUTORS, 'here', lambda jobs, share: work)
    return how


def go(teacher, out, seeds, **more):
    args = dict(pairs=[(teacher, 'small:4')], methods=list(GAIN), recipe=RECIPE, data='digits', out=out, executor='here', threads=1, progress=False)
    return compare(seeds=seeds, **{**args, **more})


def test_it_ends_at_the_look_that_decides_all(made_up, teacher, tmp_path, capsys):
    plan = Looks((3, 5, 8), margin=.5)
    c = go(teacher, tmp_path, plan)
    # by hand, from the differences: Holm at each look's share of the error, Bonferroni for the margin
    acc = c.runs.pivot(index='seed', columns='method', values='accuracy')
    at = lambda n: contrasts({m: acc[m][:n] for m in acc}, [('kd', 'alone'), ('dist', 'alone')], share=n/16, margin=.5)
    ends = next(n for n in plan.at if is_decided(at(n).verdict))
    assert c.look == ends < 8 and c.decided() and made_up['asked'] == [list(range(n))[m:] for m, n in zip((0, *plan.at), plan.at) if n <= ends]
    table = c.table().set_index('method')
    assert table.verdict.to_dict() == {'alone': '', 'kd': 'better', 'dist': 'no gain worth its cost'}
    np.testing.assert_allclose(table['difference high'][['kd', 'dist']], at(ends).high)
    said = f'Look at {ends} seeds of those planned at 3, 5, 8: decided'
    assert said in capsys.readouterr().out and said in c.markdown() and said in (tmp_path/'verdicts.txt').read_text()
    assert 'Not run' not in c.markdown() and '(Holm, 3 looks)' in c.verdicts()[0]
    again = go(teacher, tmp_path, plan)                        # says so, and trains nothing
    assert len(made_up['asked']) == sum(n <= ends for n in plan.at) and said in capsys.readouterr().out and again.manifests == c.manifests
    assert verify(tmp_path, evaluate_students=False)[-1].ok


def test_without_a_decision_it_goes_to_the_last_look(made_up, teacher, tmp_path):
    made_up['noise'] = 5.
    c = go(teacher, tmp_path, Looks((3, 5)))
    assert made_up['asked'] == [[0, 1, 2], [3, 4]] and c.look == 5 and not c.decided() and 'the last one, and not every' in c.notes()[0]


def test_planned_differences_decide(made_up, teacher, tmp_path):
    made_up['noise'] = .02
    c = go(teacher, tmp_path, Looks((3, 5), differences=[('kd', 'dist')]))     # dist - alone would need more seeds
    assert made_up['asked'] == [[0, 1, 2]] and c.decided()


def test_a_look_needs_all_its_runs(made_up, teacher, tmp_path):
    made_up['fail'] = [('kd', 1)]
    c = go(teacher, tmp_path, Looks((3, 5)))
    assert list(c.failed.values()) == ['made up'] and c.look == 0 and made_up['asked'] == [[0, 1, 2]]
    assert set(c.table().verdict[1:]) == {'not looked at yet'}
    made_up['fail'] = ()
    assert go(teacher, tmp_path, Looks((3, 5))).look >= 3 and made_up['asked'][1] == [1]


def test_a_plan_is_not_changed(made_up, teacher, tmp_path):
    go(teacher, tmp_path/'planned', Looks((2, 3)))
    for seeds, says in [(Looks((3, 5)), 'looks are planned before the runs'), (Looks((2, 3), .1), r'margin None, got looks at \[2, 3\], margin 0.1'),
                        (3, 'got no looks')]:
        with pytest.raises(InputError, match=says): go(teacher, tmp_path/'planned', seeds)
    go(teacher, tmp_path/'free', 3)
    with pytest.raises(InputError, match='begun with no looks'): go(teacher, tmp_path/'free', Looks((3, 5)))


def test_looks_that_cannot_be_taken(made_up, teacher, tmp_path):
    for seeds, more, says in [(Looks((3, 8), seeds=5), {}, 'end with 8 seeds, got 5'), (Looks((3,)), dict(reference='pkt'), 'pkt, which is not among'),
                              (Looks((3,), differences=[('kd', 'crd')]), {}, 'crd, which is not among')]:
        with pytest.raises(InputError, match=says): go(teacher, tmp_path, seeds, **more)
    assert not made_up['asked']


def test_a_question_ends_when_its_differences_are_decided(made_up, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SETTINGS, 'toy', Setting('toy', 'small:8', 'small:4', RECIPE, 'digits', {}, .1))
    q = Question('toy', 'Does KD help?', 'toy', {'alone': 'alone', 'KD': 'kd', 'DIST': 'dist'}, (('KD', 'alone'),), tuple(range(50, 58)), looks=Looks((3, 8), .5))
    file = Path(teacher.partition('@')[2])
    result = study(q, None, file, tmp_path, progress=False)
    answer, cost = q.answer(tmp_path), q.cost(tmp_path)
    assert result.decided() and result.planned_seeds == list(q.seeds) and made_up['asked'] == [[50, 51, 52]]
    assert answer.n.tolist() == [3] and answer.verdict.tolist() == ['better'] and cost.left.sum() == 0
    by_hand = contrasts({m: result.runs[result.runs.method == t].set_index('seed').accuracy for m, t in q.variants.items()}, q.differences, share=3/11, margin=.5)
    pd.testing.assert_frame_equal(answer, by_hand)
    with pytest.raises(InputError, match='its looks take its seeds in their order'): study(q, None, file, tmp_path, seeds=[57], progress=False)


# what seeds vary

def test_seeds_vary_what_rounds(teacher, tmp_path):
    out, how = tmp_path/'c', dict(methods=['alone', 'kd'], by_seed={'channels_last': [True, False]})
    c = go(teacher, out, 2, **how)
    layout = {f: m['settings'].get('channels_last', False) for f, m in c.manifests.items()}
    assert all(v == f.endswith('seed0') for f, v in layout.items()) and len(layout) == 4 and c.unlike() == []
    assert verify(out, evaluate_students=False) and 'Seeds also vary channels_last (True, False)' in c.markdown()
    usual, kd = go(teacher, tmp_path/'usual', 1, methods=['kd']).manifests, 'small_4-from-small_8/kd/seed0'
    assert usual[kd]['student_hash'] == c.manifests[kd]['student_hash']      # the seed that takes the usual value
    with pytest.raises(InputError, match='channels_last.*name another folder'): go(teacher, out, 2, methods=['alone', 'kd'])
    c.grid.pop('by_seed')
    (out/'grid.json').write_text(json.dumps(c.grid))        # a plan that does not say so
    assert [c.what for c in verify(out, evaluate_students=False) if not c.ok] == [ALIKE_CHECK]


def test_what_seeds_cannot_vary(teacher, tmp_path):
    for by_seed, more, says in [({'lr': [.1, .2]}, {}, 'what rounds differently'), ({'channels_last': [True, False]}, dict(channels_last=True), 'leave one of them out'),
                                ({'graph': [True, False]}, dict(share_teacher=True), 'share_teacher and graph'), ({'graph': [True]}, {}, 'at least two values')]:
        with pytest.raises(InputError, match=says): go(teacher, tmp_path, 2, by_seed=by_seed, **more)


def test_a_setting_of_the_study_carries_it(teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, 'toy', Setting('toy', 'small:8', 'small:4', RECIPE, 'digits', {}, .1, by_seed={'channels_last': [True, False]}))
    q = Question('toy', 'Does KD help?', 'toy', {'alone': 'alone'}, (), (50, 51))
    c = study(q, None, Path(teacher.partition('@')[2]), tmp_path, progress=False)
    assert [m['settings'].get('channels_last', False) for _, m in sorted(c.manifests.items())] == [True, False]


def test_the_command_takes_looks_and_what_seeds_vary(monkeypatch, capsys):
    from diffkd_nb import commands
    asked = []
    monkeypatch.setattr(commands, 'compare', lambda pair, methods, seeds, *a, **k: asked.append((seeds, k['by_seed'], k['equal_time'])) or 1/0)
    common = ['--data', 'digits', '--pair', 'a@b', 'c', '--out', 'd']
    for more in ([], ['--looks', '3', '5', '--margin', '.5', '--by-seed', 'channels_last=true,false', 'precision=bf16,float32'], ['--seeds', '5', '--equal-time', 'kd']):
        with pytest.raises(ZeroDivisionError): commands.compare_main(common + more)
    assert asked == [(3, {}, None), (Looks((3, 5), .5), {'channels_last': [True, False], 'precision': ['bf16', 'float32']}, None), (5, {}, 'kd')]
    for more, says in [(['--margin', '1'], '--margin goes with --looks'), (['--looks', '3', '--seeds', '5'], 'leave --seeds out')]:
        assert commands.compare_main(common + more) == 2 and says in capsys.readouterr().err


@pytest.mark.slow
def test_between_equals_one_in_twenty_finds_anything():
    "400 comparisons of three equal methods by the code that decides, at all of three looks"
    rng, plan, alarms = np.random.RandomState(0), Looks((3, 5, 8), .3), 0
    pairs = [(m, 'alone') for m in ('kd', 'dist', 'pkt')]
    for _ in range(400):
        x = {m: pd.Series(rng.randn(8)) for m in ('alone', 'kd', 'dist', 'pkt')}
        alarms += any(contrasts({m: v[:n] for m, v in x.items()}, pairs, share=plan.share(n)).verdict.isin(['better', 'worse']).any() for n in plan.at)
    assert alarms/400 <= .05 + 2*(.05*.95/400)**.5
