"""Python interpreters that start in 0.1 s, because torch is imported already: a server forks one for each command.

``subprocess.run([*python(), "-c", code])`` does what ``[sys.executable, "-c", code]`` does, 4 s of processor earlier:
pipes, signals, exit status, working directory and environment are those of an interpreter of its own. torchferry is
imported by the program itself, unless a server was told otherwise. What cannot be tested this way is the order of
imports, options of the interpreter other than ``-W``, and what a process holds in all (what it takes beside its
beginning can be).

The server (``serve``) forks a keeper for each command, which forks the program, passes signals on and reports how it
ended. The command itself (``ask``) is a small process in between, so that callers have one that they know how to treat:
where it is killed, the program is killed.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module

__all__ = ["ForkServer", "python"]

_OURS = "TORCHFERRY_FORK_SERVER"  # in the environment of what a server has forked: its address
_PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class ForkServer:
    """A process that has imported ``modules``, and is forked for each command. Linux only.

    Args:
        modules: None may start a thread when it is imported.
        environment: For the imports; this process's by default.

    Attributes:
        command: Stands for the path of an interpreter: ``[*server.command, "-m", "module", "argument"]``.
    """

    def __init__(self, *modules: str, environment: dict[str, str] | None = None) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # the system chooses a name that is in no directory
            listener.listen()
            address: bytes = listener.getsockname()
            server = [sys.executable, __file__, "serve", str(listener.fileno()), *modules]
            descriptors = [listener.fileno()]
            self._process = subprocess.Popen(server, env=environment, stdin=subprocess.PIPE, pass_fds=descriptors)  # noqa: S603 - our own
        self.command = _command(address.hex())

    def close(self) -> None:
        """Ends the server; it also ends where this process does."""
        self._process.communicate()


def _command(address: str) -> list[str]:
    return [sys.executable, "-IS", __file__, "ask", address]


@cache
def python() -> list[str]:
    """The head of a command that runs Python with torch and s3fs already imported.

    In a program that a server has forked, this server does it.
    """
    if sys.platform != "linux":
        return [sys.executable]
    if address := os.environ.get(_OURS):
        return _command(address)
    server = ForkServer("torch", "s3fs")
    atexit.register(server.close)
    return server.command


def serve(listener: socket.socket, modules: list[str]) -> None:
    """Imports; then forks for each command, until standard input ends. Returns in a program, to run it."""
    for name in modules:
        import_module(name)
    gc.collect()
    gc.freeze()  # a program then need not look through what is imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    while listener.fileno() in select.select([listener.fileno(), 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _keep(connection)
        connection.close()
    return None


def _keep(connection: socket.socket) -> None:
    """Forks a program and says how it ended; returns in the program."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    order = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        return _become(descriptors, **order)
    for descriptor in (0, 1, 2, *descriptors):
        os.close(descriptor)
    ended = os.pidfd_open(pid)
    while ended not in select.select([connection.fileno(), ended], [], [])[0]:
        number = connection.recv(1)
        os.kill(pid, number[0] if number else signal.SIGKILL)
        if not number:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):  # nobody asks any more
        connection.send(str(status).encode())
    os._exit(0)


def _become(descriptors: list[int], arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Runs what an interpreter would run with these arguments, in this process, which has been forked for it."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    while arguments[0] == "-W":
        warnings.filterwarnings(*arguments[1].split(":", 1))  # type: ignore[arg-type]  # an action, and a message
        del arguments[:2]
    if arguments[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)  # noqa: S102 - what was asked for
    elif arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], cwd
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))  # noqa: PTH100, PTH120
        runpy.run_path(arguments[0], run_name="__main__")


def ask(address: bytes, arguments: list[str]) -> int:
    """Has a server run a program on this process's pipes, and returns its exit status, negative for a signal."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        environment = os.environ | {_OURS: address.hex()}
        order = {"arguments": arguments, "cwd": os.getcwd(), "environment": environment}  # noqa: PTH109
        data = json.dumps(order).encode()
        socket.send_fds(connection, [len(data).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(data)
        for number in _PASSED_ON:
            signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
        return int(connection.recv(16))


def main() -> None:
    """``forkserver.py serve DESCRIPTOR MODULE...`` and ``forkserver.py ask ADDRESS ARGUMENT...``."""
    _, what, where, *arguments = sys.argv
    if what == "serve":
        serve(socket.socket(fileno=int(where)), arguments)
        return  # also in a program, whose interpreter ends as after any other
    status = ask(bytes.fromhex(where), arguments)
    if status < 0:
        with suppress(OSError):  # of SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
