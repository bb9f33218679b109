"""Storage: the backend protocol, the registry that finds backends, and the built-in ones."""

from torchferry.engine.types import MIB, Buffer, Chunk, ObjectStat
from torchferry.engine.writer import Limits, UploadPlan
from torchferry.storage.base import Backend, Leftover, ListedObject
from torchferry.storage.registry import open_backend, open_backend_async

__all__ = [
    "MIB",
    "Backend",
    "Buffer",
    "Chunk",
    "Leftover",
    "Limits",
    "ListedObject",
    "ObjectStat",
    "UploadPlan",
    "open_backend",
    "open_backend_async",
]
