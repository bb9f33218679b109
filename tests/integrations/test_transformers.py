"""The Trainer of Transformers with torchferry's callback, against a real S3 server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

import torchferry
from torchferry.integrations.transformers import TorchferryCallback, fetch_latest
from torchferry.testing.faultproxy import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import FaultyS3

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::accelerate", "ignore:::torch")


class Model(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.layer = torch.nn.Linear(4, 1)
        self.seen = 0
        self.post_init()

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.seen += self.training
        return {"loss": (self.layer(x) - labels).square().mean(), "logits": self.layer(x)}


def train(
    place: Path, callback: Any, steps: int, resume: str | None = None, model: Model | None = None, **arguments: Any
) -> Model:
    model = model or Model()
    data = [{"x": torch.full((4,), float(i)), "labels": torch.ones(1)} for i in range(64)]
    made = TrainingArguments(
        **{
            "output_dir": str(place),
            "max_steps": steps,
            "save_steps": 2,
            "save_total_limit": 2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            **arguments,
        }
    )
    Trainer(model, made, train_dataset=data, eval_dataset=data[:4], callbacks=[callback]).train(resume)
    return model


def folders(client: Any, url: str) -> dict[str, set[str]]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found: dict[str, set[str]] = {}
    for each in client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
        folder, _, name = each["Key"].removeprefix(f"{prefix}/").partition("/")
        found.setdefault(folder, set()).add(name)
    return found


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_each_checkpoint_is_sent_old_ones_go_and_training_resumes_elsewhere(
    s3_url: str, s3_storage_options: dict[str, Any], s3_client: Any, tmp_path: Path, background: bool
) -> None:
    def callback() -> TorchferryCallback:
        return TorchferryCallback(s3_url, background=background, storage_options=s3_storage_options)

    here, there = tmp_path / "here", tmp_path / "there"
    assert fetch_latest(s3_url, here, storage_options=s3_storage_options) is None
    trained = train(here, callback(), 6)
    found = folders(s3_client, s3_url)
    assert set(found) == {"checkpoint-4", "checkpoint-6"}
    local = {path.name for path in (here / "checkpoint-6").iterdir()}
    assert found["checkpoint-6"] == {*local, "torchferry.json"}
    assert {path.name for path in here.iterdir()} == {"checkpoint-4", "checkpoint-6"}

    fetched = fetch_latest(s3_url, there, storage_options=s3_storage_options)
    assert fetched == str(there / "checkpoint-6")
    for path in (here / "checkpoint-6").iterdir():
        assert (there / "checkpoint-6" / path.name).read_bytes() == path.read_bytes()
    resumed = train(there, callback(), 8, fetched)
    assert resumed.seen == 2
    assert set(folders(s3_client, s3_url)) == {"checkpoint-6", "checkpoint-8"}
    straight = train(tmp_path / "straight", callback(), 8, save_strategy="no")
    assert trained.seen == 6
    assert straight.seen == 8


def test_the_best_checkpoint_stays(
    s3_url: str, s3_storage_options: dict[str, Any], s3_client: Any, tmp_path: Path
) -> None:
    callback = TorchferryCallback(s3_url, storage_options=s3_storage_options)
    # The first steps throw the loss far up: with "greater is better", the first checkpoint is the best.
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 1e3}
    train(tmp_path, callback, 8, metric_for_best_model="loss", greater_is_better=True, **arguments)
    assert set(folders(s3_client, s3_url)) == {path.name for path in tmp_path.iterdir()} | {"checkpoint-8"}
    assert {"checkpoint-2", "checkpoint-8"} <= set(folders(s3_client, s3_url))


def test_a_folder_that_is_not_whole_does_not_count(
    s3_url: str, s3_storage_options: dict[str, Any], s3_client: Any, tmp_path: Path
) -> None:
    train(tmp_path / "here", TorchferryCallback(s3_url, storage_options=s3_storage_options), 4)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    s3_client.put_object(Bucket=bucket, Key=f"{prefix}/checkpoint-6/model.safetensors", Body=b"half")
    for name in ("none", "optimizer.pt", "torchferry.json"):
        latest = fetch_latest(s3_url, tmp_path / name, storage_options=s3_storage_options)
        assert latest == str(tmp_path / name / ("checkpoint-4" if name == "none" else "checkpoint-2"))
        s3_client.delete_object(Bucket=bucket, Key=f"{prefix}/checkpoint-4/optimizer.pt")
        if name == "optimizer.pt":
            s3_client.delete_object(Bucket=bucket, Key=f"{prefix}/checkpoint-4/torchferry.json")
    train(tmp_path / "there", TorchferryCallback(s3_url, storage_options=s3_storage_options), 8, latest)
    assert set(folders(s3_client, s3_url)) == {"checkpoint-6", "checkpoint-8"}


def test_a_local_folder_is_fetched_again_only_where_it_is_not_whole(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, tmp_path: Path
) -> None:
    store = faulty_s3()
    train(tmp_path, TorchferryCallback(s3_url, storage_options=store.storage_options), 2)
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    whole, inode = path.read_bytes(), path.stat().st_ino
    assert fetch_latest(s3_url, tmp_path, storage_options=store.storage_options) == str(path.parent)
    assert path.stat().st_ino == inode
    path.write_bytes(whole[:-1])
    assert fetch_latest(s3_url, tmp_path, storage_options=store.storage_options) == str(path.parent)
    assert path.read_bytes() == whole
    assert {each.name for each in tmp_path.iterdir()} == {"checkpoint-2"}


def test_an_error_in_the_background_ends_the_training_and_leaves_no_whole_folder(
    faulty_s3: Callable[..., FaultyS3], s3_url: str, tmp_path: Path
) -> None:
    store = faulty_s3(Fault(method="PUT", target="checkpoint-4/optimizer", status=403, code="AccessDenied", times=None))
    callback = TorchferryCallback(s3_url, storage_options=store.storage_options)
    model = Model()
    with pytest.raises(torchferry.StoragePermissionError, match=r"checkpoint-4/optimizer\.pt"):
        train(tmp_path, callback, 20, model=model)
    assert model.seen == 6  # at the next checkpoint
    latest = fetch_latest(s3_url, tmp_path / "there", storage_options=store.storage_options)
    assert latest == str(tmp_path / "there" / "checkpoint-2")


def test_a_folder_is_sent_though_the_trainer_deletes_it_meanwhile(
    s3_url: str, s3_storage_options: dict[str, Any], tmp_path: Path
) -> None:
    class Deleting(TorchferryCallback):
        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            super().on_save(args, state, control, **more)
            shutil.rmtree(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    train(tmp_path / "here", Deleting(s3_url, storage_options=s3_storage_options), 4)
    assert not list((tmp_path / "here").iterdir())
    fetched = fetch_latest(s3_url, tmp_path / "there", storage_options=s3_storage_options)
    assert fetched == str(tmp_path / "there" / "checkpoint-4")
    assert train(tmp_path / "there", TorchferryCallback(tmp_path / "copy"), 6, fetched).seen == 2
    assert fetch_latest(tmp_path / "copy", tmp_path / "third") == str(tmp_path / "third" / "checkpoint-6")


def test_a_file_that_is_a_symbolic_link_is_sent(tmp_path: Path) -> None:
    class Linking(TorchferryCallback):
        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (folder.parent / "shared.txt").write_text("shared")
            (folder / "linked.txt").symlink_to(Path("..", "shared.txt"))
            super().on_save(args, state, control, **more)

    train(tmp_path / "here", Linking(tmp_path / "there"), 2)
    assert (tmp_path / "there" / "checkpoint-2" / "linked.txt").read_text() == "shared"


def test_a_list_of_files_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    manifest = tmp_path / "run" / "checkpoint-1" / "torchferry.json"
    for text in (
        '{"files": {"../out": 0}}',
        '{"files": {"/out": 0}}',
        '{"files": {"a/../../out": 0}}',
        '{"files": {"a\\u0000": 0}}',
        '{"files": {"a": 0, "a/b": 0}}',
        '{"files": {"a": -1}}',
        '{"files": ' + "[" * 100_000,
        "{}",
        "[1",
        "1",
    ):
        manifest.write_text(text)
        with pytest.raises(torchferry.CheckpointCorruptError, match="not a list of files"):
            fetch_latest(tmp_path / "run", tmp_path / "there")
    assert not (tmp_path / "there").exists()
