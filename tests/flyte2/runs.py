"""Runs tasks of Flyte 2 on this machine, with their raw data on S3."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flyte
import flyte.storage

from torchferry.testing.servers import S3Server

__all__ = ["Runs", "init"]


@dataclass(frozen=True)
class Runs:
    """Runs tasks on this machine.

    Attributes:
        prefix: The raw data path of each.
        metadata: Where what else flyte keeps of each lies.
        fs: An s3fs filesystem, to look at what is stored.
    """

    prefix: str
    metadata: Path
    fs: Any

    def __call__(self, task: Any, **inputs: Any) -> Any:
        """The outputs of a run: one, or a tuple."""
        context = flyte.with_runcontext(mode="local", raw_data_path=self.prefix)
        context._metadata_path = str(self.metadata)
        outputs = tuple(context.run(task, **inputs).outputs())
        return outputs[0] if len(outputs) == 1 else outputs

    def stored(self) -> list[str]:
        """Every object under the raw data path."""
        self.fs.invalidate_cache()
        return sorted(self.fs.find(self.prefix))


def init(server: S3Server, endpoint: str) -> None:
    """Tells flyte of a server, which may be behind a proxy at ``endpoint``."""
    s3 = flyte.storage.S3(
        endpoint=endpoint, access_key_id=server.key, secret_access_key=server.secret, region=server.region
    )
    flyte.init(storage=s3)
