"""What a user would take instead of torchferry, each used as its documentation shows, with its default settings.

A library is imported in the function that needs it: one that is missing or broken is that contender's error alone.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.contenders import Load, Save, Task, loader, saver

if TYPE_CHECKING:
    from flytekit.core.context_manager import FlyteContext


# --- flytekit's stock transformer ---


def _flyte_context(task: Task) -> FlyteContext:
    """As in a pod: the raw output prefix is the endpoint, the sandbox is a local directory.

    flytekit as it is where torchferry is not installed: `import flytekit` would load torchferry's plugin.
    """
    sys.modules["torchferry.flyte.plugin"] = SimpleNamespace(install=lambda: None)  # type: ignore[assignment]
    from flytekit.configuration import DataConfig, S3Config
    from flytekit.core.context_manager import FlyteContextManager
    from flytekit.core.data_persistence import FileAccessProvider

    store = task.store
    s3 = S3Config(endpoint=store.url, access_key_id=store.key, secret_access_key=store.secret)
    access = FileAccessProvider(str(task.directory), f"s3://{store.bucket}/flytekit", DataConfig(s3=s3))
    return FlyteContextManager.current_context().new_builder().with_file_access(access).build()


@saver("flytekit")
def flytekit_save(task: Task) -> Save:
    context = _flyte_context(task)
    from flytekit.extras.pytorch.checkpoint import PyTorchCheckpoint, PyTorchCheckpointTransformer

    transformer = PyTorchCheckpointTransformer()
    literal_type = transformer.get_literal_type(PyTorchCheckpoint)

    def save(checkpoint: dict[str, Any], _key: str) -> object:
        # Hyperparameters are stored at the top level, as they are: the same bytes as everyone's.
        value = PyTorchCheckpoint(hyperparameters=checkpoint)
        return transformer.to_literal(context, value, PyTorchCheckpoint, literal_type)

    return save


@loader("flytekit")
def flytekit_load(task: Task) -> Load:
    context = _flyte_context(task)
    from flytekit.extras.pytorch.checkpoint import PyTorchCheckpoint, PyTorchCheckpointTransformer
    from flytekit.models.literals import Blob, BlobMetadata, Literal, Scalar

    transformer = PyTorchCheckpointTransformer()
    metadata = BlobMetadata(type=transformer.get_literal_type(PyTorchCheckpoint).blob)

    def load(key: str) -> Any:
        literal = Literal(scalar=Scalar(blob=Blob(metadata=metadata, uri=f"s3://{task.store.bucket}/{key}")))
        return transformer.to_python_value(context, literal, PyTorchCheckpoint)

    return load


# --- file objects ---


@saver("fsspec.open")
def fsspec_save(task: Task) -> Save:
    import fsspec
    import s3fs  # noqa: F401

    def save(checkpoint: dict[str, Any], key: str) -> None:
        with fsspec.open(f"s3://{task.store.bucket}/{key}", "wb", **task.store.storage_options) as file:
            torch.save(checkpoint, file)

    return save


@loader("fsspec.open")
def fsspec_load(task: Task) -> Load:
    import fsspec
    import s3fs  # noqa: F401

    def load(key: str) -> Any:
        with fsspec.open(f"s3://{task.store.bucket}/{key}", "rb", **task.store.storage_options) as file:
            return torch.load(file)

    return load


def _obstore(task: Task) -> Any:
    from obstore.store import S3Store

    store = task.store
    options: dict[str, Any] = {"allow_http": store.certificate is None}
    if store.certificate:
        options["root_certificate"] = Path(store.certificate).read_bytes()
    return S3Store(
        store.bucket,
        endpoint=store.url,
        region=store.region,
        access_key_id=store.key,
        secret_access_key=store.secret,
        client_options=options,
    )


@saver("obstore open_writer")
def obstore_save(task: Task) -> Save:
    import obstore

    store = _obstore(task)

    def save(checkpoint: dict[str, Any], key: str) -> None:
        with obstore.open_writer(store, key) as file:
            torch.save(checkpoint, file)

    return save


@loader("obstore open_reader")
def obstore_load(task: Task) -> Load:
    import obstore

    store = _obstore(task)

    class Reader(io.RawIOBase):
        """obstore's reader returns its own kind of buffer; torch insists on bytes."""

        def __init__(self, key: str) -> None:
            self._file = obstore.open_reader(store, key)

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, offset: int, whence: int = 0) -> int:
            return self._file.seek(offset, whence)

        def tell(self) -> int:
            return self._file.tell()

        def read(self, size: int = -1) -> bytes:
            return self._file.read(None if size < 0 else size).to_bytes()

        def readinto(self, buffer: Any) -> int:
            data = self._file.read(len(buffer))
            buffer[: len(data)] = memoryview(data)
            return len(data)

    return lambda key: torch.load(Reader(key))


# --- s3torchconnector ---


