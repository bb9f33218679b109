"""What the fork server runs behaves as an interpreter of its own does."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchferry.testing.forkserver import ForkServer, python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*python(), *arguments], capture_output=True, text=True, check=False, timeout=60, **options)


def test_a_program_has_pipes_arguments_directory_and_environment_of_its_own(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.stdin.read(), sys.argv[1:], os.getcwd(), os.environ['A'], file=sys.stderr)"
    done = run("-c", code, "x", "-y", input="in", cwd=tmp_path, env={"A": "é"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"in ['x', '-y'] {tmp_path} é\n")


def test_torch_is_imported_already_and_torchferry_is_not() -> None:
    assert run("-c", "import sys; print('torch' in sys.modules, 'torchferry' in sys.modules)").stdout == "True False\n"


@pytest.mark.parametrize(
    ("code", "status"),
    [("import sys; sys.exit(7)", 7), ("1 / 0", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9)],
)
def test_the_command_ends_as_the_program_does(code: str, status: int) -> None:
    done = run("-c", code)
    assert done.returncode == status
    assert ("ZeroDivisionError" in done.stderr) == (status == 1)


def test_the_interpreter_ends_as_after_any_program() -> None:
    code = "import atexit, threading; atexit.register(print, 'exit'); threading.Timer(0, print, ['thread']).start()"
    assert run("-c", code).stdout == "thread\nexit\n"


def test_a_module_and_a_file_are_run_with_options_for_warnings(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("name = 'beside'")
    (tmp_path / "program.py").write_text("import warnings, beside; print(__name__, beside.name); warnings.warn('w')")
    for arguments in ((str(tmp_path / "program.py"),), ("-m", "program")):
        done = run("-W", "error", "-W", "ignore:other", *arguments, cwd=tmp_path)
        assert done.stdout == "__main__ beside\n"
        assert "UserWarning: w" in done.stderr
        assert done.returncode == 1
        assert run("-W", "ignore", *arguments, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -2), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_a_signal_to_the_command_reaches_the_program(number: signal.Signals, status: int) -> None:
    code = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""
    with subprocess.Popen([*python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        program = os.pidfd_open(int(process.stdout.readline()))
        process.send_signal(number)
        assert process.wait(60) == status
        assert select.select([program], [], [], 60)[0], "it is still there"
        os.close(program)


def test_a_server_imports_what_it_is_told_and_ends_when_it_is_closed() -> None:
    server = ForkServer("json.tool")
    command = [*server.command, "-c", "import sys; print('json.tool' in sys.modules, 'torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True False\n"
    server.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
