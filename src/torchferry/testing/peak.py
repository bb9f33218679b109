"""Measures the memory that one save takes, in a process of its own (Linux).

``peak_of_save(size, url, ...)`` is what tests call; the module run as a program is that process.
"""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import torchferry
from torchferry.testing.forkserver import python

__all__ = ["peak_of_python", "peak_of_save"]


def peak_of_save(size: int, url: str, **options: Any) -> int:
    """Saves ``size`` bytes of tensors to ``url``, and returns the peak memory over what was taken before, in bytes.

    Args:
        size: Bytes of tensors, in storages of 16 MiB.
        url: Where to.
        options: Of :func:`torchferry.save`; must be picklable.

    Raises:
        subprocess.CalledProcessError: the save failed; its traceback is on standard error.
    """
    request = base64.b64encode(pickle.dumps((size, url, options))).decode()
    program = [*python(), "-m", __name__, request]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True, timeout=200)  # noqa: S603 - our own
    return int(done.stdout)


def peak_of_python(code: str) -> int:
    """Runs ``code`` in a new process, and returns the peak memory between its calls of ``begin()`` and ``end()``.

    Returns:
        The peak over what was taken at ``begin()``, in bytes.

    Raises:
        subprocess.CalledProcessError: it failed; its traceback is on standard error.
    """
    whole = f"from torchferry.testing.peak import begin, end\n{code}"
    done = subprocess.run([*python(), "-c", whole], stdout=subprocess.PIPE, text=True, check=True, timeout=200)  # noqa: S603 - our own
    return int(done.stdout.split()[-1])


_before = 0


def begin() -> None:
    """Starts a measurement in this process."""
    global _before  # noqa: PLW0603 - of the process
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    _before = _status("VmRSS")


def end() -> None:
    """Prints the peak since :func:`begin`."""
    print(_status("VmHWM") - _before)  # noqa: T201 - to the process that asked


def _measure(size: int, url: str, options: dict[str, Any]) -> int:
    torchferry.save([torch.zeros(1 << 20)] * 2, url, **options)  # imports, connections and thread stacks are there
    tensors = [torch.ones(4 << 20) for _ in range(size >> 24)]
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    torchferry.save(tensors, url, **options)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


if __name__ == "__main__":
    print(_measure(*pickle.loads(base64.b64decode(sys.argv[1]))))  # noqa: T201 - to the process that asked
