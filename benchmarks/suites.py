"""What there is to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.contenders import CONTENDERS
from benchmarks.contenders.ferry import OTHER, OTHER_CHECKOUT
from benchmarks.contenders.floors import SOCKETS
from benchmarks.contenders.integrations import LIGHTNING, LIGHTNING_FERRY
from benchmarks.works import GIB, MIB, SMALL_TENSOR

VERBS = ("save", "load")
FERRY = "torchferry"
OTHERS = (OTHER,) if OTHER_CHECKOUT else ()
FERRY_MODULE = "torchferry (module only)"
FLYTEKIT = "flytekit"
FERRY_SAFETENSORS = "torchferry (safetensors)"
SAFETENSORS = "safetensors + s3fs"
RUNAI = "runai-model-streamer"
TO_FILE = {"save": "torch.save to a local file", "load": "torch.load of a local file"}
FERRY_FILE = {"save": "torchferry to a file", "load": "torchferry from a file"}
TORCH_FILE = {"save": "torch.save + fsync", "load": "torch.load"}
FILE = "file"  # the scheme of what goes to the local disk
OBSTORE = {"save": "obstore open_writer", "load": "obstore open_reader"}
BOTO3 = {"save": "boto3 upload_file", "load": "boto3 download_file"}
INTO_NOTHING = "torch.save into nothing"


def sockets(*counts: int) -> tuple[str, ...]:
    return tuple(f"bare sockets x{count}" for count in counts)


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders that do the same thing in one run, so that their times can be compared.

    Attributes:
        suite: The suite it belongs to.
        verb: "save" or "load".
        work: See works.py.
        size: Bytes of the module's tensors.
        contenders: Their names, in the order of the table.
        scheme: "http" or "https"; FILE where there is no endpoint but the local disk.
        shaped: Whether the endpoint behaves like a distant store.
        replaces: Whether a save replaces an object of the same size.
    """

    suite: str
    verb: str
    work: str
    size: int
    contenders: tuple[str, ...]
    scheme: str = "http"
    shaped: bool = False
    replaces: bool = False

    @property
    def id(self) -> str:
        """Names it in the results."""
        return f"{self.suite}-{self.verb}-{self.size // MIB}MiB-{self.scheme}"


def _one_verb(verb: str) -> Callable[[], Iterator[Case]]:
    """1 GiB: everyone."""

    def cases() -> Iterator[Case]:
        everyone = tuple(name for of_verb, name in CONTENDERS if of_verb == verb)
        ours = {FERRY_MODULE, FERRY_SAFETENSORS, SAFETENSORS, TO_FILE[verb], LIGHTNING, LIGHTNING_FERRY}
        others = {*ours, *_on_disk(verb)}
        yield Case(verb, verb, "flat", GIB, tuple(n for n in everyone if n not in others))

    return cases


def _safetensors() -> Iterator[Case]:
    """1 GiB in the safetensors format, and the same of torch.save."""
    yield Case("safetensors", "save", "flat", GIB, (FERRY_SAFETENSORS, FERRY, SAFETENSORS))
    yield Case("safetensors", "load", "flat", GIB, (FERRY_SAFETENSORS, FERRY, SAFETENSORS, RUNAI))


def _adam() -> Iterator[Case]:
    """Module and optimizer, three times 1 GiB: all of it, or the module alone."""
    yield Case("adam", "load", "adam", GIB, (FERRY, FERRY_MODULE, FLYTEKIT))


def _small() -> Iterator[Case]:
    """100,000 tensors of 4 KiB, against a local file."""
    for verb in VERBS:
        yield Case("small", verb, "small", 100_000 * SMALL_TENSOR, (FERRY, *OTHERS, FLYTEKIT, TO_FILE[verb]))


def _tiny() -> Iterator[Case]:
    """16 MiB."""
    for verb in VERBS:
        peers = (FLYTEKIT, "fsspec.open", OBSTORE[verb], "s3torchconnector", BOTO3[verb])
        yield Case("tiny", verb, "flat", 16 * MIB, (FERRY, *OTHERS, *peers))


def _growth() -> Iterator[Case]:
    """64 MiB to 8 GiB: do time and memory grow with the size, and no faster?"""
    for verb in VERBS:
        for size in (64 * MIB, 256 * MIB, GIB, 2 * GIB, 4 * GIB, 8 * GIB):
            yield Case("growth", verb, "flat", size, (FERRY, *OTHERS))


def _shaped() -> Iterator[Case]:
    """1 GiB over a link like that to S3: 30 ms to each answer, 90 MB/s over each connection."""
    for verb in VERBS:
        peers = (FLYTEKIT, OBSTORE[verb], "s3torchconnector")
        yield Case("shaped", verb, "flat", GIB, (FERRY, *OTHERS, *peers, *sockets(1, *SOCKETS[-1:])), shaped=True)


def _https() -> Iterator[Case]:
    """1 GiB over https."""
    for verb in VERBS:
        (case,) = _one_verb(verb)()
        yield replace(case, suite="https", scheme="https")


def _disk() -> Iterator[Case]:
    """1 GiB on the local disk: a new file, one in place of another, and loading from the page cache."""
    for verb in VERBS:
        yield Case("disk", verb, "flat", GIB, _on_disk(verb), scheme=FILE)
    yield Case("disk-replace", "save", "flat", GIB, _on_disk("save"), scheme=FILE, replaces=True)


def _on_disk(verb: str) -> tuple[str, ...]:
    other = (f"{FERRY_FILE[verb]}, other checkout",) if OTHER_CHECKOUT else ()
    return (FERRY_FILE[verb], *other, TORCH_FILE[verb])


def _integrations() -> Iterator[Case]:
    """512 MiB by Lightning's Trainer, with its own CheckpointIO and with torchferry's."""
    for verb in VERBS:
        yield Case("integrations", verb, "flat", 512 * MIB, (LIGHTNING_FERRY, LIGHTNING))


SUITES: dict[str, Callable[[], Iterator[Case]]] = {
    "save": _one_verb("save"),
    "load": _one_verb("load"),
    "safetensors": _safetensors,
    "adam": _adam,
    "small": _small,
    "tiny": _tiny,
    "growth": _growth,
    "shaped": _shaped,
    "https": _https,
    "disk": _disk,
    "integrations": _integrations,
}


def smoke_cases(size: int = 24 * MIB) -> Iterator[Case]:
    """Small sizes, and everyone: shows that the benchmark works, and says nothing of speed."""
    for verb in VERBS:
        (case,) = _one_verb(verb)()
        everyone = tuple(name for name in case.contenders if name not in sockets(*SOCKETS[1:]))
        yield replace(case, suite="smoke", size=size, contenders=(*everyone, TO_FILE[verb]))
    (adam,) = _adam()
    yield replace(adam, suite="smoke-adam", size=size, contenders=(FERRY_MODULE,))
    for case in _disk():
        yield replace(case, suite=f"smoke-{case.suite}", size=size)


def is_remote(name: str) -> bool:
    """Whether a contender of that name goes over the network."""
    return all(contender.remote for (_, of), contender in CONTENDERS.items() if of == name)