@saver("s3torchconnector")
def s3torchconnector_save(task: Task) -> Save:
    from s3torchconnector import S3Checkpoint

    s3 = S3Checkpoint(region=task.store.region, endpoint=task.store.url)

    def save(checkpoint: dict[str, Any], key: str) -> None:
        with s3.writer(f"s3://{task.store.bucket}/{key}") as file:
            torch.save(checkpoint, file)

    return save


@loader("s3torchconnector")
def s3torchconnector_load(task: Task) -> Load:
    from s3torchconnector import S3Checkpoint

    s3 = S3Checkpoint(region=task.store.region, endpoint=task.store.url)

    def load(key: str) -> Any:
        with s3.reader(f"s3://{task.store.bucket}/{key}") as file:
            return torch.load(file)

    return load


# --- boto3, through a local file ---


def _boto3(task: Task) -> Any:
    import boto3

    store = task.store
    return boto3.client(
        "s3",
        endpoint_url=store.url,
        region_name=store.region,
        aws_access_key_id=store.key,
        aws_secret_access_key=store.secret,
    )


@saver("boto3 upload_file")
def boto3_save(task: Task) -> Save:
    client = _boto3(task)

    def save(checkpoint: dict[str, Any], key: str) -> None:
        with tempfile.NamedTemporaryFile(dir=task.directory) as file:
            torch.save(checkpoint, file.name)
            client.upload_file(file.name, task.store.bucket, key)

    return save


@loader("boto3 download_file")
def boto3_load(task: Task) -> Load:
    client = _boto3(task)

    def load(key: str) -> Any:
        with tempfile.NamedTemporaryFile(dir=task.directory) as file:
            client.download_file(task.store.bucket, key, file.name)
            return torch.load(file.name)

    return load


# --- torch.distributed.checkpoint: its own format, a directory ---


def _dcp_save(checkpoint: dict[str, Any], writer: Any) -> None:
    from torch.distributed import checkpoint as dcp

    dcp.save(checkpoint, storage_writer=writer, no_dist=True)


def _dcp_load(reader: Any) -> dict[str, Any]:
    """It loads into tensors that are there already; so they are made, from its own metadata, as part of the load."""
    from torch.distributed import checkpoint as dcp

    metadata = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@saver("torch DCP, fsspec")
def dcp_fsspec_save(task: Task) -> Save:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    def save(checkpoint: dict[str, Any], key: str) -> None:
        _dcp_save(checkpoint, FsspecWriter(f"s3://{task.store.bucket}/{key}", **task.store.storage_options))

    return save


@loader("torch DCP, fsspec", file_format="dcp")
def dcp_fsspec_load(task: Task) -> Load:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return lambda key: _dcp_load(FsspecReader(f"s3://{task.store.bucket}/{key}", **task.store.storage_options))


@saver("torch DCP, s3torchconnector")
def dcp_s3torchconnector_save(task: Task) -> Save:
    from s3torchconnector.dcp import S3StorageWriter

    def save(checkpoint: dict[str, Any], key: str) -> None:
        _dcp_save(checkpoint, S3StorageWriter(task.store.region, f"s3://{task.store.bucket}/{key}"))

    return save


@loader("torch DCP, s3torchconnector", file_format="dcp")
def dcp_s3torchconnector_load(task: Task) -> Load:
    from s3torchconnector.dcp import S3StorageReader

    return lambda key: _dcp_load(S3StorageReader(task.store.region, f"s3://{task.store.bucket}/{key}"))


# --- loaders of formats of their own ---


@loader("tensorizer", file_format="tensorizer")
def tensorizer_load(task: Task) -> Load:
    from tensorizer import TensorDeserializer, stream_io

    store = task.store

    def load(key: str) -> Any:
        certificates = stream_io.CAInfo(cacert=store.certificate) if store.certificate else None
        stream = stream_io.open_stream(
            f"s3://{store.bucket}/{key}",
            s3_access_key_id=store.key,
            s3_secret_access_key=store.secret,
            s3_endpoint=store.url,
            s3_region_name=store.region,
            force_http=store.certificate is None,
            certificate_handling=certificates,
        )
        return TensorDeserializer(stream, device="cpu")

    return load


@loader("safetensors + s3fs", file_format="safetensors")
def safetensors_load(task: Task) -> Load:
    from s3fs import S3FileSystem
    from safetensors.torch import load

    fs = S3FileSystem(**task.store.storage_options)

    def load_it(key: str) -> Any:
        return load(fs.cat_file(f"{task.store.bucket}/{key}"))

    return load_it


@saver("safetensors + s3fs")
def safetensors_save(task: Task) -> Save:
    from s3fs import S3FileSystem
    from safetensors.torch import save

    fs = S3FileSystem(**task.store.storage_options)

    def save_it(checkpoint: dict[str, Any], key: str) -> object:
        return fs.pipe_file(f"{task.store.bucket}/{key}", save(checkpoint["module_state_dict"]))

    return save_it


@loader("runai-model-streamer", file_format="safetensors")
def runai_load(task: Task) -> Load:
    os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"
    from runai_model_streamer import SafetensorsStreamer

    def load(key: str) -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(f"s3://{task.store.bucket}/{key}")
            return dict(streamer.get_tensors())

    return load
