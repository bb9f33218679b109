"""The type transformers of Flyte 2: for checkpoints, and for plain modules and tensors.

What they write, flytekit reads, and the other way round: the same blobs, whose URIs name what ``torch.save`` wrote.
Importing this module registers them.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, TypeVar, cast

import cloudpickle  # type: ignore[import-untyped]  # no stubs exist
import flyte.report
import msgpack  # type: ignore[import-untyped]  # no stubs exist
import torch
from flyte.types import TypeTransformer, TypeTransformerFailedError
from flyteidl2.core import literals_pb2, types_pb2
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]  # no stubs exist

from torchferry.checkpoint.adapters import Adapter, register_adapter, type_name
from torchferry.checkpoint.annotations import only_variant, options_of, without_annotations
from torchferry.checkpoint.content import content_of, prepared
from torchferry.checkpoint.deck import deck_of
from torchferry.checkpoint.fields import describes_checkpoint, path_in, register_fields
from torchferry.checkpoint.summary import remember_summary
from torchferry.engine.cancellation import in_thread
from torchferry.engine.loops import run
from torchferry.errors import StorageUnavailableError, TorchferryError, UnsafeCheckpointError
from torchferry.flyte2 import hooks
from torchferry.flyte2.transfer import Stored, download, once, upload
from torchferry.flyte2.values import Flyte2CheckpointValueError, LoadedCheckpoint, PyTorchCheckpoint, flyte_error
from torchferry.formats.torch_pickle import pickle_object
from torchferry.options import LoadOptions, SaveOptions

__all__ = [
    "LoadedCheckpoint",
    "ModuleTransformer",
    "PyTorchCheckpoint",
    "PyTorchCheckpointTransformer",
    "TensorTransformer",
]

T = TypeVar("T")

_TAB = "Checkpoint"

_logger = logging.getLogger("torchferry")


class _BlobTransformer(TypeTransformer[T]):
    """One value, one blob: what the transformers of this module share.

    Attributes:
        FORMAT: The format of the blob, flytekit's name for it.
        FILE_NAME: The last part of the URI.
    """

    FORMAT: ClassVar[str]
    FILE_NAME: ClassVar[str]

    def assert_type(self, t: type[Any], v: Any) -> None:
        """Checks that ``v`` may stand where ``t`` is declared.

        Raises:
            TypeTransformerFailedError: it may not.
        """
        declared = without_annotations(t)
        if not isinstance(v, declared):
            raise TypeTransformerFailedError(f"Expected a {type_name(declared)}, given: a {type_name(type(v))}.")

    def get_literal_type(self, t: type[Any]) -> types_pb2.LiteralType:
        """The Flyte type.

        Raises:
            TypeTransformerFailedError: ``t`` is annotated with options that contradict each other.
        """
        options_of(t, SaveOptions)
        options_of(t, LoadOptions)
        return hooks.blob_type(self.FORMAT, self.name)

    def guess_python_type(self, literal_type: types_pb2.LiteralType) -> type[T]:
        """The python type, for the literal type of a blob of this format; flytekit's, too.

        Raises:
            ValueError: it is another type.
        """
        if not hooks.is_blob_of(literal_type, self.FORMAT):
            raise ValueError(f"{self} cannot reverse {literal_type}.")
        return self.python_type

    async def to_literal(
        self,
        python_val: Any,
        python_type: type[Any],
        expected: types_pb2.LiteralType | None = None,  # noqa: ARG002 - flyte's signature
    ) -> literals_pb2.Literal:
        """Saves a value under the run's raw data path, and returns the literal that names it.

        The literal's hash is made of the CRC32s of what is stored: a cached task is found again by content.
        ``SaveOptions`` on the annotation say how to save.

        Raises:
            TypeTransformerFailedError: this is no such value.
            RuntimeSystemError: the store is unavailable. Flyte runs the task again, on its own account.
            NonRecoverableError: the value cannot be saved like this. Flyte does not run the task again.
            RuntimeUserError: it was not saved for another reason. Flyte runs the task again if it has ``retries``.
        """
        # flyte's unions call this with any value and hide the error: say no before doing anything.
        if not isinstance(python_val, self.python_type):
            raise TypeTransformerFailedError(
                f"Expected a {type_name(self.python_type)}, given: a {type_name(type(python_val))}."
            )
        try:
            options = options_of(python_type, SaveOptions), options_of(python_type, LoadOptions)
            key = (id(python_val), options, hooks.place())
            if hooks.is_thrown_away():
                await self._take_part(python_val)
                return hooks.blob_literal(self.FORMAT, "", None)
            stored = await once(key, lambda: self._save(python_val, *options))
        except (Exception, SystemExit) as error:  # an exit would end flyte's event loop, and its task would hang
            told = flyte_error(error, f"{_short(python_val)} could not be saved")
            hooks.tell_union(told)
            raise told from error
        return hooks.blob_literal(self.FORMAT, stored.uri, stored.fingerprint)

    async def to_python_value(self, lv: literals_pb2.Literal, expected_python_type: type[Any]) -> Any:
        """Loads the value that a literal names.

        ``LoadOptions`` on the annotation say how; without a ``map_location``, tensors go to the accelerator of this
        process's rank, or stay on the CPU.

        Raises:
            TypeTransformerFailedError: the literal names no such value, or one that cannot be loaded like this.
            RuntimeSystemError: the store stayed unavailable through all retries.
        """
        uri = _uri_of(lv)
        try:
            return await self._load(uri, options_of(expected_python_type, LoadOptions))
        except TypeTransformerFailedError as error:
            hooks.tell_union(error)
            raise
        except (TorchferryError, SystemExit) as error:  # an exit is of what weights_only=False lets run
            told: Exception
            if isinstance(error, StorageUnavailableError):
                told = flyte_error(error, f"{uri} could not be loaded")
            else:
                told = TypeTransformerFailedError(f"{uri} could not be loaded: {error or repr(error)}")
            hooks.tell_union(told)
            raise told from error

    async def _take_part(self, value: Any) -> None:
        """What a rank does whose output is thrown away: what the others may wait for."""

    async def _save(self, value: Any, save_options: SaveOptions, load_options: LoadOptions) -> Stored:
        raise NotImplementedError

    async def _load(self, uri: str, options: LoadOptions) -> Any:
        raise NotImplementedError


class PyTorchCheckpointTransformer(_BlobTransformer[PyTorchCheckpoint]):
    """Turns checkpoints into literals of Flyte 2 and back."""

    FORMAT = PYTORCH_CHECKPOINT_FORMAT = hooks.CHECKPOINT_FORMAT
    FILE_NAME = "checkpoint.pt"

    def __init__(self) -> None:
        # Unions tag their literals with this name: it is the one that flytekit looks for, too.
        super().__init__("PyTorch Checkpoint", PyTorchCheckpoint)

    def assert_type(self, t: type[Any], v: Any) -> None:
        """Checks that ``v`` may stand where ``t`` is declared: a checkpoint that was received may everywhere.

        Raises:
            TypeTransformerFailedError: it may not.
        """
        if not isinstance(v, LoadedCheckpoint):
            hint = "; make a torchferry.flyte2.LoadedCheckpoint of it" if isinstance(v, dict) else ""
            declared = without_annotations(t)
            if not isinstance(v, declared):
                raise TypeTransformerFailedError(
                    f"Expected a {type_name(declared)}, given: a {type_name(type(v))}{hint}."
                )

    def schema_match(self, schema: dict[str, Any]) -> bool:
        """Whether a part of a dataclass's JSON schema describes a checkpoint: flyte guesses types by it."""
        return describes_checkpoint(schema)

    def to_html(self, python_val: Any, expected_python_type: type[Any]) -> str:  # noqa: ARG002 - flyte's signature
        """Summarizes a checkpoint for the report. Never raises."""
        return deck_of(python_val)

    def from_binary_idl(
        self, binary_idl_object: literals_pb2.Binary, expected_python_type: type[Any]
    ) -> LoadedCheckpoint:
        """Loads the checkpoint that an attribute of a dataclass or pydantic model names (MessagePack).

        Raises:
            TypeTransformerFailedError: the attribute is no checkpoint, or one that cannot be loaded.
        """
        literal = literals_pb2.Literal(scalar=literals_pb2.Scalar(binary=binary_idl_object))
        return cast("LoadedCheckpoint", run(self.to_python_value, literal, expected_python_type))

    async def _take_part(self, value: Any) -> None:
        await in_thread(content_of, value)  # a state may be gathered from all ranks

    async def _save(self, value: Any, save_options: SaveOptions, load_options: LoadOptions) -> Stored:
        # Values that need it to be loaded pass where the annotation says that they will be.
        ready = await in_thread(partial(prepared, value, trusted=not load_options.weights_only))
        stored = await upload(value, ready.content, save_options, name=self.FILE_NAME)
        if (error := ready.error(stored.uri)) is not None:
            raise error
        await _report(value, ready.content, stored)
        return stored

    async def _load(self, uri: str, options: LoadOptions) -> LoadedCheckpoint:
        def checkpoint_of(content: Any) -> LoadedCheckpoint:
            return LoadedCheckpoint(_checked(content, dict, uri), uri=uri)

        return await download(uri, options, checkpoint_of)


