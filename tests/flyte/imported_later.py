"""Imports what flytekit, torchferry and torch are made of; what flytekit looks for then waits to be imported.

A fork server has imported this module. In its programs ``torch`` is not among ``sys.modules``, and ``import torch``
takes no time, wherever it stands: the module is there. So with numpy, pyarrow and pandas, which torch imports.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

VISIBLE = (
    "aiohttp", "cachetools", "croniter", "dataclasses_json", "docker.utils.build", "docstring_parser",
    "flyteidl.admin.agent_pb2", "flyteidl.core.dynamic_job_pb2", "flyteidl.plugins.array_job_pb2",
    "flyteidl.service.admin_pb2_grpc", "flyteidl.service.auth_pb2_grpc", "flyteidl.service.dataproxy_pb2_grpc",
    "flyteidl.service.signal_pb2_grpc", "fsspec.implementations.http", "google.protobuf.json_format",
    "grpc_status", "joblib", "jsonlines", "keyring", "markdown_it", "mashumaro.codecs.json",
    "mashumaro.codecs.msgpack", "mashumaro.jsonschema", "mashumaro.mixins.json", "msgpack", "pydantic.main",
    "pygments", "pythonjsonlogger", "requests", "rich.logging", "rich.progress", "rich.traceback", "rich.tree",
    "rich_click", "s3fs", "statsd", "yaml",
)  # fmt: skip
HIDDEN = ("numpy", "pyarrow", "pandas", "torch")  # each imports those before it
HIDDEN = tuple(filter(find_spec, HIDDEN))  # flytekit needs neither pyarrow nor pandas


class Later(MetaPathFinder, Loader):
    """Takes modules out of ``sys.modules``, and puts them back when the first of them is imported."""

    def __init__(self, package: str) -> None:
        self._package = package
        names = [name for name in sys.modules if name.split(".", 1)[0] == package]
        self._modules = {name: sys.modules.pop(name) for name in names}
        self._specs = {name: module.__spec__ for name, module in self._modules.items() if hasattr(module, "__spec__")}

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds the modules that wait, by their names; a package is imported before what is in it."""
        spec = self._specs.get(fullname)
        if spec is None or fullname in sys.modules:
            return None
        found = ModuleSpec(fullname, self, origin=spec.origin)
        found.submodule_search_locations = spec.submodule_search_locations
        return found

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module as it is."""
        return self._modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Puts everything back that this import would have imported."""
        for package in HIDDEN[: HIDDEN.index(self._package) + 1]:
            if finder := next((f for f in sys.meta_path if isinstance(f, Later) and f._package == package), None):
                sys.meta_path.remove(finder)
                sys.modules.update(finder._modules)
        module.__spec__ = self._specs[module.__name__]


for _name in (*VISIBLE, *HIDDEN):
    import_module(_name)
for _name in HIDDEN:
    sys.meta_path.insert(0, Later(_name))
