"""Errors as Flyte needs them: what may help to try again, and what never will."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import fsspec
import pytest
import torch
from checkpoints import data_config, make_checkpoint, sandbox_files, stored_files
from flytekit import FlyteContext, task
from flytekit.configuration import DataConfig, S3Config
from flytekit.core.type_engine import TypeTransformerFailedError
from flytekit.exceptions.system import FlyteDownloadDataException, FlyteUploadDataException
from flytekit.models.literals import Literal
from flytekit.remote.remote_fs import get_flyte_fs

from torchferry.checkpoint import transfer
from torchferry.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointKeyError,
    CheckpointNotFoundError,
    StoragePermissionError,
    StorageUnavailableError,
    TorchferryError,
)
from torchferry.flyte import PyTorchCheckpoint, PyTorchCheckpointTransformer
from torchferry.flyte.fields import checkpoint_literal
from torchferry.options import LoadOptions, SaveOptions
from torchferry.testing.faultproxy import Fault
from torchferry.testing.servers import S3Server

transformer = PyTorchCheckpointTransformer()
literal_type = transformer.get_literal_type(PyTorchCheckpoint)


def save(context: FlyteContext, value: Any = None) -> Literal:
    return transformer.to_literal(context, value or make_checkpoint(), PyTorchCheckpoint, literal_type)


def load(context: FlyteContext, uri: str, t: Any = PyTorchCheckpoint) -> Any:
    return transformer.to_python_value(context, checkpoint_literal(uri), t)


class Store:
    """Fails as often as it is told, with what an overloaded store ends in after a client's own retries."""

    def __init__(self, action: Callable[..., Any], errors: list[TorchferryError]) -> None:
        self.action = action
        self.errors = errors

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise self.errors.pop()
        return await self.action(*args, **kwargs)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def fail(verb: str, *errors: TorchferryError) -> None:
        monkeypatch.setattr(transfer, verb, Store(getattr(transfer, verb), list(errors)))

    return fail


BUSY = StorageUnavailableError("s3://b/k: 503 SlowDown, ten times.")


def test_an_output_or_input_that_fails_for_a_while_goes_through_in_the_end(
    in_context: Callable[..., FlyteContext], faulty_s3: Callable[..., Any], s3_server: S3Server, s3_url: str
) -> None:
    faults = [Fault(method=method, target="checkpoint.pt", status=503, times=3) for method in ("PUT", "GET")]
    context = in_context(s3_url, data_config(faulty_s3(*faults).proxy.endpoint, s3_server))
    assert load(context, save(context).scalar.blob.uri)["epochs"] == 3


def test_an_output_that_keeps_failing_is_the_error_that_flyte_retries(
    s3_context: FlyteContext, failing: Callable[..., None]
) -> None:
    failing("save_async", BUSY)
    with pytest.raises(FlyteUploadDataException, match="503 SlowDown") as caught:
        save(s3_context)
    assert caught.value.__cause__ is BUSY
    assert stored_files(s3_context) == []


def test_a_task_lets_the_error_that_flyte_retries_through(
    s3_context: FlyteContext, failing: Callable[..., None]
) -> None:
    @task
    def make() -> PyTorchCheckpoint:
        return make_checkpoint()

    failing("save_async", BUSY)
    assert s3_context
    with pytest.raises(FlyteUploadDataException, match="503 SlowDown"):
        make()


def test_a_store_that_is_not_there_is_the_error_that_flyte_retries(
    in_context: Callable[..., FlyteContext], s3_server: S3Server
) -> None:
    impatient = Annotated[PyTorchCheckpoint, SaveOptions(give_up_after=0.0), LoadOptions(give_up_after=0.0)]
    context = in_context("s3://bucket/raw", data_config("http://127.0.0.1:9", s3_server))
    with pytest.raises(FlyteUploadDataException, match=r"s3://bucket/raw/\w+/checkpoint.pt"):
        transformer.to_literal(context, make_checkpoint(), impatient, literal_type)
    with pytest.raises(FlyteDownloadDataException, match="s3://bucket/raw/x"):
        load(context, "s3://bucket/raw/x", impatient)


