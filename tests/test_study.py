"The questions of the study can be asked: every variant trains, and variants with fewer seeds are counted right"
from dataclasses import replace
import pytest
from diffkd_nb.files import InputError
from diffkd_nb.recipes import get_recipe
from diffkd_nb.run import run
from diffkd_nb.study import QUESTIONS, SETTINGS, Setting, cost_text, study


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A setting on digits, and its teacher"
    recipe = get_recipe('tiny').replace(epochs=1)
    monkeypatch.setitem(SETTINGS, 'toy', Setting('toy', 'small:8', 'small:4', recipe, 'digits', {}, .1))
    run(recipe, 'digits', None, 'small:8', 'alone', 0, tmp_path/'teacher', progress=False)
    return tmp_path/'teacher'/'student.safetensors'


def test_some_variants_have_fewer_seeds(toy, tmp_path, capsys):
    q = replace(QUESTIONS['methods'], key='toy', setting='toy', seeds=(7, 8), variants=dict(alone='alone', KD='kd', SRRL='srrl'),
                differences=(('SRRL', 'KD'), ('KD', 'alone')), fewer=dict(SRRL=1))
    assert q.cost(tmp_path/'out').left.to_dict() == dict(alone=2, KD=2, SRRL=1)
    result = study(q, None, toy, tmp_path/'out', progress=False)
    assert len(result.runs) == 5 and len(result.grid['cells']) == 5 and not result.failed
    assert cost_text(q.cost(tmp_path/'out')) == 'all 5 runs are on record'
    assert q.variants_table(tmp_path/'out').n.to_dict() == dict(alone=2, KD=2, SRRL=1)
    assert q.answer(tmp_path/'out').n.to_dict() == {'SRRL - KD': 1, 'KD - alone': 2}
    with pytest.raises(InputError, match='another question'): study(q, None, toy, tmp_path/'out', seeds=[9], progress=False)


def test_setting_and_question_say_which_students_are_stored(toy, tmp_path, monkeypatch):
    "Those of CamVid, all of them: the measures of denoising need student and distiller of every seed; of sentences two"
    asked = []
    monkeypatch.setattr('diffkd_nb.study.compare', lambda *a, **kw: asked.append(kw['keep_student']))
    q = replace(QUESTIONS['1'], setting='toy')
    study(q, None, toy, tmp_path/'out', progress=False)
    monkeypatch.setitem(SETTINGS, 'toy', replace(SETTINGS['toy'], options=SETTINGS['S3'].options))
    study(q, None, toy, tmp_path/'out', progress=False)
    monkeypatch.setitem(SETTINGS, 'toy', replace(SETTINGS['toy'], options={}))
    study(replace(q, stored=('KD', 'KD + DiffKD')), None, toy, tmp_path/'out', progress=False)
    assert asked == [(100,), True, {'kd': (100,), 'kd+diffkd:taps=feature': (100,)}] and SETTINGS['S3'].options['keep_distiller']
    assert all({*q.stored} <= {*q.variants} for q in QUESTIONS.values())


@pytest.mark.slow
@pytest.mark.parametrize('key', ['methods', '2', '4-text', '4-text-joined'])
def test_every_method_of_the_comparison_trains(toy, tmp_path, key):
    "All rows of the planned comparison, one epoch each"
    q = replace(QUESTIONS[key], key='toy', setting='toy', seeds=(7,), fewer={})
    result = study(q, None, toy, tmp_path/'out', progress=False)
    assert not result.failed and not result.diverged and len(result.runs) == len(q.variants)
    assert (q.answer(tmp_path/'out').n == 1).all()
