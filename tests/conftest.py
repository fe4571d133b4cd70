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
LONGEST = ['test_methods', 'test_invariants', 'test_compare', 'test_fast', 'test_demo', 'test_distributed', 'test_docs', 'test_resume']
LAST = ['test_notebooks']       # many items of their own: they fill up what is left


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)} | {name: 100 + i for i, name in enumerate(LAST)}
    items.sort(key=lambda item: place.get(Path(item.path).stem, 50))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file stays in one process, for what its tests share; notebooks share nothing"
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid): return nodeid if '/test_notebooks.py' in nodeid else super()._split_scope(nodeid)
    config.option.loadscopereorder = False      # the order above, not the number of tests in a file
    return Scheduling(config, log)
