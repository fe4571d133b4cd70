"The measurements that pages read: they run, and write what the pages expect"
import json, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pandas as pd, pytest, torch
from diffkd_nb.feature_measures import about_the_sample, adds_words
from diffkd_nb.recipes import get_recipe
from diffkd_nb.run import run
from diffkd_nb.segmentation_data import write_shapes
from diffkd_nb.study import QUESTIONS, SETTINGS, Setting, study

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'bench'))
import about_the_image, compression, rounding, rows        # noqa: E402


@pytest.mark.slow
def test_methods_on_two_pairs(tmp_path):
    out = tmp_path/'cost.json'
    done = subprocess.run([sys.executable, '-W', 'ignore', ROOT/'bench'/'methods.py', '--pairs', 'small:8,small:4', 'resnet8_s,small:4', '--batch', '4', '--steps', '1',
                           '--rounds', '2', '--methods', 'alone', 'kd', 'diffkd', 'srrl', '--out', out], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    stored = json.loads(out.read_text())
    assert [(p['teacher'], p['student']) for p in stored['pairs']] == [('small:8', 'small:4'), ('resnet8_s', 'small:4')]
    for p in stored['pairs']:
        rows = p['rows']
        assert rows['alone']['to_alone'] == 1 and rows['kd']['added_parameters'] == 0 < rows['diffkd']['added_parameters']
        assert 0 < rows['alone']['memory_mb'] <= rows['kd']['memory_mb'] < rows['diffkd']['memory_mb']        # KD keeps scores alone
        assert all(r['low'] <= r['ms'] <= r['high'] for r in rows.values() if 'refused' not in r)


def test_rows_of_other_code_are_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path/'rows.json'
    def opened(**kw): return rows.Rows(out, rows.__file__, **{'bench': 'x', 'teacher': 'a', **kw})
    r = opened(); r.add(model='t', value=1.)
    assert list(opened()) == [{'model': 't', 'value': 1.}] and list(opened(redo=True)) == []
    with pytest.raises(SystemExit, match='teacher.*--redo'): opened(teacher='b')
    monkeypatch.setattr(rows, 'code_version', lambda: dict(version='0', commit=None, source='another'))
    with pytest.raises(SystemExit, match='code.source'): opened()
    with pytest.raises(SystemExit, match='code.script'): rows.Rows(ROOT/'results'/'bench'/'features.json', rows.__file__)


def test_compressions_against_their_closed_forms():
    "White features lose 1 - width/channels to any projection; PCA leaves the smallest eigenvalues; nothing linear beats it"
    torch.manual_seed(0)
    white = torch.randn(40_000, 16)
    x = white*torch.linspace(2, .2, 16) @ torch.linalg.qr(torch.randn(16, 16))[0] + 3
    mean, cov = compression.moments(x)
    assert torch.allclose(cov, torch.cov(x.double().T, correction=0), atol=1e-9)
    values = torch.linalg.eigvalsh(cov)
    for w in (4, 8):
        best = compression.error(compression.pca(mean, cov, w), x)
        assert best == pytest.approx(float(values[:16-w].sum()/values.sum()), rel=1e-9)
        own = compression.moments(white)
        for s in range(3):
            plain, back = (compression.error(compression.random_projection(mean, w, s, c), x) for c in (None, cov))
            assert best < back < plain
            for c in (None, own[1]): assert compression.error(compression.random_projection(own[0], w, s, c), white) == pytest.approx(1 - w/16, abs=.01)
    many = [compression.error(compression.random_projection(mean, 4, s), x[:2000]) for s in range(300)]
    assert sum(many)/300 == pytest.approx(1 - 4/16, abs=.02)            # of any spectrum, on average
    for c in (None, cov): assert compression.error(compression.random_projection(mean, 16, 0, c), x) < 1e-9


def test_a_trained_autoencoder_comes_near_to_pca_and_not_below():
    torch.manual_seed(0)
    x = (torch.randn(4000, 4, 8)*torch.linspace(2, .2, 8)).movedim(2, 1)[..., None]
    flat = x.movedim(1, -1).reshape(-1, 8)
    recipe = replace(SETTINGS['S1'].recipe, weight_decay=0., epochs=2)
    f, course = compression.train(x, 4, 0, recipe)
    best, own = compression.error(compression.pca(*compression.moments(flat), 4), flat), compression.error(f, flat)
    assert best - 1e-9 <= own < best + .02 and len(course) == 2 and course[1] < course[0]
    y = torch.arange(4000) % 5
    found = compression.judge(f, flat, flat, x.double(), y, lambda v: torch.nn.functional.one_hot(y, 5).float())
    assert found['kept'] == 100 and found['error'] == found['fit_error'] == own and 0 < found['cka'] < 1
    whole = compression.judge(compression.pca(*compression.moments(flat), 8), flat, flat, x.double(), y, lambda v: ((v[:, :5] - x.flatten(1)[:, :5]).abs() < 1e-4).float())
    assert whole['error'] < 1e-9 and whole['cka'] == pytest.approx(1) and whole['kept'] == 100


def _measured(seeds, denoised):
    "Rows of made-up maps: students with noise of their own, `denoised(before, teacher)` of each"
    rows = []
    for s in seeds:
        g = torch.Generator().manual_seed(s)
        draw = lambda *shape: torch.randn(*shape, generator=g)
        teacher = draw(3, 6, 6) + draw(30, 3, 6, 6)
        before, control = teacher + 2*draw(*teacher.shape), teacher + 2*draw(*teacher.shape)
        maps = dict(before=before, denoised=denoised(before, teacher)), dict(identity=control)
        rows += [dict(variant=v, seed=s, map=k, **about_the_sample(m, teacher)) for v,found in zip(('DiffKD', 'identity'), maps) for k,m in found.items()]
    return rows


@pytest.mark.parametrize('denoised,words,own', [
    (lambda before, teacher: teacher, 'about the picture and what all pictures share', 1.),
    (lambda before, teacher: teacher.mean(0, keepdim=True).expand_as(teacher), 'what all pictures share', None),
    (lambda before, teacher: before, "nothing that is the teacher's", None)], ids=['perfect', 'average', 'nothing'])
def test_denoisers_whose_answer_is_known(denoised, words, own):
    seeds = range(5)
    made = _measured(seeds, denoised)
    table = pd.DataFrame(made).query('map == "denoised"')
    if own: assert table.own.tolist() == pytest.approx([own]*5)
    if words == 'what all pictures share': assert table.about.abs().max() < 1e-9 and table.average.min() > .9
    found = about_the_image.answer(made, seeds)
    assert len(found) == 4 and adds_words(found) == words
    assert about_the_image.answer(made[:-1], seeds) is None and about_the_image.answer([], seeds) is None     # a seed is missing


@pytest.mark.slow
def test_about_the_image_of_stored_runs(tmp_path, monkeypatch, capsys):
    "From a small study to the answer; a seed that is missing is named, and gives no answer"
    data = write_shapes(tmp_path/'shapes', 30, (36, 44))
    recipe = get_recipe('camvid').replace(epochs=2, batch_size=6)
    run(recipe, data + '?size=24x32', None, 'pyramid:small:4?width=12', 'alone', 0, tmp_path/'teacher', progress=False)
    kind, _, folder = data.partition(':')
    q = QUESTIONS['segmentation']
    toy = Setting('S3', 'pyramid:small:4?width=12', 'pyramid:small:2?width=8', recipe, kind, SETTINGS['S3'].options, .1, 'size=24x32')
    monkeypatch.setitem(SETTINGS, 'S3', toy)
    monkeypatch.setitem(QUESTIONS, 'segmentation', replace(q, seeds=(1, 2), variants={k: q.variants[k] for k in ('DiffKD', 'identity')}, differences=q.differences[:1]))
    teacher = tmp_path/'teacher'/'student.safetensors'
    argv = ['x', '--study', str(tmp_path/'study'), '--data', data + '?size=24x32', '--teacher', str(teacher), '--out', str(tmp_path/'out.json')]
    monkeypatch.setattr(sys, 'argv', argv)
    study('segmentation', folder, teacher, tmp_path/'study', seeds=[1], progress=False); about_the_image.main()
    said = capsys.readouterr().out
    assert 'identity, seed 2: the run missing' in said and '1 of 2 planned seeds' in said
    study('segmentation', folder, teacher, tmp_path/'study', progress=False); about_the_image.main()
    assert 'What denoising adds is' in capsys.readouterr().out
    stored = pd.DataFrame(json.loads((tmp_path/'out.json').read_text())['rows'])
    assert sorted(zip(stored.variant, stored.seed, stored['map'])) == sorted((v, s, m) for s in (1, 2) for v,ms in
        (('DiffKD', ('before', 'denoised', 'student', 'teacher')), ('identity', ('identity', 'student', 'teacher'))) for m in ms)
    assert (stored[stored['map'] == 'teacher'].own - 1).abs().max() < 1e-9


def test_one_weight_moves_by_its_last_bit():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    before = [p.clone() for p in model.parameters()]
    rounding.nudge(model, 3)
    changed = [(i, k) for i,(p,q) in enumerate(zip(model.parameters(), before)) for k in (p != q).flatten().nonzero().flatten().tolist()]
    assert changed == [(2, 3)]
    w, was = model[2].weight.flatten()[3], before[2].flatten()[3]
    assert w > was and torch.nextafter(w, was) == was


def test_rounding_repeats_a_seed(tmp_path, monkeypatch):
    "Repetition 0 is the plain run; the others end elsewhere; a second call trains nothing"
    recipe = get_recipe('tiny').replace(epochs=1)
    run(recipe, 'digits', None, 'small:8', 'alone', 0, tmp_path/'teacher', progress=False)
    teacher = f"small:8@{tmp_path/'teacher'/'student.safetensors'}"
    monkeypatch.setattr(rounding, 'SETTINGS', {'pictures': ('small:4', recipe, range(1, 2), 2)})
    monkeypatch.setattr(rounding, 'METHODS', {'KD': 'kd'})
    monkeypatch.setattr(sys, 'argv', ['x', 'pictures', '--data', 'digits', '--teacher', teacher, '--runs', str(tmp_path/'runs'), '--out', str(tmp_path/'out.json')])
    rounding.main()
    plain = run(recipe, 'digits', teacher, 'small:4', 'kd', 1, tmp_path/'plain', progress=False)
    made = [json.loads((tmp_path/'runs'/'KD'/'seed1'/str(i)/'manifest.json').read_text()) for i in (0, 1)]
    assert made[0]['result'] == plain['result'] and made[0]['student_hash'] == plain['student_hash'] != made[1]['student_hash']
    stored = json.loads((tmp_path/'out.json').read_text())
    assert stored['rows'] == [dict(variant='KD', seed=1, repetition=i, accuracy=100*m['result']['accuracy'], student=m['student_hash']) for i,m in enumerate(made)]
    monkeypatch.setattr(rounding, 'run_setup', None); rounding.main()
    assert json.loads((tmp_path/'out.json').read_text())['rows'] == stored['rows']
