"""For those who write or test a backend: the conformance suite, real servers, and a fault-injecting proxy.

Only the conformance suite needs pytest and pytest-asyncio (``pip install 'torchferry[test]'``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchferry.testing.conformance import BackendConformance, CloudConformance, StoreUnderTest

__all__ = ["BackendConformance", "CloudConformance", "StoreUnderTest"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torchferry.testing import conformance

    return getattr(conformance, name)
