"""``PyTorchCheckpoint`` and its type transformer: flytekit's, with checkpoints streamed to and from the object store.

Every name that ``flytekit.extras.pytorch.checkpoint`` documents can be imported from here. Importing this module
registers the transformer.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import msgpack  # type: ignore[import-untyped]  # no stubs exist
from dataclasses_json import DataClassJsonMixin
from flytekit.core.constants import MESSAGEPACK
from flytekit.core.context_manager import FlyteContext, FlyteContextManager
from flytekit.core.type_engine import AsyncTypeTransformer, TypeEngine, TypeTransformer, TypeTransformerFailedError
from flytekit.exceptions.system import FlyteDownloadDataException, FlyteUploadDataException
from flytekit.models.literals import Blob, BlobMetadata, Literal, Scalar
from flytekit.models.types import LiteralType
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]  # flytekit's, without stubs

from torchferry.checkpoint.adapters import message_of, type_name
from torchferry.checkpoint.annotations import only_variant, options_of, without_annotations
from torchferry.checkpoint.content import prepared
from torchferry.checkpoint.deck import deck_of
from torchferry.checkpoint.fields import describes_checkpoint, path_in, register_fields
from torchferry.checkpoint.summary import remember_summary
from torchferry.checkpoint.values import remembered_place
from torchferry.engine.cancellation import in_thread
from torchferry.errors import StorageUnavailableError, TorchferryError
from torchferry.flyte import hooks
from torchferry.flyte.fields import checkpoint_literal
from torchferry.flyte.plugin import taking_over
from torchferry.flyte.transfer import download, upload
from torchferry.flyte.values import FlytekitCheckpoint, IsDataclass, LoadedCheckpoint, PyTorchCheckpoint
from torchferry.options import LoadOptions, SaveOptions

if TYPE_CHECKING:
    from flytekit.models.literals import Binary
    from google.protobuf.struct_pb2 import Struct  # type: ignore[import-untyped]  # flytekit's, without stubs

__all__ = [
    "Any",
    "Blob",
    "BlobMetadata",
    "DataClassJsonMixin",
    "FlyteContext",
    "IsDataclass",
    "Literal",
    "LiteralType",
    "LoadedCheckpoint",
    "NamedTuple",
    "Protocol",
    "PyTorchCheckpoint",
    "PyTorchCheckpointTransformer",
    "Scalar",
    "TypeEngine",
    "TypeTransformer",
    "TypeTransformerFailedError",
    "asdict",
    "dataclass",
    "fields",
    "is_dataclass",
]

_logger = logging.getLogger("torchferry")


class PyTorchCheckpointTransformer(AsyncTypeTransformer[PyTorchCheckpoint]):  # type: ignore[misc]  # flytekit has no types
    """Turns checkpoints into Flyte literals and back.

    The literal is flytekit's own: a single blob of the format ``PyTorchCheckpoint``, whose URI names what
    ``torch.save`` wrote. Either side reads what the other wrote.
    """

    PYTORCH_CHECKPOINT_FORMAT = hooks.CHECKPOINT_FORMAT

    def __init__(self) -> None:
        # flytekit tags union literals with this name: it has to be the one that stock flytekit looks for.
        super().__init__(name="PyTorch Checkpoint", t=PyTorchCheckpoint)

    def assert_type(self, t: type[Any], v: Any) -> None:
        """Checks that ``v`` may stand where ``t`` is declared.

        flytekit's class and ours are one type here, and a checkpoint that was received is of every checkpoint type.

        Raises:
            TypeTransformerFailedError: it may not.
        """
        declared = without_annotations(t)
        if isinstance(v, LoadedCheckpoint):
            return
        accepted = FlytekitCheckpoint if declared is PyTorchCheckpoint else declared
        if not (isinstance(accepted, type) and isinstance(v, accepted)):
            hint = "; make a torchferry.flyte.LoadedCheckpoint of it" if isinstance(v, dict) else ""
            raise TypeTransformerFailedError(f"Expected a {type_name(declared)}, given: a {type_name(type(v))}{hint}.")

    def get_literal_type(self, t: type[Any]) -> LiteralType:
        """The Flyte type of a checkpoint.

        Raises:
            TypeTransformerFailedError: ``t`` is annotated with options that contradict each other.
        """
        options_of(t, SaveOptions)
        options_of(t, LoadOptions)
        return LiteralType(blob=hooks.blob_type())

    def guess_python_type(self, literal_type: LiteralType) -> type[PyTorchCheckpoint]:
        """``PyTorchCheckpoint``, for the literal type of a checkpoint.

        Raises:
            ValueError: it is another type.
        """
        if not hooks.is_checkpoint_type(literal_type):
            raise ValueError(f"{self} cannot reverse {literal_type}: it is no checkpoint's.")
        return PyTorchCheckpoint

    def schema_match(self, schema: dict[str, Any]) -> bool:
        """Whether a part of a dataclass's JSON schema describes a checkpoint: flytekit guesses types by it."""
        return describes_checkpoint(schema)

    async def async_to_literal(
        self,
        ctx: FlyteContext,
        python_val: Any,
        python_type: type[Any],
        expected: LiteralType | None = None,  # noqa: ARG002 - flytekit's signature
    ) -> Literal:
        """Saves a checkpoint under the raw output prefix, and returns the literal that names it.

        ``SaveOptions`` on the annotation say how. ``LoadOptions(weights_only=False)`` on it lets values pass that
        need the same to be loaded; without it, values that could not be loaded again are an error, but the checkpoint
        is stored first, and the error says where.

        Raises:
            TypeTransformerFailedError: this is no checkpoint, or one that cannot be saved, or not to there.
            FlyteUploadDataException: the store is unavailable. Flyte runs the task again for this error, and
                for no other.
        """
        # flytekit's unions call this with any value and hide the error: say no before doing anything.
        if not isinstance(python_val, FlytekitCheckpoint):
            raise TypeTransformerFailedError(f"Expected a PyTorchCheckpoint, given: a {type_name(type(python_val))}.")
        try:
            uri = await self._save(ctx, python_val, python_type)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an exit would end flytekit's event loop, and hang its task
            message = message_of(error).removesuffix(".")  # flytekit adds a full stop
            _logger.warning("%r is not returned: %s.", python_val, message)  # a union hides the error
            if isinstance(error, TypeTransformerFailedError):
                error.args = (message,)
                raise _short(error) from None
            if isinstance(error, StorageUnavailableError):
                raise FlyteUploadDataException(f"The checkpoint could not be uploaded: {message}") from _short(error)
            raise TypeTransformerFailedError(f"{python_val!r} could not be saved: {message}") from _short(error)
        return checkpoint_literal(uri)

    async def async_to_python_value(
        self, ctx: FlyteContext, lv: Literal, expected_python_type: type[Any]
    ) -> LoadedCheckpoint:
        """Loads the checkpoint that a literal names.

        ``LoadOptions`` on the annotation say how; without a ``map_location``, tensors go to the accelerator
        of this process's rank, or stay on the CPU.

        Raises:
            TypeTransformerFailedError: the literal names no checkpoint, or one that cannot be loaded like this.
            FlyteDownloadDataException: the store stayed unavailable through all retries.
        """
        return await self._load(ctx, _uri_of(lv), expected_python_type)

    def to_html(self, ctx: FlyteContext, python_val: Any, expected_python_type: type[Any]) -> str:  # noqa: ARG002 - flytekit's signature
        """Summarizes a checkpoint for the Deck: totals, hyperparameters, tensors, optimizer groups.

        Never raises, because flytekit would fail the task, which has done its work by then.
        """
        return deck_of(python_val)

    def from_binary_idl(self, binary_idl_object: Binary, expected_python_type: type[Any]) -> LoadedCheckpoint:
        """Loads the checkpoint that an attribute of a dataclass or pydantic model names (MessagePack).

        Raises:
            TypeTransformerFailedError: the attribute is no checkpoint, or one that cannot be loaded.
        """
        return self._from_literal(Literal(scalar=Scalar(binary=binary_idl_object)), expected_python_type)

    def from_generic_idl(self, generic: Struct, expected_python_type: type[Any]) -> LoadedCheckpoint:
        """Loads the checkpoint that an attribute names in an input that the Flyte console made (a protobuf Struct).

        Raises:
            TypeTransformerFailedError: the attribute is no checkpoint, or one that cannot be loaded.
        """
        return self._from_literal(Literal(scalar=Scalar(generic=generic)), expected_python_type)

    def _from_literal(self, lv: Literal, expected_python_type: type[Any]) -> LoadedCheckpoint:
        loaded = self.to_python_value(FlyteContextManager.current_context(), lv, expected_python_type)
        return cast("LoadedCheckpoint", loaded)

    async def _save(self, ctx: FlyteContext, checkpoint: Any, python_type: type[Any]) -> str:
        trusted = not options_of(python_type, LoadOptions).weights_only
        ready = await in_thread(partial(prepared, checkpoint, trusted=trusted))
        stored_at = remembered_place(checkpoint)
        options = options_of(python_type, SaveOptions)
        uri, saved = await upload(ctx, ready.content, options, stored_at=stored_at)
        if (error := ready.error(uri)) is not None:
            raise error
        if _shows_decks(ctx):
            await in_thread(remember_summary, checkpoint, ready.content, uri, saved)
        return uri

    async def _load(self, ctx: FlyteContext, uri: str, expected_python_type: type[Any]) -> LoadedCheckpoint:
        options = options_of(expected_python_type, LoadOptions)
        try:
            content = await download(ctx, uri, options)
        except StorageUnavailableError as error:
            _logger.warning("%s is not loaded: %s", uri, error)  # a union hides the error
            raise FlyteDownloadDataException(f"The checkpoint could not be downloaded: {error}") from _short(error)
        except TorchferryError as error:
            _logger.warning("%s is not loaded: %s", uri, error)
            raise TypeTransformerFailedError(str(error)) from _short(error)
        except SystemExit as error:  # of what weights_only=False lets run; as in async_to_literal
            _logger.warning("%s is not loaded: %s", uri, message_of(error))
            raise TypeTransformerFailedError(f"{uri} could not be loaded: {message_of(error)}") from error
        if not isinstance(content, dict):
            raise TypeTransformerFailedError(f"{uri} holds a {type_name(type(content))}, not a checkpoint's dict.")
        return LoadedCheckpoint(content, uri=uri)