class TensorTransformer(_BlobTransformer[torch.Tensor]):
    """A ``torch.Tensor`` as a value of tasks; loaded with ``weights_only=True``, unless the annotation says no.

    One that needs other classes, as subclasses do, is loaded without where the annotation has no ``LoadOptions``: as
    with everything that Flyte pickles, a task trusts what the tasks before it returned.
    """

    FORMAT = hooks.TENSOR_FORMAT
    FILE_NAME = "tensor.pt"

    def __init__(self) -> None:
        super().__init__("PyTorch Tensor", torch.Tensor)

    async def _save(self, value: Any, save_options: SaveOptions, load_options: LoadOptions) -> Stored:  # noqa: ARG002 - the one signature
        return await upload(value, value, save_options, name=self.FILE_NAME)

    async def _load(self, uri: str, options: LoadOptions) -> Any:
        def tensor_of(value: Any) -> Any:
            return _checked(value, torch.Tensor, uri)

        try:
            return await download(uri, options, tensor_of)
        except UnsafeCheckpointError:
            if options != LoadOptions():
                raise
        return await download(uri, LoadOptions(weights_only=False), tensor_of)


class ModuleTransformer(_BlobTransformer[torch.nn.Module]):
    """A ``torch.nn.Module`` as a value of tasks: the module whole, with its class.

    ``torch.load`` cannot build a module with ``weights_only=True``, so it is loaded without: as with everything that
    Flyte pickles, a task trusts what the tasks before it returned. What pickle finds no class to import for, as in a
    notebook or for a class within a function, cloudpickle stores by value, as Flyte does by itself.
    """

    FORMAT = hooks.MODULE_FORMAT
    FILE_NAME = "module.pt"

    def __init__(self) -> None:
        super().__init__("PyTorch Module", torch.nn.Module)

    async def _save(self, value: Any, save_options: SaveOptions, load_options: LoadOptions) -> Stored:  # noqa: ARG002 - the one signature
        content = await in_thread(_by_value, value)
        return await upload(value, content, save_options, name=self.FILE_NAME)

    async def _load(self, uri: str, options: LoadOptions) -> Any:
        trusting = replace(options, weights_only=False, keys=None, exclude=None)
        return await download(uri, trusting, lambda value: _checked(value, torch.nn.Module, uri))


