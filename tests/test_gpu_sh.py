"""The queue for a GPU that is lent for minutes, with a program that stands in for Python: what is kept, limited, archived."""
import os, signal, subprocess, tarfile, time
from pathlib import Path
import pytest

HOME = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(os.name != 'posix', reason='a script of bash')

# Writes what it is called for to the file after --out or --junitxml; the words in MODE say how each script behaves
STUB = r'''#!/usr/bin/env bash
out=; prev=; what=other
for a in "$@"; do case "$prev" in --out|--junitxml) out=$a;; esac; prev=$a; case "$a" in pytest) what=tests;; *step.py) what=step;; *imagenet.py) what=imagenet;; *cells.py) what=cells;; esac; done
echo "$what" >> "$CALLS"
if [ "$1" = - ]; then exec python3 "$@"; fi
case " $MODE " in
  *" $what:hang "*) [ -z "$out" ] || echo '{"rows": [1]}' > "$out"; echo $$ > "$CALLS.pid"; exec sleep 300;;
  *" $what:fail "*) echo '{"rows": [1]}' > "$out"; echo 'no such kernel' >&2; exit 1;;
esac
[ -z "$out" ] || echo '{"rows": [1, 2]}' > "$out"
'''


@pytest.fixture
def call(tmp_path):
    stub = tmp_path/'python'
    stub.write_text(STUB); stub.chmod(0o755)
    (tmp_path/'calls').touch()
    def start(*args, mode='', **kw):
        env = {k: v for k,v in os.environ.items() if k not in ('DATA', 'TEACHER', 'RELEASED', 'IMAGENETTE')}
        return subprocess.Popen(['bash', HOME/'bench/gpu.sh', '--rehearse', '--slower', '1', '--python', stub, '--results', tmp_path/'r', '--archive', tmp_path/'a.tar.gz', *args],
                                env={**env, 'MODE': mode, 'CALLS': str(tmp_path/'calls')}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)
    start.folder = tmp_path
    return start


def packed(folder):
    with tarfile.open(folder/'a.tar.gz') as t: return {m.name.removeprefix('./') for m in t.getmembers()}


def test_a_failed_step_stays_and_the_others_go_on_and_nothing_runs_twice(call):
    p = call(mode='step:fail'); said = p.communicate(timeout=60)[0]
    assert p.returncode == 1 and 'failed: no such kernel' in said and 'skipped  study: set DATA' in said
    got = call.folder/'r/gpu'
    assert 'failed: no such kernel' in (got/'state.txt').read_text() and (got/'step_wrn_40_2-wrn_40_1.json').is_file()
    assert {'gpu/tests.xml', 'gpu/step_wrn_40_2-wrn_40_1.json', 'gpu/imagenet.json', 'gpu/cells.txt', 'gpu/state.txt'} <= packed(call.folder)
    n = len((call.folder/'calls').read_text().split())
    said = call().communicate(timeout=60)[0]
    again = (call.folder/'calls').read_text().split()[n:]
    assert said.count('kept ') == 6 and set(again) <= {'other'}


@pytest.mark.slow
def test_a_call_ends_in_its_time_and_what_was_stopped_begins_again(call):
    begin = time.monotonic()
    p = call('--minutes', '0.4', '--steps', 'times', mode='imagenet:hang')        # 24 seconds
    said = p.communicate(timeout=90)[0]
    assert time.monotonic() - begin < 40 and 'imagenet.json            stopped after' in said
    assert (call.folder/'r/gpu/imagenet.json').is_file() and 'gpu/imagenet.json' in packed(call.folder)       # what it had is there
    said = call('--steps', 'times').communicate(timeout=60)[0]
    assert 'kept     step_' in said and 'imagenet.json            done' in said and '[1, 2]' in (call.folder/'r/gpu/imagenet.json').read_text()


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGKILL])
def test_killed_half_way_the_archive_holds_what_was_finished(call, sent):
    p = call(mode='imagenet:hang', start_new_session=True)
    end = time.monotonic() + 60
    while not (call.folder/'calls.pid').exists() and time.monotonic() < end: time.sleep(.2)
    os.kill(p.pid, sent); p.wait(timeout=20)
    assert {'gpu/tests.xml', 'gpu/step.json'} <= packed(call.folder) and not (call.folder/'a.tar.gz.part').exists()
    if sent == signal.SIGTERM: assert 'imagenet.json stopped from outside' in (call.folder/'r/gpu/state.txt').read_text()
    else: os.kill(int((call.folder/'calls.pid').read_text()), signal.SIGKILL)


def test_an_unknown_step_is_told(call):
    p = call('--steps', 'everything')
    assert 'no step named everything' in p.communicate(timeout=20)[0] and p.returncode == 2