def _shows_decks(ctx: FlyteContext) -> bool:
    return bool(ctx.user_space_params is not None and ctx.user_space_params.enable_deck)


def _uri_of(lv: Literal) -> str:
    scalar = lv.scalar if lv is not None else None
    reference: Any = None
    if scalar is not None and scalar.blob is not None:
        return str(scalar.blob.uri)
    if scalar is not None and scalar.binary is not None and scalar.binary.tag == MESSAGEPACK:
        reference = msgpack.unpackb(scalar.binary.value)
    elif scalar is not None and scalar.generic is not None:
        reference = MessageToDict(scalar.generic)
    if (path := path_in(reference)) is not None:
        return path
    raise TypeTransformerFailedError(f"A checkpoint is a blob, or an attribute with a path; this literal is not: {lv}.")


def _short(error: BaseException) -> BaseException:
    """An error of torchferry's without tracebacks, its causes' neither: flytekit prints them all, and they say nothing.

    The log has them at level DEBUG. Any other error is as it was: where a user's own code failed is worth knowing.
    """
    if isinstance(error, TorchferryError):
        _logger.debug("%s", error, exc_info=error)
        seen: list[BaseException | None] = [error]
        for link in seen:
            if link is not None:
                link.__traceback__ = None
                seen += [other for other in (link.__cause__, link.__context__) if other not in seen]
    return error


def _register() -> None:
    kind = FlytekitCheckpoint if taking_over() else PyTorchCheckpoint
    register_fields(kind)
    hooks.leave_alone(kind)
    hooks.bind_whole(LoadedCheckpoint)
    hooks.open_unions(kind, only_variant)
    hooks.number_elements()
    transformer = PyTorchCheckpointTransformer()
    ours = (PyTorchCheckpoint, LoadedCheckpoint)
    if not taking_over():
        hooks.register(transformer, *ours)
        return
    hooks.register(transformer, *ours, FlytekitCheckpoint)
    # Code that imports these from flytekit from now on gets ours; code that did before has flytekit's class, which
    # the transformer takes as well.
    for module in ("flytekit.extras.pytorch.checkpoint", "flytekit.extras.pytorch"):
        hooks.rename(
            module, PyTorchCheckpoint=PyTorchCheckpoint, PyTorchCheckpointTransformer=PyTorchCheckpointTransformer
        )


_register()
