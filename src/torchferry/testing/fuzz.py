"""Damages real checkpoints of every format, and tells what becomes of them.

``python -m torchferry.testing.fuzz 20000`` prints that as JSON. Each mutant is loaded, and some are inspected, some
verified, copied, converted, shown in the Deck or by the command. That gives the right object or one of torchferry's
errors; everything else is counted as what it is. All runs in this process: if a mutant ends it, its number is the last
one on standard error.
"""

from __future__ import annotations

import argparse
import collections
import gc
import io
import itertools
import json
import random
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config

import torchferry
from torchferry.testing.hostile import UNWANTED as _UNWANTED
from torchferry.testing.hostile import acts, taken

__all__ = ["UNWANTED", "Mutant", "Originals", "mutants", "run"]

_UNCHECKED = {"legacy", "without CRC32s", "safetensors"}  # formats without CRC32s: values may have changed
_SHARE = 4

UNWANTED = ("wrong", *_UNWANTED)
"""What no mutant may be, in the report of :func:`run`."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A damaged checkpoint.

    Attributes:
        number: Of it, for this seed.
        kind: Its format, and what was done to it.
        data: Its bytes.
        original: The object that was saved; None where the mutant may be another one that is as good.
        options: For ``torchferry.load``.
    """

    number: int
    kind: str
    data: bytes
    original: Any
    options: dict[str, Any]


class Originals:
    """Small checkpoints of every format: names, objects and bytes."""

    def __init__(self) -> None:
        self._made: list[tuple[str, Any, bytes, bool]] = []  # with whether weights_only=True loads it
        with warnings.catch_warnings(action="ignore"):  # deprecated kinds of tensors, but in files
            self._make()

    def __iter__(self) -> Iterator[tuple[str, Any, bytes, bool]]:
        return iter(self._made)

    def _make(self) -> None:
        model = torch.nn.Linear(3, 4)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        state = {"m": model.state_dict(), "o": optimizer.state_dict(), "lr": 0.1, "none": torch.empty(0)}
        kinds = {
            "m": {
                "quantized": torch.quantize_per_tensor(torch.arange(5.0), 0.5, 1, torch.quint8),
                "sparse": torch.eye(3).to_sparse(),
                "csr": torch.eye(3).to_sparse_csr(),
                "meta": torch.empty(3, 4, device="meta"),
                "parameter": torch.nn.Parameter(torch.ones(2)),
                "storage": torch.arange(4, dtype=torch.uint8).untyped_storage(),
                "values": [(1, "a", b"b", {2, 3}, 1j, None, True, torch.float32, torch.Size([1, 2])), bytearray(b"c")],
                "counter": collections.Counter("abca"),
                ("tuple", 1): torch.ones(2, dtype=torch.bfloat16).t(),
            }
        }
        plain = _saved(state)
        self._add("zip", state, plain)
        self._add("kinds", kinds, _saved(kinds))
        self._add("protocol 4", state, _saved(state, pickle_protocol=4), weights_only=False)
        self._add("legacy", state, _saved(state, _use_new_zipfile_serialization=False))
        self._add("other tool", state, _repacked(plain))
        config.save.storage_alignment = 128
        self._add("alignment 128", state, _saved(state))
        config.save.storage_alignment = 64
        torch.serialization.set_crc32_options(False)
        self._add("without CRC32s", state, _saved(state))
        torch.serialization.set_crc32_options(True)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(model), file)
        tensors = {"m": torch.arange(6.0).reshape(2, 3), "n": torch.ones(5, dtype=torch.bfloat16)}
        self._made.append(("safetensors", tensors, _safetensors(), True))
        self._add("TorchScript", None, file.getvalue(), weights_only=False)

    def _add(self, name: str, obj: Any, data: bytes, *, weights_only: bool = True) -> None:
        if obj is not None:
            obj = torch.load(io.BytesIO(data), weights_only=weights_only)
        self._made.append((name, obj, data, weights_only))


