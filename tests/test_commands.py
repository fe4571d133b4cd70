"The installed commands as a user runs them: the functions that their scripts call, in workers, and one of the scripts itself"
import json, os, re, signal, subprocess, sys, time
from importlib.metadata import distribution
from pathlib import Path
import pytest
import workers

MAINS = {e.name: e.value for e in distribution('diffkd_nb').entry_points}


def command(name, *args): return workers.command(MAINS[name], *args)


def script(name, *args):
    return subprocess.run([Path(sys.executable).parent/name, *args], capture_output=True, text=True, env={**os.environ, 'MPLBACKEND': 'Agg'}, timeout=300)


HELP = {'diffkd_train': ['--student', '--keep-distiller', 'cifar100:FOLDER', "'dkd:beta=4'", 'examples:'],
        'diffkd_compare': ['--pair', '--jobs', '--show', 'reviewkd', 'A1, B1, B2, B3'], 'diffkd_verify': ['--files-only', 'exit status']}


@pytest.mark.parametrize('name', HELP)
def test_help(name):
    r = command(name, '--help')
    assert r.returncode == 0 and not r.stderr and all(w in r.stdout for w in HELP[name])


def test_the_scripts_themselves():
    assert set(HELP) <= set(MAINS) and all(callable(e.load()) for e in distribution('diffkd_nb').entry_points.select(group='console_scripts'))
    r = script('diffkd_verify', 'nowhere')
    assert r.returncode == 2 and 'not a folder' in r.stderr and 'Traceback' not in r.stderr


def test_train_interrupt_go_on_verify(tmp_path):
    args = ['--data', 'digits', '--recipe', 'tiny', '--epochs', '25', '--student', 'small:8', '--method', 'alone', '--out', tmp_path/'o']
    p = workers.start_command(MAINS['diffkd_train'], *args)
    while not (tmp_path/'o'/'checkpoint.pt').is_file(): assert p.poll() is None, p.communicate(); time.sleep(.01)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'goes on from there' in err and 'Traceback' not in err and 'recipe' in out
    assert not (tmp_path/'o'/'manifest.json').exists() and not (tmp_path/'o'/'.lock').exists()
    r = command('diffkd_train', *args)
    assert r.returncode == 0 and '% in the last epoch' in r.stdout, r.stderr
    m = json.loads((tmp_path/'o'/'manifest.json').read_text())
    assert m['cost']['resumed_at_epoch'] and m['settings']['recipe']['epochs'] == 25
    again = command('diffkd_train', *args)
    assert again.returncode == 0 and json.loads((tmp_path/'o'/'manifest.json').read_text()) == m
    ok = command('diffkd_verify', tmp_path/'o')
    assert ok.returncode == 0 and '0 failed, 0 could not be made' in ok.stdout
    log = tmp_path/'o'/'log.csv'; log.write_text(log.read_text().replace('1,', '9,', 1))
    bad = command('diffkd_verify', tmp_path/'o')
    assert bad.returncode == 1 and 'FAILED' in bad.stdout and 'log.csv' in bad.stdout


@pytest.mark.parametrize('name,args,says', [
    ('diffkd_train', ['--data', 'digits', '--student', 'small:4', '--out', 'OUT'], 'needs a teacher'),
    ('diffkd_train', ['--data', 'digits', '--student', 'small:4', '--teacher', 'small:8', '--out', 'OUT'], 'NAME@FILE.safetensors'),
    ('diffkd_train', ['--data', 'digits', '--student', 'small:4', '--teacher', 'small:8@nowhere', '--out', 'OUT'], 'nowhere is not a file'),
    ('diffkd_train', ['--data', 'digits', '--student', 'small:4', '--method', 'alone', '--batch-size', '2000', '--out', 'OUT'], 'fewer than one batch of 2000'),
    ('diffkd_train', ['--data', 'digits', '--student', 'small:4', '--method', 'alone', '--recipe', 'B2', '--out', 'OUT'], "'randaugment:rand-m9-mstd0.5'"),
    ('diffkd_train', ['--data', 'digits', '--student', 'small:4', '--method', 'alone', '--epochs', '0', '--out', 'OUT'], 'at least 1'),
    ('diffkd_compare', ['--data', 'digits', '--out', 'OUT'], '--pair'),
    ('diffkd_compare', ['--show', 'nowhere'], 'not a folder'),
    ('diffkd_verify', ['nowhere'], 'not a folder')])
def test_a_mistake_is_one_message_and_leaves_nothing(name, args, says, tmp_path):
    r = command(name, *[str(tmp_path/'o') if a == 'OUT' else a for a in args])
    assert r.returncode == 2 and says in r.stderr and 'Traceback' not in r.stderr and not (tmp_path/'o').exists(), r.stderr
    assert re.search(r' \[help: [a-z-]+\]$', r.stderr.strip()), r.stderr
