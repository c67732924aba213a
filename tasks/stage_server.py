"""The process that stages' processes are forked from: it imports what they need, once, and no more.

`python -P -m tasks.stage_server DESCRIPTOR ROOM`, started by `stage_processes.py`. Torch,
transformers and scikit-learn take some six seconds to import; a fork takes a twentieth of one.

What makes forking safe here: this process has one Python thread, runs no parallel region and asks
nothing of CUDA. Libraries have threads of their own once they are imported: OpenBLAS a pool (one in
NumPy, one in SciPy) that it ends before a fork and starts anew, on either side, when it is needed;
pyarrow's jemalloc one that gives memory back, which a fork leaves out and jemalloc does without.
"""

import atexit
import ctypes
import gc
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from typing import NoReturn

from training.stages import STAGES

ROOM = " " * 4160
"""Second argument: room for a child's command line, whose directory may have 4,096 bytes."""

LONGEST_REQUEST = 2**16
"""Bytes of a request: module and directory as JSON."""

DESCRIPTORS = 3
"""What comes with a request: output and status of the child, to write to, and where it works."""


@dataclass(frozen=True)
class Job:
    """What a child is forked for: a module below `training`, and the stage's directory."""

    module: str
    directory: str
    output: int
    status: int
    place: int


class Server:
    """Forks a child for every request on a socket, and says on the request's status pipe how it is.

    Two lines: the child's process id, and in the end its exit status, negative for a signal.
    """

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._running: dict[int, int] = {}
        """Status pipe of each child by its process id."""
        self._modules = list(dict.fromkeys(item.module_name for item in STAGES.values()))
        self._woken, self._waker = socket.socketpair()  # by the end of a child
        for end in (self._woken, self._waker):
            end.setblocking(False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A service manager sends them to every process of a group, but those whose stages run
            # here want to hear how these end.
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self._waker.fileno())

    def serve(self) -> Job | None:
        """Serve until whoever asks is gone.

        Returns:
            None then; in a child what it was forked for.
        """
        while True:
            waited = wait([self._requests, self._woken], timeout=0 if self._modules else None)
            if self._woken in waited:
                self._woken.recv(LONGEST_REQUEST)
                self._report_ends()
            if self._requests in waited:
                message, descriptors, _, _ = socket.recv_fds(
                    self._requests, LONGEST_REQUEST, DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
                if not message:
                    return None
                job = Job(*json.loads(message), *descriptors)
                if self._is_child_after_fork(job):
                    return job
            elif self._modules:
                self._import(self._modules[0])

    def _import(self, module: str) -> None:
        self._modules.remove(module)
        with suppress(Exception):  # the stage's own process meets it too, and says so
            import_module(f"training.{module}")

    def _is_child_after_fork(self, job: Job) -> bool:
        if job.module in self._modules:
            self._import(job.module)
        _check_that_forking_is_safe()
        # What is shared is left alone by the children's collector, which would copy its pages.
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            self._leave()
            os.close(job.status)
            return True
        self._running[pid] = job.status
        for descriptor in (job.output, job.place):
            os.close(descriptor)
        _say(job.status, pid)
        return False

    def _leave(self) -> None:
        """Undo in a child what makes this process a server."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for end in (self._requests, self._woken, self._waker):
            end.close()
        for status in self._running.values():
            os.close(status)

    def _report_ends(self) -> None:
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                descriptor = self._running.pop(pid)
                _say(descriptor, os.waitstatus_to_exitcode(status))
                os.close(descriptor)


def main(arguments: Sequence[str]) -> int:
    """Serve the requests that come through a socket, given by its descriptor.

    Returns:
        The exit status.
    """
    requests = socket.socket(fileno=int(arguments[0]))
    requests.set_inheritable(False)
    server = os.getpid()
    job = Server(requests).serve()
    if job is not None:
        _run(job, server)
    return 0


def _run(job: Job, server: int) -> NoReturn:
    """Do what `python -P -m training.<module> DIRECTORY --events --parent SERVER` does, and end."""
    code = 1
    try:
        os.setsid()  # as a group, to be killed with what it has started (see `data_parallel.join`)
        os.fchdir(job.place)
        for number in (1, 2):
            os.dup2(job.output, number)
        for descriptor in (job.output, job.place):
            os.close(descriptor)
        arguments = [job.directory, "--events", "--parent", str(server)]
        _show_as([sys.executable, "-P", "-m", f"training.{job.module}", *arguments])
        module = import_module(f"training.{job.module}")
        from training import runner  # not at the top: whoever imports this file wants no torch

        helping = getattr(module, "helping", None)
        code = runner.main(module.compute, arguments, helping=helping)
    except BaseException:
        traceback.print_exc()
    finally:
        # As an interpreter ends, but for taking apart all that was imported: two seconds.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _check_that_forking_is_safe() -> None:
    """Raise if a child might find a lock held for ever, or a GPU that it cannot use."""
    threads = [thread.name for thread in threading.enumerate()]
    if len(threads) > 1:
        raise RuntimeError(f"Stages are forked from a process of one thread; it has {threads}.")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("Stages are forked from a process that does not use CUDA; it does.")


def _show_as(words: Sequence[str]) -> None:
    """Show a command line of this process to `ps` and the like: in place of the server's own."""
    old = b"\0".join(os.fsencode(word) for word in sys.orig_argv) + b"\0"
    new = b"\0".join(os.fsencode(word) for word in words)[: len(old) - 1].ljust(len(old), b"\0")
    with suppress(ValueError):  # a C library without that name for where the arguments begin
        place = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "program_invocation_name").value
        if place and ctypes.string_at(place, len(old)) == old:
            ctypes.memmove(place, new, len(old))


def _say(status: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(status, f"{number}\n".encode())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
