"""What every test process needs, and which file goes to which of them."""
import os
import signal
from pathlib import Path
import pytest

# A shell that starts the tests in the background may have them ignore Ctrl+C, and what they start would inherit that:
# then no test of an interrupt could work.
signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get('PYTEST_XDIST_WORKER'):
    import workers
    workers.start_server()

# The longest first, so that two processes end together; what is not named comes after these
LONGEST = ['test_invariants', 'test_demo', 'test_compare', 'test_shared_teacher', 'test_models', 'test_tables', 'test_distributed',
           'test_fast', 'test_commands', 'test_resume', 'test_table9', 'test_method_invariants', 'test_gpu_sh']
LAST = ['test_notebooks']       # many items of their own: they fill up what is left, the longest of them first
LONG_PAGES = ['40_', '44_', '31_', '19_', '18_', '42_', '62_', '09_', '20_', '05_', '00d_']


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)} | {name: 100 + i for i, name in enumerate(LAST)}
    page = lambda item: next((i for i, n in enumerate(LONG_PAGES) if f'[{n}' in item.name), len(LONG_PAGES))
    items.sort(key=lambda item: (place.get(Path(item.path).stem, 50), page(item)))


@pytest.fixture(scope='session')
def teacher(tmp_path_factory):
    "Name and file of a network that has seen the digits once; a test file that needs another has a fixture of this name"
    from diffkd_nb.recipes import get_recipe
    from diffkd_nb.run import run
    out = tmp_path_factory.mktemp('teacher')
    run(get_recipe('tiny').replace(epochs=1), 'digits', None, 'small:8', 'alone', 0, out, progress=False)
    return f"small:8@{out/'student.safetensors'}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file stays in one process, for what its tests share; notebooks share nothing"
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if '/test_notebooks.py' in nodeid else super()._split_scope(nodeid)
    config.option.loadscopereorder = False      # the order above, not the number of tests in a file
    return Scheduling(config, log)