def mutants(seed: int = 0, originals: Originals | None = None) -> Iterator[Mutant]:
    """Mutants of all originals in turn, without end; the same for the same seed."""
    generator = random.Random(seed)  # noqa: S311 - no secret
    all_originals = list(originals or Originals())
    for number in itertools.count():
        name, obj, data, weights_only = all_originals[number % len(all_originals)]
        change = generator.choice(_CHANGES)
        options: dict[str, Any] = {"weights_only": weights_only, "verify": generator.random() < 0.5}
        if obj is not None and generator.random() < 0.3:
            options["keys"] = ("m",)
        if generator.random() < 0.1 and name != "kinds":
            options["map_location"] = "meta"
        mutant = change(generator, data)
        is_same = options["verify"] and change is not _with_other_pickle and name not in _UNCHECKED
        known = None if not is_same or "map_location" in options or obj is None else obj
        yield Mutant(number, f"{name}, {change.__name__.strip('_').replace('_', ' ')}", mutant, known, options)


def run(
    count: int,
    seed: int = 0,
    start: int = 0,
    *,
    share: int = _SHARE,
    put: Callable[[str, bytes], str] | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Tries so many mutants: each is loaded, and gets some of the other entry points, in turn.

    These are :func:`torchferry.testing.hostile.acts`.

    Args:
        count: How many.
        seed: Of all mutants.
        start: The number of the first.
        share: Of the other entry points, each gets one of so many.
        put: Stores a file under a name, and returns its URL; by default, in a directory of this machine.
        options: The storage options of these URLs.
        say: Called with the number of each before it is tried.

    Returns:
        How many were ``tried``; of how many the load was ``right``, a ``clear error``, or an error of the classes that
        they name (``own error``, with ``weights_only=False`` alone); which were ``wrong``, or ended in something else
        that is :data:`UNWANTED`; and the ``slowest`` try's seconds of CPU time.
    """
    report: dict[str, Any] = {"tried": 0, "right": 0, "clear error": 0, "own error": 0, "slowest": 0.0}
    report |= {kind: [] for kind in UNWANTED}
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings(action="ignore"):
        path = Path(directory, "x.pt")

        def store(data: bytes) -> str:
            if put is not None:
                return put("x.pt", data)
            path.write_bytes(data)
            return str(path)

        originals = Originals()
        _, _, first, _ = next(iter(originals))
        torchferry.load(store(first), storage_options=options)  # what is imported and connected takes no mutant's time
        gc.collect()
        gc.freeze()  # nor do the collector's passes through it
        try:
            for mutant in itertools.islice(mutants(seed, originals), start, start + count):
                say(str(mutant.number))
                url = store(mutant.data)
                target = str(Path(directory, "y.pt")) if put is None else f"{url}.copy"
                _try(mutant, url, target, options or {}, share, report)
        finally:
            gc.unfreeze()
    return report


def _try(mutant: Mutant, url: str, target: str, options: Mapping[str, Any], share: int, report: dict[str, Any]) -> None:
    report["tried"] += 1
    loaded: list[Any] = []
    own = ""

    def load() -> None:
        nonlocal own
        try:
            loaded.append(torchferry.load(url, **mutant.options, storage_options=options))
        except torchferry.TorchferryError:
            raise
        except (ImportError, AttributeError, TypeError) as error:
            if mutant.options["weights_only"]:
                raise
            own = type(error).__name__

    others = [(name, act) for name, act in acts(url, target, options).items() if not name.startswith("load")]
    tried = {"the load": load} | dict(others[mutant.number % share :: share])
    for name, act in tried.items():
        result = taken(act, len(mutant.data))
        report["slowest"] = max(report["slowest"], result.seconds)
        if result.outcome in UNWANTED:
            report[result.outcome].append((mutant.number, f"{mutant.kind}, {name}", result.detail))
        elif act is load and own:
            report["own error"] += 1
        elif act is load and loaded and not _is_right(mutant, loaded[0]):
            report["wrong"].append((mutant.number, mutant.kind, ""))
        elif act is load:
            report[result.outcome] += 1


def _is_right(mutant: Mutant, loaded: Any) -> bool:
    expected = mutant.original
    if expected is not None and "keys" in mutant.options:
        expected = {"m": expected["m"]}
    return expected is None or _saved(loaded) == _saved(expected)


def _saved(obj: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, **options)
    return file.getvalue()


def _safetensors() -> bytes:
    """The tensors of the original of that format, as its library writes them."""
    header = {
        "n": {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]},
        "m": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<6f", *range(6)) + b"\x80\x3f" * 5


def _repacked(data: bytes) -> bytes:
    """The same records as another zip tool writes them."""
    source, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in source.namelist():
            archive.writestr(zipfile.ZipInfo(name), source.read(name))
    return file.getvalue()


# Ways to damage a file


def _flipped(generator: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _overwritten(generator: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        at = generator.randrange(len(data) - 8)
        changed[at : at + 8] = generator.choice([bytes(8), b"\xff" * 8, generator.randbytes(8)])
    return bytes(changed)


def _overwritten_directory(generator: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    start = max(data.find(b"PK\1\2"), 0)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(start, len(data) - 4)
        size = generator.choice((1, 2, 4))
        number = generator.choice((0, 1, 64, 1 << 8, (1 << 8 * size) - 1, generator.randrange(1 << 8 * size)))
        changed[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(changed)


def _cut(generator: random.Random, data: bytes) -> bytes:
    return data[: generator.randrange(len(data))]


def _without_a_piece(generator: random.Random, data: bytes) -> bytes:
    at = generator.randrange(len(data))
    return data[:at] + data[at + generator.choice((1, 8, 64, 512)) :]


def _with_a_piece_more(generator: random.Random, data: bytes) -> bytes:
    at, size = generator.randrange(len(data)), generator.choice((1, 8, 64, 512))
    return data[:at] + generator.choice((bytes(size), data[at : at + size])) + data[at:]


def _with_other_pickle(generator: random.Random, data: bytes) -> bytes:
    """Its pickle changed, with the CRC32 of that: a file that is whole, but that torch would not write."""
    if not data.startswith(b"PK"):
        return _overwritten(generator, data)
    source, file = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    writer = torch._C.PyTorchFileWriter(file)  # noqa: SLF001 - there is no other writer of such files
    for info in source.infolist():
        del info.CRC  # so that it is not checked: there may be none
        record, content = info.filename.partition("/")[2], source.read(info)
        if record in {"version", ".data/serialization_id"}:  # the writer adds its own
            continue
        if record == "data.pkl":
            content = _changed_pickle(generator, content)
        writer.write_record(record, content, len(content))
    writer.write_end_of_file()
    return file.getvalue()


def _changed_pickle(generator: random.Random, pickled: bytes) -> bytes:
    changed = bytearray(pickled)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(2, len(changed) - 1)
        way = generator.randrange(4)
        if way == 0:
            changed[at] = generator.choice(_OPCODES)
        elif way == 1:
            changed[at : at + generator.choice((1, 2, 5))] = b""
        elif way == 2:
            changed[at:at] = generator.choice(_PIECES)
        else:
            changed[at] = generator.randrange(256)
    return bytes(changed)


_OPCODES = b"(.012FIJKLMNPQRSTUVXabcdeghijloptqrsu})]GBC" + bytes(range(0x80, 0x99))
_PIECES = (
    b"r\xff\xff\xff\x07", b"2", b"0", b"2\x86", b"\x85", b"]", b"}", b"J\xff\xff\xff\xff",
    b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00",
    b"X\x04\x00\x00\x00\xed\xa0\x80a", b"(", b"t", b"N", b"K\x05", b"G\x7f\xf8\0\0\0\0\0\0", b"cbuiltins\nbytearray\n",
    b"c__builtin__\nset\n", b"R", b"h\x00", b"h\x05", b"ctorch\nFloatTensor\n", b"X\x03\0\0\0abc",
)  # fmt: skip
_CHANGES = (
    _flipped, _overwritten, _overwritten_directory, _cut, _without_a_piece, _with_a_piece_more,
    _with_other_pickle, _with_other_pickle,
)  # fmt: skip


def main() -> None:
    """Prints the report of a run as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--share", type=int, default=_SHARE)
    arguments = parser.parse_args()

    def say(number: str) -> None:
        print(number, file=sys.stderr, flush=True)  # noqa: T201 - for who finds the process dead

    report = run(arguments.count, arguments.seed, arguments.start, share=arguments.share, say=say)
    print(json.dumps(report, indent=1))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
