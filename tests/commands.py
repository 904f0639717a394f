"""The command line, and programs, as processes of their own that do not import torch and TorchRec anew.

One process, started when it is first needed, imports what takes long (some 5 s of a core), and copies itself for each
command: `os.fork`, as `LocalGroup` does for its ranks. A copy is a process like any other, with its own id, environment,
folder, signals and exit code, and it runs `python -m embedshard.cli` from the first line on. The workers that it starts are
copies, too. What a copy does not prove is how a fresh interpreter starts, and that nothing hangs on the order of a set of
strings, which is the same in all copies: tests of that start `sys.executable`.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

TIMEOUT_S = 900
OWN_CODE = "TESTS_OWN_CODE"
"""Environment variable: a file of Python that a copy runs first; its workers, which are copies of it, have what it did."""


def run_command(*arguments, **options):
    """Runs `embedshard` with arguments to its end; see `Copy` for the options."""
    return run_python("-m", "embedshard.cli", *arguments, **options)


def start_command(*arguments, **options):
    """Starts `embedshard` with arguments; see `Copy` for the options."""
    return start_python("-m", "embedshard.cli", *arguments, **options)


@contextlib.contextmanager
def ranks_started(number, *arguments, **options):
    """Starts `embedshard` as so many ranks, in the environment that a launcher makes; what is left of them is ended."""
    from embedshard.world import RENDEZVOUS

    size = str(number)
    with tempfile.TemporaryDirectory() as folder:
        shared = {RENDEZVOUS: f"file://{folder}/rendezvous", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, **options}
        ranks = [start_command(*arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(number)]
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()


def run_ranks(number, *arguments, **options):
    """Runs `embedshard` as so many ranks to their end; returns what rank 0 printed."""
    with ranks_started(number, *arguments, **options) as ranks:
        outputs = [rank.communicate(TIMEOUT_S) for rank in ranks]
    for rank, (_, errors) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, errors
    return outputs[0][0]


def run_python(*arguments, **options):
    """Runs a module or a file of Python to its end; see `Copy` for the options."""
    process = start_python(*arguments, **options)
    try:
        stdout, stderr = process.communicate(TIMEOUT_S)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.arguments, process.returncode, stdout, stderr)


def start_python(*arguments, **options):
    """Starts a module or a file of Python; see `Copy` for the options."""
    return Copy(arguments, **options)


class Copy:
    """A process that is used as a `subprocess.Popen` of text whose output goes to pipes.

    Args:
        arguments: those of Python: `-m` and a module, or a file, and its own arguments.
        cwd: its folder; this process's where None.
        env: its whole environment; this process's where None.
        passes: descriptors of files that it is to have, too; its last argument is the list of their numbers there, as JSON.
        more: environment variables on top of these.
    """

    def __init__(self, arguments, cwd=None, env=None, passes=(), **more):
        self.arguments, self.returncode, self._told = [str(argument) for argument in arguments], None, b""
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._status, theirs = os.pipe()
        request = {
            "arguments": self.arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": {**(os.environ if env is None else env), **more},
        }
        try:
            _source().send(request, [self._output.fileno(), self._errors.fileno(), theirs, *passes])
        finally:
            os.close(theirs)
        while self._told.count(b"\n") < 1:
            assert self._read(), "the process that is copied is gone: see what it printed"
        self.pid = int(self._told.split(b"\n")[0])
        os.set_blocking(self._status, False)

    def _read(self):
        """Takes what its keeper has told; returns whether there may be more."""
        try:
            told = os.read(self._status, 100)
        except BlockingIOError:
            return True
        self._told += told
        return bool(told)

    def poll(self):
        if self.returncode is None:
            alive = self._read()
            lines = self._told.split(b"\n")
            if len(lines) == 3:
                self.returncode = int(lines[1])
                os.close(self._status)
            else:
                assert alive, f"what waited for process {self.pid} is gone"
        return self.returncode

    def wait(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(self._text(file) for file in (self._output, self._errors))

    @staticmethod
    def _text(file):
        file.seek(0)
        return file.read().decode()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class _Source:
    """The process that is copied."""

    def __init__(self):
        import embedshard

        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        package = str(Path(embedshard.__file__).parents[1])  # that of this checkout
        path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH")) if part)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        theirs.close()
        atexit.register(self._end)

    def send(self, request, files):
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)

    def _end(self):
        self._socket.close()
        self.process.wait(30)


_made = []


def _source():
    if not _made:
        _made.append(_Source())
    return _made[0]


# ------------------------------------------------------------------------------------------- in the process that is copied
def _import_what_takes_long():
    from embedshard.world import set_process_environment

    set_process_environment()
    import rich.console
    import rich.progress  # noqa: F401
    import typer  # noqa: F401
    from numba.core.registry import cpu_target

    import embedshard.launch.export
    import embedshard.launch.local
    import embedshard.launch.planning
    import embedshard.train.rehearsal  # noqa: F401
    from embedshard.report import page

    with contextlib.suppress(ImportError):  # pyarrow asks what is one of pandas' arrays
        import pandas  # noqa: F401
    for template in page._templates().list_templates():
        page._templates().get_template(template)
    cpu_target.typing_context.refresh()  # what a kernel from the cache needs
    cpu_target.target_context.refresh()
    assert not _threads(), f"{_threads()}: a copy would lack them"
    assert "embedshard.cli" not in sys.modules, "each copy runs it from its first line on"
    gc.freeze()  # so that a copy's first collection does not write to all that was imported


def _threads():
    """The names of this process's other threads; jemalloc sees to its own."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    return {(task / "comm").read_text().strip() for task in tasks} - {"jemalloc_bg_thd"}


