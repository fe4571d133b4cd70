"""Processes in which the package is imported already: a start takes a quarter of a second, not six.

They are forked from multiprocessing's fork server, which has imported everything once and has done nothing else; where there is
no fork, they are spawned. Each has an environment, a folder, a standard output and a standard error of its own, and ends with an
exit status or by a signal, as a program does. What needs a program started from nothing says so where it stands."""
import atexit, importlib, multiprocessing, os, re, runpy, signal, subprocess, sys, tempfile, time
from multiprocessing import forkserver
from pathlib import Path

PRELOAD = ['pytest', 'nbdev.test', 'timm', 'sklearn.datasets', 'accelerate', 'torch.distributed.launcher.api', 'diffkd_nb.commands',
           'diffkd_nb.demo']
_forks = 'forkserver' in multiprocessing.get_all_start_methods()
context = multiprocessing.get_context('forkserver' if _forks else 'spawn')
if _forks: context.set_forkserver_preload(PRELOAD)


def start_server():
    "Start the server that the workers come from, before a grid starts the same one with less in it"
    if _forks: forkserver.ensure_running()


def _become(env, folder, out, err, session=False):
    "Take an environment, a folder, and files for what is written"
    for path, stream in ((out, 1), (err or out, 2)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600); os.dup2(fd, stream); os.close(fd)
    sys.stdout = sys.__stdout__ = open(1, 'w', buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, 'w', buffering=1, closefd=False)
    if session: os.setsid()
    os.environ.clear(); os.environ.update(env); os.chdir(folder)
    if hasattr(signal, 'pthread_sigmask'): signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # a grid may have started the server
    import torch
    if 'OMP_NUM_THREADS' in env: torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)    # the platform's, as in a program
    if _forks: forkserver._forkserver.ensure_running = lambda: None     # what a worker starts comes from the same server


def _work(target, args, env, folder, out, err, session):
    "What a worker does"
    global _output
    _become(env, folder, out, err, session); _output = out
    try: sys.exit(target(*args))
    finally: atexit._run_exitfuncs()    # multiprocessing leaves these out


def _rank(target, args, env, folder, out):
    "What one of several processes does; the launcher has set what it is among them"
    told = {k: v for k, v in os.environ.items() if re.match('(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_|MASTER_|TORCH', k)}
    _become({**env, **told}, folder, out, None)
    try: status = target(*args)
    finally: atexit._run_exitfuncs()
    if status: sys.exit(status)


def _launch(n, target, args):
    "What `torchrun --standalone --nproc-per-node n` does, with workers in place of programs"
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    config = LaunchConfig(1, 1, n, run_id=str(os.getpid()), rdzv_backend='c10d', rdzv_endpoint='localhost:0', max_restarts=0,
                          start_method=context.get_start_method())
    try: elastic_launch(config, _rank)(target, args, dict(os.environ), str(Path.cwd()), _output)
    except ChildFailedError as e: return str(e)


def run_command(main, argv):
    "Call `main`, such as 'diffkd_nb.commands:train_main', as its command does"
    module, name = main.split(':')
    sys.argv = [name, *argv]
    return getattr(importlib.import_module(module), name)()


def run_file(path, argv):
    "Run a script as `python path argv` does"
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name='__main__')


class Worker:
    "A function in a process of its own, with the face of `subprocess.Popen`"
    def __init__(self,
        target, # A function of a module, called in the process; what it returns is what it passes to `sys.exit`
        *args, # Its arguments
        env=None, # Environment variables that differ from those here; None leaves one out
        cwd=None, # Folder to work in
        join=False, # Write standard error into standard output?
        session=False, # A session of its own, so that it and what it starts can be signalled together?
    ):
        env = {k: v for k, v in {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg', **(env or {})}.items() if v is not None}
        self._folder = tempfile.TemporaryDirectory(prefix='worker')
        out, err = (str(Path(self._folder.name)/name) for name in ('out', 'err'))
        self._files = [Path(out)] + [Path(err)]*(not join)
        for f in self._files: f.touch()
        self._process = context.Process(target=_work, args=(target, args, env, str(cwd or Path.cwd()), out, None if join else err, session))
        self._process.start()
        atexit.register(self.kill)

    @property
    def pid(self): return self._process.pid
    @property
    def returncode(self): return self._process.exitcode
    @property
    def output(self):
        "All that was written so far, to standard output and to standard error"
        texts = [f.read_text() for f in self._files]
        return texts[0], (texts[1] if len(texts) > 1 else None)

    def poll(self): return self._process.exitcode

    def wait(self, timeout=300):
        self._process.join(timeout)
        if self.returncode is None: raise subprocess.TimeoutExpired(str(self._process), timeout, *self.output)
        return self.returncode

    def communicate(self, timeout=300): self.wait(timeout); return self.output

    def wait_for(self, text, times=1, timeout=60):
        "Wait until `text` was written that often"
        end = time.monotonic() + timeout
        while self.output[0].count(text) < times:
            assert self.returncode is None and time.monotonic() < end, f'{text!r} is not in {self.output}'
            time.sleep(.005)

    def send_signal(self, signal):
        if self.returncode is None: os.kill(self.pid, signal)
    def terminate(self): self.returncode is None and self._process.terminate()
    def kill(self): self.returncode is None and self._process.kill()

    def __enter__(self): return self
    def __exit__(self, *exc): self.kill(); self.wait()


def start_command(main, *argv, **kw):
    "Start what a command does: `main` names its function, such as 'diffkd_nb.commands:train_main'"
    return Worker(run_command, main, [str(a) for a in argv], **kw)


def file(path, *argv, timeout=300, **kw):
    "Run a script to its end"
    return finished(Worker(run_file, str(path), [str(a) for a in argv], **kw), timeout)


def start_torchrun(n, target, *args, **kw):
    "Start `n` processes that call `target` and know of each other, as torchrun does"
    return Worker(_launch, n, target, args, join=True, **kw)


def finished(worker, timeout=300):
    "Wait for the end, as `subprocess.run` does"
    out, err = worker.communicate(timeout)
    return subprocess.CompletedProcess(worker, worker.returncode, out, err)


def call(target, *args, timeout=300, **kw): return finished(Worker(target, *args, **kw), timeout)
def command(main, *argv, timeout=300, **kw): return finished(start_command(main, *argv, **kw), timeout)