class _ByValue:
    """Pickled, it becomes what cloudpickle makes of a value: unpickled, the value again."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return cloudpickle.loads, (cloudpickle.dumps(self._value),)


def _by_value(module: torch.nn.Module) -> Any:
    """The module, where pickle takes it; else what pickles it by value, a second time in memory."""
    try:
        pickle_object(module)
    except Exception:  # noqa: BLE001 - what keeps it from being pickled
        return _ByValue(module)
    return module


async def _report(checkpoint: Any, content: dict[str, Any], stored: Stored) -> None:
    """Puts a checkpoint that the task returns into the task's report, in a tab of its own."""
    output, report = hooks.output_name(), hooks.report_of_task()
    if output is None or report is None:
        return
    await in_thread(remember_summary, checkpoint, content, stored.uri, stored.saved)
    report.get_tab(_TAB).log(await in_thread(deck_of, checkpoint))
    try:
        await flyte.report.flush.aio()  # flyte did it before it converted the outputs
    except Exception:  # whatever it is: the checkpoint is saved
        _logger.warning("The report has no summary of %s.", stored.uri, exc_info=True)


def _uri_of(lv: literals_pb2.Literal) -> str:
    reference: Any = None
    if lv.scalar.HasField("blob"):
        return str(lv.scalar.blob.uri)
    if lv.scalar.HasField("binary") and lv.scalar.binary.tag == "msgpack":
        reference = msgpack.unpackb(lv.scalar.binary.value)
    elif lv.scalar.HasField("generic"):
        reference = MessageToDict(lv.scalar.generic)
    if (path := path_in(reference)) is not None:
        return path
    raise TypeTransformerFailedError(f"Expected a blob, or an attribute with a path; this literal is neither: {lv}")


def _checked(value: Any, kind: type[Any], uri: str) -> Any:
    if not isinstance(value, kind):
        raise TypeTransformerFailedError(f"{uri} holds a {type_name(type(value))}, not a {type_name(kind)}.")
    return value


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, PyTorchCheckpoint) else f"A {type_name(type(value))}"


def _save_field(t: Any, checkpoint: Any) -> str:
    literal = run(_checkpoints.to_literal, checkpoint, t)
    return str(literal.scalar.blob.uri)


def _load_field(t: Any, uri: str) -> Any:
    return run(_checkpoints.to_python_value, hooks.blob_literal(hooks.CHECKPOINT_FORMAT, uri, None), t)


_checkpoints = PyTorchCheckpointTransformer()


def _register() -> None:
    register_adapter(Adapter(PyTorchCheckpoint, Flyte2CheckpointValueError, _save_field, _load_field, hooks.in_task))
    register_fields(PyTorchCheckpoint)
    hooks.register(_checkpoints, PyTorchCheckpoint, LoadedCheckpoint)
    hooks.register(TensorTransformer(), torch.Tensor)
    hooks.register(ModuleTransformer(), torch.nn.Module)
    hooks.leave_alone(PyTorchCheckpoint)
    hooks.open_unions(PyTorchCheckpoint, only_variant)
    hooks.open_models()
    hooks.remember_reports()


_register()
