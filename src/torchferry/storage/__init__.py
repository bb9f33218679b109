"""Storage: the backend protocol, the registry that finds backends, and the built-in ones."""

from torchferry.storage.base import MIB, Backend, Chunk, ObjectStat, Plane
from torchferry.storage.registry import open_backend

__all__ = ["MIB", "Backend", "Chunk", "ObjectStat", "Plane", "open_backend"]
