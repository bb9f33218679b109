"""What is saved, loaded and copied."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch

import torchferry
from reliability.stores import Store

MIB = 1 << 20
OLD = b"what was there before"


def tensors(mib: int) -> list[torch.Tensor]:
    """Random tensors of 4 MiB, which no two calls make alike."""
    return [torch.randint(-(1 << 62), 1 << 62, (MIB >> 1,)) for _ in range(mib // 4)]


def serialized(obj: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def state(data: bytes | None, obj: list[torch.Tensor]) -> str:
    """What stands in the store: "nothing", "old", "new" or "damaged"."""
    if data is None:
        return "nothing"
    if data == OLD:
        return "old"
    return "new" if same(_loaded(data), obj) else "damaged"


def same(found: Any, obj: list[torch.Tensor]) -> bool:
    return isinstance(found, list) and len(found) == len(obj) and all(map(torch.equal, found, obj))


def _loaded(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data))
    except Exception:  # noqa: BLE001 - damaged in any way
        return None


@dataclass(frozen=True)
class Work:
    """A save, a load or a copy of one object.

    Attributes:
        obj: What is saved, loaded or copied.
        target: The key that is written; that is read, by a load.
        start: Does it, asynchronously.
        run: Does it, synchronously. Returns what was loaded, where something was.
    """

    obj: list[torch.Tensor]
    target: str
    start: Callable[[], Awaitable[Any]]
    run: Callable[[], Any]


def work(
    kind: str,
    store: Store,
    options: dict[str, Any],
    key: str,
    obj: list[torch.Tensor],
    give_up_after: float | None = None,
) -> Work:
    """A save, load or copy; what it reads is put in the store."""
    url = store.url(key)
    named: dict[str, Any] = {"give_up_after": give_up_after}
    if kind == "save":
        arguments: tuple[Any, ...] = (obj, url)
        named["storage_options"] = options
        start, run = torchferry.save_async, torchferry.save
    elif kind == "load":
        store.write(key, serialized(obj))
        arguments, named = (url,), {"storage_options": options}
        start, run = torchferry.load_async, torchferry.load  # type: ignore[assignment]
    else:
        store.write(f"source-of-{key}", serialized(obj))
        arguments = (store.url(f"source-of-{key}"), url)
        named |= {"source_storage_options": options, "target_storage_options": options}
        start, run = torchferry.copy_async, torchferry.copy  # type: ignore[assignment]
    return Work(obj, key, lambda: start(*arguments, **named), lambda: run(*arguments, **named))
