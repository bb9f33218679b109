"""Starts Python programs in milliseconds, in processes that have their imports behind them.

``python zygote.py MODULE...`` imports the modules, and then forks a process for each line of its standard input.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Self


class Zygote:
    """A process that has imported ``modules``, and is forked for each program.

    Args:
        modules: None may start a thread when it is imported.
        environment: For the import.
    """

    def __init__(self, *modules: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(
        self, program: str, *arguments: str, cwd: Path, env: dict[str, str], output: Path
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program, a file or a module, to its end; all that it prints is in ``output``."""
        order = {"program": program, "arguments": arguments, "cwd": str(cwd), "env": env, "output": str(output)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        said = output.read_text()
        return subprocess.CompletedProcess([program, *arguments], status, said, said)


def _become(order: dict[str, Any]) -> None:
    """Runs a program in this process, which has been forked for it."""
    here = os.open(os.devnull, os.O_RDONLY)
    there = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, descriptor in enumerate((here, there, there)):
        os.dup2(descriptor, number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    program = order["program"]
    sys.argv = [program, *order["arguments"]]
    sys.path[0] = order["cwd"]
    if os.sep in program:
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def main() -> None:
    """Imports, forks and tells how each process has ended."""
    for name in sys.argv[1:]:
        import_module(name)
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            _become(json.loads(line))
            return  # and the interpreter ends as after any program
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
