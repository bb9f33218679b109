"""Does one thing in a process of its own: one measurement, or writing the files that others will load.

``python -m benchmarks.worker '{"action": ...}'``; the last line of its output is the result, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import formats, works
from benchmarks.contenders import CONTENDERS, Task
from benchmarks.endpoint import Store
from benchmarks.meter import measuring, warm_memory

WARM_UP_SIZE = 64 * works.MIB  # more than one part, for every contender
_WARMED = 3  # times the payload: what the contenders take at most


def main() -> None:
    order = json.loads(sys.argv[1])
    store = Store(**order.pop("store"))
    action = {"measure": measure, "prepare": prepare}[order.pop("action")]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            result = action(store=store, directory=Path(directory), **order)
        except ModuleNotFoundError as error:
            result = {"missing": str(error)}
        except BaseException as error:  # noqa: BLE001 - reported with the results; torch DCP's is no Exception
            result = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # some clients' threads take long to end, or crash then


def prepare(store: Store, directory: Path, work: str, size: int, file_format: str, prefix: str) -> dict[str, Any]:
    """Publishes two checkpoints under ``prefix``: a small one to warm up with, and the one to load."""
    for name, kind, amount in (("warm", "flat", min(size, WARM_UP_SIZE)), ("data", work, size)):
        target = directory / name
        target.mkdir()
        formats.write(file_format, works.make(kind, amount), target)
        for path in target.iterdir():  # so that it is not written to disk in the middle of a measurement
            with path.open("rb") as file:
                os.fsync(file.fileno())
        store.publish(target, f"{prefix}/{name}")
    return {}


def measure(
    store: Store, directory: Path, verb: str, contender: str, work: str, size: int, prefix: str, replaces: bool
) -> dict[str, Any]:
    """Measures one contender once.

    The process does the same with a smaller checkpoint first: connections, caches and lazy imports are there then, as
    in a process that trains. How long that took is ``first_seconds``.
    """
    chosen = CONTENDERS[verb, contender]
    operation: Any = chosen.start(Task(store, directory, work, size))
    if verb == "save":
        checkpoint = works.make(work, size)
        payload = works.nbytes(checkpoint)
        first_seconds = _seconds(operation, works.make("flat", min(size, WARM_UP_SIZE)), f"{prefix}/warm")
        if replaces:
            operation(checkpoint, f"{prefix}/checkpoint")
        works.forget()
        gc.collect()
        os.sync()  # what was written before would keep the disk busy
        with warm_memory(_WARMED * payload):
            pass
        with measuring(store, verb, payload if chosen.remote else 0) as measurement:
            operation(checkpoint, f"{prefix}/checkpoint")
    else:
        payload = _expected_bytes(work, size, chosen.keys)
        warm, data = (formats.key(chosen.format, f"{prefix}/{n}") if chosen.format else "" for n in ("warm", "data"))
        first_seconds = _seconds(operation, warm) if chosen.format else 0.0
        gc.collect()
        with warm_memory(_WARMED * payload, spare=payload):
            store.read_through(prefix)
        with measuring(store, verb, payload if chosen.remote else 0) as measurement:
            loaded = operation(data)
            if not isinstance(loaded, memoryview):
                works.touch(loaded)
        _check(loaded, payload)
    # Now, not when the machine is busy with the next one: what was not yet written to disk never will be.
    shutil.rmtree(directory, ignore_errors=True)
    invalid = measurement.problem(payload) if chosen.remote else None
    return {"payload": payload, "first_seconds": first_seconds, **asdict(measurement), "invalid": invalid}


def _expected_bytes(work: str, size: int, keys: tuple[str, ...] | None) -> int:
    return 3 * size if work == "adam" and keys is None else size


def _check(loaded: Any, payload: int) -> None:
    if not isinstance(loaded, memoryview):
        works.check(loaded, payload)
    elif len(loaded) < payload:  # a bare socket has the file, and does not know what is in it
        raise ValueError(f"{len(loaded)} bytes were loaded of {payload}.")


def _seconds(operation: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    operation(*arguments)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