def test_an_input_that_is_damaged_on_its_way_is_read_again(
    in_context: Callable[..., FlyteContext],
    faulty_s3: Callable[..., Any],
    s3_server: S3Server,
    s3_url: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    direct = in_context(s3_url, data_config(s3_server.endpoint, s3_server))
    checkpoint = make_checkpoint()
    uri = save(direct, checkpoint).scalar.blob.uri
    fault = Fault(method="GET", target="checkpoint.pt", corrupt_download_byte=4_000)  # inside a tensor
    proxied = in_context(s3_url, data_config(faulty_s3(fault).proxy.endpoint, s3_server))
    loaded = load(proxied, uri)
    assert checkpoint.module is not None
    torch.testing.assert_close(loaded["module_state_dict"], checkpoint.module.state_dict(), rtol=0, atol=0)
    assert "Reading it again" in caplog.text


def test_an_input_that_keeps_failing_says_why(s3_context: FlyteContext, failing: Callable[..., None]) -> None:
    uri = save(s3_context).scalar.blob.uri
    failing("load_async", BUSY)
    with pytest.raises(FlyteDownloadDataException, match="503 SlowDown") as caught:
        load(s3_context, uri)
    assert caught.value.__cause__ is BUSY


def test_a_missing_object_is_final(s3_context: FlyteContext) -> None:
    uri = f"{s3_context.file_access.raw_output_prefix}gone/checkpoint.pt"
    with pytest.raises(TypeTransformerFailedError, match=uri) as caught:
        load(s3_context, uri)
    assert isinstance(caught.value.__cause__, CheckpointNotFoundError)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", CheckpointFormatError),
        (b"no checkpoint at all", CheckpointFormatError),
        (None, CheckpointCorruptError),
    ],
    ids=["empty", "text", "truncated"],
)
def test_a_file_that_is_no_checkpoint_is_final(
    s3_context: FlyteContext, content: bytes | None, cause: type[Exception]
) -> None:
    uri = save(s3_context).scalar.blob.uri
    fs = s3_context.file_access.raw_output_fs
    fs.pipe_file(uri, fs.cat_file(uri)[:-100] if content is None else content)
    with pytest.raises(TypeTransformerFailedError, match=uri) as caught:
        load(s3_context, uri)
    assert isinstance(caught.value.__cause__, cause)


def test_a_key_that_is_not_there_is_final_and_the_others_are_named(s3_context: FlyteContext) -> None:
    uri = save(s3_context).scalar.blob.uri
    with pytest.raises(TypeTransformerFailedError, match="epochs") as caught:
        load(s3_context, uri, Annotated[PyTorchCheckpoint, LoadOptions(keys=("nothing",))])
    assert isinstance(caught.value.__cause__, CheckpointKeyError)


def test_wrong_credentials_are_final(in_context: Callable[..., FlyteContext], s3_server: S3Server, s3_url: str) -> None:
    config = DataConfig(
        s3=S3Config(endpoint=s3_server.endpoint, access_key_id=s3_server.key, secret_access_key="wrong")
    )
    context = in_context(s3_url, config)
    with pytest.raises(TypeTransformerFailedError, match=s3_url) as caught:
        save(context)
    assert isinstance(caught.value.__cause__, StoragePermissionError)
    with pytest.raises(TypeTransformerFailedError, match=s3_url) as caught:
        load(context, f"{s3_url}/x")
    assert isinstance(caught.value.__cause__, StoragePermissionError)


def test_a_missing_bucket_is_final(in_context: Callable[..., FlyteContext], s3_server: S3Server) -> None:
    bucket = f"none-{uuid.uuid4().hex[:8]}"
    context = in_context(f"s3://{bucket}/raw", data_config(s3_server.endpoint, s3_server))
    with pytest.raises(TypeTransformerFailedError, match=bucket):
        save(context)


def test_an_object_that_cannot_be_pickled_says_so(s3_context: FlyteContext) -> None:
    class Odd(torch.nn.Linear):
        def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            raise RuntimeError("no state today")

    with pytest.raises(TypeTransformerFailedError, match="no state today") as caught:
        save(s3_context, PyTorchCheckpoint(module=Odd(1, 1)))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.timeout(60, method="thread")  # nothing less ends a test in which flytekit waits
