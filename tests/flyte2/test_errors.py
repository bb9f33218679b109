"""What goes wrong, as Flyte 2 understands it; what is guessed; what the report shows."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Optional, get_args

import flyte
import flyte.errors
import pytest
import torch
from flyte.types import TypeEngine, TypeTransformerFailedError
from flyteidl2.core.literals_pb2 import Blob, BlobMetadata, Literal, Scalar
from flyteidl2.core.types_pb2 import BlobType, LiteralType
from pydantic import BaseModel
from runs import Runs, init
from samples import make_checkpoint

import torchferry
from torchferry import LoadOptions, SaveOptions
from torchferry.errors import CheckpointValueError
from torchferry.flyte2 import LoadedCheckpoint, PyTorchCheckpoint
from torchferry.testing.faultproxy import Fault
from torchferry.testing.servers import S3Server

env = flyte.TaskEnvironment(name="errors")

Impatient = Annotated[PyTorchCheckpoint, SaveOptions(give_up_after=0.1), LoadOptions(give_up_after=0.1)]


@env.task
async def make(seed: int) -> Impatient:
    return make_checkpoint(seed)


@env.task
async def maybe(seed: int) -> Optional[Impatient]:  # noqa: UP045 - what users write
    return make_checkpoint(seed)


@env.task
async def epochs_of(checkpoint: Impatient) -> int:
    return int(checkpoint["epochs"])


@env.task
async def epochs_of_maybe(checkpoint: Optional[Impatient] = None) -> int:  # noqa: UP045
    return 0 if checkpoint is None else int(checkpoint["epochs"])


def literal_of(uri: str) -> Literal:
    checkpoint = TypeEngine.to_literal_type(PyTorchCheckpoint)
    return Literal(scalar=Scalar(blob=Blob(uri=uri, metadata=BlobMetadata(type=checkpoint.blob))))


class Allowed:
    pass


@pytest.mark.parametrize("task", [make, maybe], ids=["plain", "optional"])
def test_a_store_that_is_down_is_an_error_of_the_system(
    runs: Runs, s3_server: S3Server, faulty_s3: Callable[..., Any], task: Any
) -> None:
    init(s3_server, faulty_s3(Fault(method="PUT", status=503, times=None)).proxy.endpoint)
    with pytest.raises(flyte.errors.RuntimeSystemError, match="could not be saved") as caught:
        runs(task, seed=1)
    assert caught.value.code == "StorageUnavailableError"


def test_a_store_that_refuses_is_tried_as_often_as_the_task_says(runs: Runs, s3_server: S3Server) -> None:
    init(S3Server(s3_server.endpoint, s3_server.port, secret="wrong"), s3_server.endpoint)
    with pytest.raises(flyte.errors.RuntimeUserError, match="could not be saved") as caught:
        runs(make, seed=1)
    assert not isinstance(caught.value, flyte.errors.NonRecoverableError)
    assert caught.value.code == "StoragePermissionError"


class Trained(BaseModel):
    checkpoint: PyTorchCheckpoint


@pytest.mark.parametrize("kind", ["plain", "optional", "model"])
def test_a_value_that_no_load_would_take_is_stored_and_final(runs: Runs, kind: str) -> None:
    @env.task
    async def plain() -> PyTorchCheckpoint:
        return PyTorchCheckpoint(torch.nn.Linear(2, 2), {"f": print})

    @env.task
    async def in_optional() -> Optional[PyTorchCheckpoint]:  # noqa: UP045
        return PyTorchCheckpoint(torch.nn.Linear(2, 2), {"f": print})

    @env.task
    async def in_model() -> Trained:
        return Trained(checkpoint=PyTorchCheckpoint(torch.nn.Linear(2, 2), {"f": print}))

    with pytest.raises(flyte.errors.NonRecoverableError, match="stored all the same"):
        runs({"plain": plain, "optional": in_optional, "model": in_model}[kind])
    [stored] = runs.stored()
    options = runs.fs.storage_options
    assert torchferry.load(f"s3://{stored}", weights_only=False, storage_options=options)["f"] is print


def test_what_needs_trust_passes_with_the_annotation(runs: Runs) -> None:
    @env.task
    async def trusted() -> Annotated[PyTorchCheckpoint, LoadOptions(weights_only=False)]:
        return PyTorchCheckpoint(hyperparameters={"f": print})

    assert runs(trusted)["f"] is print


@pytest.mark.parametrize("task", [epochs_of, epochs_of_maybe], ids=["plain", "optional"])
def test_a_checkpoint_that_is_gone_is_named(runs: Runs, task: Any) -> None:
    uri = f"{runs.prefix}/gone/checkpoint.pt"
    literal = literal_of(uri)
    with pytest.raises(TypeTransformerFailedError, match=r"gone/checkpoint\.pt could not be loaded.*no such") as caught:
        asyncio.run(TypeEngine.to_python_value(literal, task.native_interface.get_input_types()["checkpoint"]))
    assert str(caught.value).count(uri) < 3


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", None], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_checkpoint_is_named(runs: Runs, content: bytes | None) -> None:
    uri = runs(make, seed=1).uri
    runs.fs.pipe_file(uri, runs.fs.cat_file(uri)[:-100] if content is None else content)
    with pytest.raises(TypeTransformerFailedError, match=r"checkpoint\.pt could not be loaded") as caught:
        asyncio.run(TypeEngine.to_python_value(literal_of(uri), PyTorchCheckpoint))
    assert str(caught.value).count(uri) < 3


def test_a_key_that_is_not_there_is_an_error_and_the_others_are_named(runs: Runs) -> None:
    uri = runs(make, seed=1).uri
    with pytest.raises(TypeTransformerFailedError, match="epochs"):
        asyncio.run(
            TypeEngine.to_python_value(literal_of(uri), Annotated[PyTorchCheckpoint, LoadOptions(keys=("nothing",))])
        )


def test_a_missing_bucket_is_named(runs: Runs) -> None:
    elsewhere = Runs(f"s3://none-{uuid.uuid4().hex[:8]}/raw", runs.metadata, runs.fs)
    with pytest.raises(flyte.errors.RuntimeUserError, match="none-"):
        elsewhere(make, seed=1)


def test_an_output_or_input_that_fails_for_a_while_goes_through_in_the_end(
    runs: Runs, s3_server: S3Server, faulty_s3: Callable[..., Any]
) -> None:
    faults = [Fault(method=method, target="checkpoint.pt", status=503, times=3) for method in ("PUT", "GET")]
    init(s3_server, faulty_s3(*faults).proxy.endpoint)

    @env.task
    async def main() -> int:
        return int((await patient())["epochs"])

    @env.task
    async def patient() -> PyTorchCheckpoint:
        return make_checkpoint()

    assert runs(main) == 3


def test_an_input_that_is_damaged_on_its_way_is_read_again(
    runs: Runs, s3_server: S3Server, faulty_s3: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    received = runs(make, seed=1)
    fault = Fault(method="GET", target="checkpoint.pt", corrupt_download_byte=4_000)  # inside a tensor
    init(s3_server, faulty_s3(fault).proxy.endpoint)
    again = asyncio.run(TypeEngine.to_python_value(literal_of(received.uri), PyTorchCheckpoint))
    torch.testing.assert_close(dict(again), dict(received), rtol=0, atol=0)
    assert "Reading it again" in caplog.text


def test_an_object_that_cannot_be_pickled_says_so(runs: Runs) -> None:
    class Odd(torch.nn.Linear):
        def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            raise RuntimeError("no state today")

    @env.task
    async def odd() -> PyTorchCheckpoint:
        return PyTorchCheckpoint(module=Odd(1, 1))

    with pytest.raises(flyte.errors.RuntimeUserError, match="no state today"):
        runs(odd)
    assert runs.stored() == []


@pytest.mark.timeout(60, method="thread")  # nothing less ends a test that waits for a lost event loop
@pytest.mark.parametrize("kind", [SystemExit, StopIteration])
def test_an_exit_in_the_users_code_is_an_error_and_not_waited_for(runs: Runs, kind: type[BaseException]) -> None:
    class Module(torch.nn.Module):
        def state_dict(self, *_args: Any, **_kwargs: Any) -> Any:
            raise kind(3)

    @env.task
    async def exits() -> PyTorchCheckpoint:
        return PyTorchCheckpoint(module=Module())

    with pytest.raises(flyte.errors.RuntimeUserError, match=kind.__name__):
        runs(exits)
    assert runs.stored() == []


def test_safe_globals_allow_a_type(runs: Runs) -> None:
    @env.task
    async def odd() -> PyTorchCheckpoint:
        return PyTorchCheckpoint(hyperparameters={"x": Allowed()})

    with torch.serialization.safe_globals([Allowed]):
        assert isinstance(runs(odd)["x"], Allowed)


def test_map_location_follows_the_annotation(runs: Runs) -> None:
    @env.task
    async def where(checkpoint: Annotated[PyTorchCheckpoint, LoadOptions(map_location="meta")]) -> str:
        return str(checkpoint.module_state_dict["0.weight"].device)

    assert runs(where, checkpoint=make_checkpoint()) == "meta"


def test_other_values_are_refused(runs: Runs) -> None:
    @env.task
    async def wrong() -> PyTorchCheckpoint:
        return {"module_state_dict": {}}  # type: ignore[return-value]

    with pytest.raises(flyte.errors.RuntimeUserError, match=r"given: a dict; make a torchferry\.flyte2\.LoadedCheck"):
        runs(wrong)


def test_nothing_to_save_is_an_error_of_both_kinds() -> None:
    with pytest.raises(CheckpointValueError) as caught:
        PyTorchCheckpoint()
    assert isinstance(caught.value, ValueError)


def test_outside_of_runs_there_is_no_place() -> None:
    with pytest.raises(flyte.errors.NonRecoverableError, match="no raw data path"):
        asyncio.run(
            TypeEngine.to_literal(make_checkpoint(), PyTorchCheckpoint, TypeEngine.to_literal_type(PyTorchCheckpoint))
        )


# ---------------------------------------------------------------- guessing


def test_types_are_guessed_from_literals() -> None:
    for t in (PyTorchCheckpoint, torch.Tensor, torch.nn.Module):
        assert TypeEngine.guess_python_type(TypeEngine.to_literal_type(t)) is t
        assert get_args(TypeEngine.guess_python_type(TypeEngine.to_literal_type(list[t]))) == (t,)  # type: ignore[valid-type]


def test_literals_of_flytekit_which_have_no_tag_are_guessed() -> None:
    single = BlobType.BlobDimensionality.SINGLE
    for name, t in [("PyTorchCheckpoint", PyTorchCheckpoint), ("PyTorchTensor", torch.Tensor)]:
        assert TypeEngine.guess_python_type(LiteralType(blob=BlobType(format=name, dimensionality=single))) is t


# ---------------------------------------------------------------- the report


def test_a_task_with_a_report_shows_what_it_returns(runs: Runs) -> None:
    @env.task(report=True)
    async def reports() -> tuple[PyTorchCheckpoint, list[PyTorchCheckpoint]]:
        await flyte.report.log.aio("<p>mine</p>")
        return make_checkpoint(1), [make_checkpoint(2)]

    runs(reports)
    [report] = runs.metadata.rglob("report.html")
    page = report.read_text()
    assert page.count('<div class="torchferry-deck">') == 2
    assert "<p>mine</p>" in page
    assert ">Checkpoint<" in page


def test_a_task_without_a_report_has_none(runs: Runs) -> None:
    runs(make, seed=1)
    assert list(runs.metadata.rglob("report.html")) == []


def test_what_is_received_can_be_returned_and_restored(runs: Runs) -> None:
    received = runs(make, seed=1)
    assert isinstance(received, LoadedCheckpoint)
    module = make_checkpoint(5).module
    assert module is not None
    assert received.restore(module=module)["epochs"] == 3
    assert torch.equal(module.state_dict()["0.weight"], received.module_state_dict["0.weight"])
