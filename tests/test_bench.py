"The measurements that pages read: they run, and write what the pages expect"
import json, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pytest, torch
from diffkd_nb.study import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'bench'))
import compression, rows        # noqa: E402


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