def test_a_state_dict_that_raises_stop_iteration_is_an_error_and_not_waited_for(s3_context: FlyteContext) -> None:
    class Empty(torch.nn.Module):
        def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            return {"device": next(self.parameters()).device}

    with pytest.raises(TypeTransformerFailedError, match="StopIteration") as caught:
        save(s3_context, PyTorchCheckpoint(module=Empty()))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert isinstance(caught.value.__cause__.__cause__, StopIteration)


class Exits:
    def __reduce__(self) -> Any:
        return sys.exit, (3,)


@pytest.mark.timeout(60, method="thread")  # nothing less ends a test that waits for a lost event loop
def test_an_exit_in_the_users_code_is_an_error_and_not_waited_for(s3_context: FlyteContext) -> None:
    class Module(torch.nn.Module):
        def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            sys.exit(3)

    class Pickled:
        def __reduce__(self) -> Any:
            sys.exit(3)

    class Shown:
        def __repr__(self) -> str:
            sys.exit(3)

    assert "SystemExit" in transformer.to_html(s3_context, PyTorchCheckpoint(hyperparameters={"x": Shown()}), Any)
    trusting = Annotated[PyTorchCheckpoint, LoadOptions(weights_only=False)]
    for checkpoint in (PyTorchCheckpoint(module=Module()), PyTorchCheckpoint(hyperparameters={"x": Pickled()})):
        with pytest.raises(TypeTransformerFailedError, match=r"SystemExit\(3\)"):
            transformer.to_literal(s3_context, checkpoint, trusting, literal_type)
    assert stored_files(s3_context) == []
    saved = transformer.to_literal(
        s3_context, PyTorchCheckpoint(hyperparameters={"x": Exits()}), trusting, literal_type
    )
    with pytest.raises(TypeTransformerFailedError, match=r"SystemExit\(3\)"):
        load(s3_context, saved.scalar.blob.uri, trusting)


def test_a_failure_in_a_union_is_raised_as_it_is_and_logged(
    s3_context: FlyteContext, caplog: pytest.LogCaptureFixture, failing: Callable[..., None]
) -> None:
    failing("save_async", *[BUSY] * 4)

    @task
    def maybe() -> PyTorchCheckpoint | None:
        return make_checkpoint()

    with caplog.at_level("WARNING", "torchferry"), pytest.raises(FlyteUploadDataException, match="503 SlowDown"):
        maybe()
    assert s3_context
    assert "503 SlowDown" in caplog.text


# ---------------------------------------------------------------- what Flyte adds


def test_execution_metadata_arrives_on_the_object(
    in_context: Callable[..., FlyteContext], s3_server: S3Server, s3_url: str
) -> None:
    metadata = {"flyte-execution-project": "p", "flyte-execution-name": "f0123"}
    context = in_context(s3_url, data_config(s3_server.endpoint, s3_server), execution_metadata=metadata)
    uri = save(context).scalar.blob.uri
    assert context.file_access.raw_output_fs.metadata(uri) == metadata


def test_a_failed_save_leaves_nothing_in_the_sandbox(s3_context: FlyteContext, failing: Callable[..., None]) -> None:
    failing("save_async", *[BUSY] * 4)
    with pytest.raises(FlyteUploadDataException):
        save(s3_context)
    assert sandbox_files(s3_context) == []


class Admin:
    """Flyte's data proxy, as FlyteRemote sees it: takes one file, and says where it put it."""

    default_project = "p"
    default_domain = "d"

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def upload_file(self, to_upload: Path, project: str, domain: str, filename_root: str) -> tuple[bytes, str]:
        target = self.directory / project / domain / filename_root / to_upload.name
        target.parent.mkdir(parents=True)
        target.write_bytes(to_upload.read_bytes())
        return b"md5", str(target)


def test_flyte_urls_go_through_flytes_data_proxy(in_context: Callable[..., FlyteContext], tmp_path: Path) -> None:
    fsspec.register_implementation("flyte", get_flyte_fs(Admin(tmp_path / "remote")), clobber=True)
    context = in_context("flyte://my-s3-bucket/")
    uri = save(context).scalar.blob.uri
    assert uri.startswith(str(tmp_path / "remote"))
    assert uri.endswith("/checkpoint.pt")
    assert load(context, uri)["epochs"] == 3
    assert sandbox_files(context) == []