def _serve(requests):
    """Copies this process for each request; returns, in a copy, what it is to run, and None at the end of the requests."""
    keepers = []
    while True:
        line, files, _, _ = socket.recv_fds(requests, 1 << 20, 32)
        keepers = [keeper for keeper in keepers if os.waitpid(keeper, os.WNOHANG) == (0, 0)]
        if not line:
            return None
        keeper = os.fork()
        if keeper == 0:
            requests.close()
            return _keep(json.loads(line), *files)
        keepers.append(keeper)
        for file in files:
            os.close(file)


def _keep(request, output, errors, status, *passed):
    """Starts the copy that runs, and tells its id and how it ended; returns in the copy alone."""
    child = os.fork()
    if child == 0:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        for file in (output, errors, status):
            os.close(file)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # it is TMPDIR's
        subprocess.Popen = _Worker
        return [*request["arguments"], *([json.dumps(passed)] if passed else [])]
    for file in (output, errors, *passed):
        os.close(file)
    os.write(status, f"{child}\n".encode())
    _, state = os.waitpid(child, 0)
    os.write(status, f"{os.waitstatus_to_exitcode(state)}\n".encode())
    os._exit(0)


class _Worker(subprocess.Popen):
    """A process that a copy starts: a copy, too, if it is of the command line and threads (of S3's client, say) allow it."""

    _OWN = (sys.executable, "-m", "embedshard.cli")

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        if tuple(args[:3]) != self._OWN or _threads():
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others)
        _, _, _, stdin, to_stdin, from_stdout, stdout, from_stderr, stderr, *_ = others
        assert cwd is None, "nobody asks for it"
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for file, place in ((stdin, 0), (stdout, 1), (stderr, 2)):
                if file != -1:
                    os.dup2(file, place)
            os.closerange(3, 1024)  # also what the others' launcher holds of them
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            _run_to_end(args[1:])
        self._child_created = True
        self._close_pipe_fds(stdin, to_stdin, from_stdout, stdout, from_stderr, stderr)
        return None


def _run_to_end(arguments):
    """Runs, and ends the process: nothing of what it was doing when it was copied is unwound, no folder of it removed."""
    code = 1
    try:
        _run(arguments)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments):
    first, *rest = arguments
    if first == "-m":
        name, *rest = rest
        sys.argv, sys.path[0] = [name, *rest], str(Path.cwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    _requests = socket.socket(fileno=int(sys.argv[1]))
    _import_what_takes_long()
    if (_arguments := _serve(_requests)) is not None:
        try:
            if OWN_CODE in os.environ:
                runpy.run_path(os.environ[OWN_CODE])
            _run(_arguments)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
