"The measurements that pages read: they run, and write what the pages expect"
import json, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent


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
