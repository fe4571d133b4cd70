"A run that is killed at any moment and started again ends bit for bit as one that was left alone"
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest
from diffkd_nb.experiment import run
from diffkd_nb.recipes import get_recipe

EPOCHS = 4
CODE = '''
import sys, torch; torch.set_num_threads(1)
from diffkd_nb.data import digits_data
from diffkd_nb import experiment
from diffkd_nb.experiment import run
from diffkd_nb.recipes import Recipe
import json, os, time
job = json.loads(sys.argv[1])
if job['slow_write']:                       # makes the moment of writing a checkpoint long enough to be hit
    real = os.replace
    def replace(a, b):
        if str(b).endswith('checkpoint.pt'): print('writing', flush=True); time.sleep(.5)
        return real(a, b)
    os.replace = replace
m = run(Recipe.from_dict(job['recipe']), 'digits', job['teacher'], 'small:4', job['method'], 1, job['out'], progress=False)
print('finished', flush=True)
'''


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp('teacher')
    run(get_recipe('tiny').replace(epochs=3), 'digits', None, 'small:8', 'alone', 0, out, progress=False)
    return f"small:8@{out/'student.safetensors'}"


def job(teacher, method, out, slow_write=False):
    recipe = get_recipe('tiny').replace(epochs=EPOCHS, ema=.9)
    return json.dumps(dict(recipe=recipe.to_dict(), teacher=teacher, method=method, out=str(out), slow_write=slow_write))


def start(text): return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', CODE, text], stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def finish(text):
    p = start(text)
    assert 'finished' in p.communicate(timeout=300)[0] and p.returncode == 0


def files(out): return {f.name: f.read_bytes() for f in out.iterdir() if f.name in ('student.safetensors', 'log.csv')}


@pytest.mark.parametrize('method', ['diffkd', 'crd'])
def test_killed_at_random_steps(teacher, method, tmp_path):
    finish(job(teacher, method, tmp_path/'whole'))
    rng, kills, out = random.Random(0 if method == 'diffkd' else 1), 0, tmp_path/'killed'
    while kills < 3:
        p = start(job(teacher, method, out))
        target = kills            # wait until that many epochs are on record, then a random moment more
        while p.poll() is None and not (target == 0 or (out/'log.csv').is_file() and len((out/'log.csv').read_text().splitlines()) > target): time.sleep(.005)
        if target == 0:
            while not out.is_dir(): time.sleep(.005)
        time.sleep(rng.uniform(0, .15))
        assert p.poll() is None, 'the run ended before it could be killed'
        p.send_signal(signal.SIGKILL); p.wait(); kills += 1
        assert not (out/'manifest.json').is_file()
    finish(job(teacher, method, out))
    assert files(out) == files(tmp_path/'whole')
    a, b = (json.loads((tmp_path/d/'manifest.json').read_text()) for d in ('whole', 'killed'))
    assert a['student_hash'] == b['student_hash'] and b['cost']['resumed_at_epoch'] and a['cost']['resumed_at_epoch'] is None
    assert not list(out.glob('.*')), 'something half-written stayed behind'


def test_killed_while_writing_a_checkpoint(teacher, tmp_path):
    finish(job(teacher, 'diffkd', tmp_path/'whole'))
    out = tmp_path/'killed'
    for n in (1, 2):
        p = start(job(teacher, 'diffkd', out, slow_write=True))
        for _ in range(n): assert p.stdout.readline().strip() == 'writing'
        p.send_signal(signal.SIGKILL); p.wait()
        assert list(out.glob('.checkpoint.pt.*.part')), 'the checkpoint was not being written'
    finish(job(teacher, 'diffkd', out))
    assert files(out) == files(tmp_path/'whole')
    assert not list(out.glob('.*'))


def test_two_processes_in_one_folder(teacher, tmp_path):
    p = start(job(teacher, 'diffkd', tmp_path/'a', slow_write=True))
    assert p.stdout.readline().strip() == 'writing'
    with pytest.raises(ValueError, match='another process is at work'):
        run(get_recipe('tiny').replace(epochs=EPOCHS, ema=.9), 'digits', teacher, 'small:4', 'diffkd', 1, tmp_path/'a', progress=False)
    p.kill(); p.wait()
