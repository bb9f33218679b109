"""Lightning's Trainer with torchferry's CheckpointIO, against a real S3 server."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pytest
import torch
from fsspec.config import conf
from lightning.pytorch.callbacks import ModelCheckpoint

import torchferry
from torchferry.integrations.lightning import TorchferryCheckpointIO
from torchferry.testing.faultproxy import Fault

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import FaultyS3

pytestmark = pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch")  # what they say of themselves


@pytest.fixture
def s3_by_default(s3_storage_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning looks into the directory with fsspec's own settings."""
    monkeypatch.setitem(conf, "s3", s3_storage_options)


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.steps: list[int] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        del index
        self.steps.append(self.global_step)
        self.log("loss", float(10 - self.current_epoch % 4))
        return self.layer(batch).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=4)  # two steps an epoch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def trainer(io: Any, place: Path, epochs: int, *callbacks: Any, accelerated: str = "cpu") -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator=accelerated,
        default_root_dir=place,
        callbacks=list(callbacks),
        plugins=[io],
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def names(client: Any, url: str) -> list[str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return sorted(each["Key"].removeprefix(f"{prefix}/") for each in found)


@pytest.mark.usefixtures("s3_by_default")
@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_trainer_keeps_the_best_and_the_last_and_resumes(
    s3_url: str, s3_client: Any, tmp_path: Path, background: bool
) -> None:
    def checkpoints() -> ModelCheckpoint:
        return ModelCheckpoint(s3_url, filename="{epoch}", monitor="loss", save_top_k=2, save_last=True)

    kept = checkpoints()
    model = Model()
    trainer(TorchferryCheckpointIO(background=background), tmp_path, 4, kept).fit(model)
    assert names(s3_client, s3_url) == ["epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"]
    assert kept.best_model_path == f"{s3_url}/epoch=3.ckpt"
    stored = torchferry.load(f"{s3_url}/last.ckpt")
    assert stored["global_step"] == 8
    assert torch.equal(stored["state_dict"]["layer.weight"], model.layer.weight)

    resumed = Model()
    again = trainer(TorchferryCheckpointIO(background=background), tmp_path, 6, checkpoints())
    again.fit(resumed, ckpt_path=f"{s3_url}/last.ckpt")
    assert resumed.steps == [8, 9, 10, 11]
    assert torchferry.load(f"{s3_url}/last.ckpt")["global_step"] == 12
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("s3_by_default")
def test_what_is_stored_is_what_lightning_reads_and_the_other_way_round(s3_url: str, tmp_path: Path) -> None:
    from lightning.fabric.plugins.io import TorchCheckpointIO

    theirs, ours = TorchCheckpointIO(), TorchferryCheckpointIO()
    model = Model()
    first = trainer(ours, tmp_path, 1)
    first.fit(model)
    first.save_checkpoint(f"{s3_url}/ours.ckpt")
    ours.teardown()
    read = theirs.load_checkpoint(f"{s3_url}/ours.ckpt")
    theirs.save_checkpoint(read, f"{s3_url}/theirs.ckpt")
    back = ours.load_checkpoint(f"{s3_url}/theirs.ckpt")
    assert back.keys() == read.keys()
    assert torch.equal(back["state_dict"]["layer.weight"], model.layer.weight)
    with pytest.raises(FileNotFoundError):
        ours.load_checkpoint(f"{s3_url}/none.ckpt")


def test_pickles_load_only_where_lightning_is_told_so(tmp_path: Path) -> None:
    io = TorchferryCheckpointIO()
    io.save_checkpoint({"hyper_parameters": {"made": Made()}}, tmp_path / "a" / "x.ckpt")
    for weights_only in (None, True):
        with pytest.raises(pickle.UnpicklingError, match="Made"):
            io.load_checkpoint(tmp_path / "a" / "x.ckpt", weights_only=weights_only)
    assert isinstance(
        io.load_checkpoint(tmp_path / "a" / "x.ckpt", weights_only=False)["hyper_parameters"]["made"], Made
    )


class Made:
    """What weights_only refuses."""


def test_a_save_in_the_background_stores_what_was_there_when_it_was_called(
    faulty_s3: Callable[..., FaultyS3], s3_url: str
) -> None:
    store = faulty_s3()
    io = TorchferryCheckpointIO(storage_options=store.storage_options)
    tensor = torch.ones(4 << 20)
    io.save_checkpoint({"x": tensor}, f"{s3_url}/x.ckpt")
    tensor.zero_()
    assert torch.equal(io.load_checkpoint(f"{s3_url}/x.ckpt")["x"], torch.ones(4 << 20))  # it waits


@pytest.mark.parametrize("asks", ["save", "load", "teardown"])
def test_an_error_in_the_background_is_raised_by_what_comes_next(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, asks: str
) -> None:
    store = faulty_s3(Fault(method="PUT", target=r"1\.ckpt", status=403, code="AccessDenied", times=None))
    io = TorchferryCheckpointIO(storage_options=store.storage_options)
    io.save_checkpoint({"x": 1}, f"{s3_url}/1.ckpt")
    with pytest.raises(torchferry.StoragePermissionError, match=r"1\.ckpt"):
        if asks == "save":
            io.save_checkpoint({"x": 2}, f"{s3_url}/2.ckpt")
        elif asks == "load":
            io.load_checkpoint(f"{s3_url}/1.ckpt")
        else:
            io.teardown()
    io.save_checkpoint({"x": 3}, f"{s3_url}/3.ckpt")  # it was raised once
    io.teardown()
    assert io.load_checkpoint(f"{s3_url}/3.ckpt") == {"x": 3}


def test_a_checkpoint_is_removed_when_what_replaces_it_is_whole_and_not_before(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, s3_client: Any
) -> None:
    store = faulty_s3()
    io = TorchferryCheckpointIO(storage_options=store.storage_options)
    for number in (1, 2, 3):
        io.save_checkpoint({"x": torch.ones(1 << 20)}, f"{s3_url}/{number}.ckpt")
        io.remove_checkpoint(f"{s3_url}/{number - 1}.ckpt")
    io.teardown()
    assert names(s3_client, s3_url) == ["3.ckpt"]
    log = [(each.method, each.target.partition("?")[0].rpartition("/")[2]) for each in store.proxy.log]
    last_put = max(at for at, (method, name) in enumerate(log) if method in {"PUT", "POST"} and name == "3.ckpt")
    assert min(at for at, (method, name) in enumerate(log) if method == "DELETE" and name == "2.ckpt") > last_put


def test_a_checkpoint_whose_replacement_failed_stays(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, s3_client: Any
) -> None:
    store = faulty_s3(Fault(method="PUT", target=r"2\.ckpt", status=403, code="AccessDenied", times=None))
    io = TorchferryCheckpointIO(storage_options=store.storage_options)
    io.save_checkpoint({"x": 1}, f"{s3_url}/1.ckpt")
    io.save_checkpoint({"x": 2}, f"{s3_url}/2.ckpt")
    io.remove_checkpoint(f"{s3_url}/1.ckpt")
    with pytest.raises(torchferry.StoragePermissionError):
        io.teardown()
    assert names(s3_client, s3_url) == ["1.ckpt"]
    io.save_checkpoint({"x": 3}, f"{s3_url}/3.ckpt")
    io.teardown()
    assert names(s3_client, s3_url) == ["3.ckpt"]


def test_a_path_that_is_saved_again_is_not_removed(s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    io = TorchferryCheckpointIO(storage_options=s3_storage_options)
    io.save_checkpoint({"x": torch.ones(1 << 20)}, f"{s3_url}/x.ckpt")
    io.remove_checkpoint(f"{s3_url}/x.ckpt")
    io.save_checkpoint({"x": 2}, f"{s3_url}/x.ckpt")
    assert io.load_checkpoint(f"{s3_url}/x.ckpt") == {"x": 2}


def test_a_directory_is_removed_with_all_that_is_in_it(
    s3_url: str, s3_storage_options: dict[str, Any], s3_client: Any, tmp_path: Path
) -> None:
    io = TorchferryCheckpointIO(storage_options=s3_storage_options)
    for name in ("step/a.distcp", "step/sub/b.distcp", "step.ckpt"):
        torchferry.save([1], f"{s3_url}/{name}", storage_options=s3_storage_options)
    io.remove_checkpoint(f"{s3_url}/step")
    assert names(s3_client, s3_url) == ["step.ckpt"]
    local = TorchferryCheckpointIO()
    (tmp_path / "step" / "sub").mkdir(parents=True)
    local.remove_checkpoint(tmp_path / "step")
    local.remove_checkpoint(tmp_path / "none.ckpt")
    assert not list(tmp_path.iterdir())


def test_it_can_be_pickled_as_launchers_do_and_is_a_plugin_of_either_package() -> None:
    import pytorch_lightning
    from pytorch_lightning.plugins.io import CheckpointIO

    assert isinstance(pickle.loads(pickle.dumps(TorchferryCheckpointIO())), TorchferryCheckpointIO)
    assert isinstance(TorchferryCheckpointIO(), CheckpointIO)
    assert pytorch_lightning.Trainer(plugins=[TorchferryCheckpointIO()], logger=False, accelerator="cpu")


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_a_link_to_the_last_checkpoint_is_made_and_a_later_run_does_not_write_through_it(
    tmp_path: Path, background: bool
) -> None:
    place = tmp_path / "not" / "there yet"

    def fit(epochs: int, save_last: Any, resumed: Path | None = None) -> None:
        kept = ModelCheckpoint(place, filename="{epoch}", monitor="loss", save_top_k=-1, save_last=save_last)
        run = trainer(TorchferryCheckpointIO(background=background), tmp_path, epochs, kept)
        run.fit(Model(), ckpt_path=resumed, weights_only=False)

    fit(2, "link")
    assert (place / "last.ckpt").resolve().name == "epoch=1.ckpt"
    fit(4, True, place / "last.ckpt")
    assert {path.name: torchferry.load(path, weights_only=False)["epoch"] for path in place.iterdir()} == {
        "epoch=0.ckpt": 0,
        "epoch=1.ckpt": 1,
        "epoch=2.ckpt": 2,
        "epoch=3.ckpt": 3,
        "last.ckpt": 3,
    }
