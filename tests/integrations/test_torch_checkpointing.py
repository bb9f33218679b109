"""torch_checkpointing's CheckpointManager over torchferry's storage: in S3, and in a directory."""

from __future__ import annotations

import gc
import io
import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("torch_checkpointing", reason="it needs torch 2.11")

from torch_checkpointing import CheckpointManager, ItemSpec
from torch_checkpointing.checkpoint_layout import JsonSerialization, LayoutInfo
from torch_checkpointing.checkpoint_writer import CheckpointWriterConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig, SyncCheckpointSaverConfig
from torch_checkpointing.default_resharder import DefaultResharder
from torch_checkpointing.staging import CheckpointStagerConfig
from torch_checkpointing.storage.base_storage import ReadArgs
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

import torchferry
from torchferry.distributed.place import bytes_of
from torchferry.engine.loops import run, run_on
from torchferry.engine.memory import CPU_SAVES, EVERYTHING_ELSE
from torchferry.errors import StorageError
from torchferry.integrations.torch_checkpointing import TorchferryStorageConfig
from torchferry.storage import open_backend
from torchferry.testing.faultproxy import Fault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import FaultyS3

pytestmark = pytest.mark.filterwarnings("ignore:::torch_checkpointing", "ignore:::torch")  # what they say of themselves

MIB = 1 << 20


@dataclass
class Root:
    """A place to test."""

    config: TorchferryStorageConfig
    is_local: bool

    @property
    def storage(self) -> Any:
        return self.config.create_storage()


@pytest.fixture(params=["s3", "local"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Root:
    if request.param == "local":
        return Root(TorchferryStorageConfig(tmp_path / "run"), is_local=True)
    options = request.getfixturevalue("s3_storage_options")
    url = f"s3://{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    return Root(TorchferryStorageConfig(url, options), is_local=False)


def managed(root: Root, *, save: Any = None, staged: bool = True, **further: Any) -> CheckpointManager:
    save = save or SyncCheckpointSaverConfig(writer_config=CheckpointWriterConfig(write_to_temp_dir=staged))
    return CheckpointManager.Config(save=save, storage_config=root.config, **further).build()


def content(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weights = {"large": torch.randn(3 * MIB // 2, generator=generator), "small": torch.randn(7, generator=generator)}
    return {"model": weights, "step": seed, "config": {"lr": 0.1}}


def require_equal(loaded: Any, expected: Any) -> None:
    assert loaded["step"] == expected["step"]
    assert loaded["config"] == expected["config"]
    for name, tensor in expected["model"].items():
        assert torch.equal(loaded["model"][name], tensor)


def require_no_memory_held() -> None:
    gc.collect()
    assert CPU_SAVES.held == EVERYTHING_ELSE.held == 0


# --- their manager


@pytest.mark.parametrize("staged", [True, False], ids=["renamed", "in place"])
def test_manager_saves_and_loads(root: Root, staged: bool) -> None:
    items = {"config": ItemSpec(layout=LayoutInfo("config.json", JsonSerialization()))}
    manager = managed(root, staged=staged, items=items)
    for step in (1, 2):
        manager.save(f"step-{step}", content(step))
    for step in (1, 2):
        target = {"model": content()["model"], "step": None, "config": None}
        kept = target["model"]["large"]
        require_equal(manager.load(f"step-{step}", into=target), content(step))
        assert torch.equal(kept, content(step)["model"]["large"])  # in place
    manager.close()
    assert root.storage.ls(Path()) == ["step-1", "step-2"]
    assert "config.json" in root.storage.ls(Path("step-1"))
    require_no_memory_held()


def test_files_are_those_that_their_own_storage_writes(root: Root, tmp_path: Path) -> None:
    theirs = CheckpointManager.Config(
        save=SyncCheckpointSaverConfig(), storage_config=LocalFileSystemStorageConfig(use_direct_io=False)
    ).build()
    theirs.save(str(tmp_path / "theirs"), content(3))
    manager = managed(root)
    manager.save("ours", content(3))
    storage = root.storage
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert storage.ls(Path("ours")) == names
    for name in names:
        stored = storage.read(Path("ours", name))
        assert len(stored) == (tmp_path / "theirs" / name).stat().st_size
    url, options = storage.remap_path(Path("ours", "model_0.pt")), root.config.storage_options
    assert torch.equal(torchferry.load(url, storage_options=options)["large"], content(3)["model"]["large"])


def test_a_tensor_is_loaded_by_slices_where_it_is_resharded(root: Root) -> None:
    """Their resharder reads an archive's directory and the ranges it needs from an open stream."""
    manager = managed(root, items={"model": ItemSpec(resharder=DefaultResharder())})
    manager.save("step-1", {"model": content(1)["model"]})
    assert "metadata.pkl" in root.storage.ls(Path("step-1"))
    loaded = manager.load("step-1", into={"model": content(0)["model"]})
    assert torch.equal(loaded["model"]["large"], content(1)["model"]["large"])


def test_manager_saves_asynchronously(s3_url: str, s3_storage_options: dict[str, Any]) -> None:
    """As their documentation configures a machine without an accelerator; the writer is another process."""
    root = Root(TorchferryStorageConfig(s3_url, s3_storage_options), is_local=False)
    staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
    manager = managed(root, save=AsyncCheckpointSaverConfig(staging_config=staging))
    saving = manager.save("step-1", content(1))
    assert saving is not None
    saving.result(120)
    target = {"model": content()["model"], "step": None, "config": None}
    require_equal(manager.load("step-1", into=target), content(1))
    manager.close()


def test_what_cannot_be_saved_publishes_nothing(root: Root) -> None:
    manager = managed(root, staged=False)
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        manager.save("step-1", {"model": {"large": torch.ones(3 * MIB), "lock": (x for x in ())}})
    assert not root.storage.exists(Path("step-1", "model_0.pt"))
    require_no_memory_held()


# --- streams


def test_a_stream_that_is_left_by_an_exception_publishes_nothing(root: Root) -> None:
    storage = root.storage
    storage.write(Path("a/x.bin"), b"old")
    for _ in range(3):
        with pytest.raises(KeyError), storage.stream_write(Path("a/x.bin")) as stream:
            for _ in range(4):
                stream.write(bytes(5 * MIB))
            raise KeyError
    assert storage.read(Path("a/x.bin")) == b"old"
    assert storage.ls(Path("a")) == ["x.bin"]
    with storage.stream_write(Path("a/x.bin")) as stream:
        pass
    assert storage.getsize(Path("a/x.bin")) == 0
    require_no_memory_held()


def test_a_stream_that_nobody_closes_publishes_nothing_and_holds_no_memory(root: Root) -> None:
    storage = root.storage
    stream = storage.stream_write(Path("x.bin"))
    stream.write(bytes(100))
    ended = stream._upload._ended
    del stream
    gc.collect()
    ended.result(60)
    assert not storage.exists(Path("x.bin"))
    require_no_memory_held()


def test_a_stream_publishes_nothing_after_a_write_that_failed(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> Any:
        raise OSError(f"no {size} bytes")

    storage = root.storage
    stream = storage.stream_write(Path("file"))
    with monkeypatch.context() as patched:
        patched.setattr(EVERYTHING_ELSE, "open_block", refuse)
        with pytest.raises(OSError, match="bytes"):
            stream.write(b"x")
    with pytest.raises(OSError, match="bytes"):
        stream.close()
    assert not storage.exists(Path("file"))
    require_no_memory_held()


@pytest.mark.parametrize("lent", [True, False])
def test_one_thread_has_many_streams_open(lent: bool) -> None:
    storage = TorchferryStorageConfig(f"memory://{uuid.uuid4().hex}").create_storage()
    data = torch.ones(MIB // 2) if lent else None
    with ThreadPoolExecutor(1) as pool:
        streams = pool.submit(lambda: [storage.get_write_stream(Path(f"{n}"), data) for n in range(10)]).result(60)
        for stream in streams:
            stream.write(b"x")
        for stream in streams:
            stream.close()
    assert [storage.getsize(Path(f"{number}")) for number in range(10)] == [1] * 10
    require_no_memory_held()


def test_a_failing_store_fails_the_save_with_its_own_error(faulty_s3: Callable[..., FaultyS3], s3_url: str) -> None:
    broken = faulty_s3(Fault(method="PUT", status=403, code="AccessDenied", times=None))
    manager = managed(Root(TorchferryStorageConfig(s3_url, broken.storage_options), is_local=False), staged=False)
    with pytest.raises(StorageError, match=r"model_0\.pt"):
        manager.save("step-1", {"model": {"large": torch.ones(16 * MIB)}})
    require_no_memory_held()


def test_an_upload_takes_bounded_memory_and_large_tensors_go_out_from_their_own(root: Root) -> None:
    storage, tensor = root.storage, torch.randn(12 * MIB)
    reports: list[int] = []
    with storage.get_write_stream(Path("x.pt"), {"w": [tensor]}) as stream:
        torch.save({"w": [tensor]}, stream)
        reports.append(CPU_SAVES.held + EVERYTHING_ELSE.held)
        assert stream._upload._storages.owner_of(memoryview(tensor.numpy()).cast("B")) is not None
    assert 0 < reports[0] <= 48 * MIB
    with storage.stream_read(Path("x.pt")) as file:
        assert torch.equal(torch.load(file)["w"][0], tensor)


def test_reads_are_of_ranges_and_of_one_version(root: Root) -> None:
    storage = root.storage
    data = torch.randint(0, 256, (20 * MIB + 123,), dtype=torch.uint8).numpy().tobytes()
    storage.write(Path("x.bin"), memoryview(data))
    args = ReadArgs(pre_read_full_file=False)
    with storage.stream_read(Path("x.bin"), args) as file:
        assert (file.seek(-3, io.SEEK_END), file.read(10)) == (len(data) - 3, data[-3:])
        assert file.read(10) == b""
        assert (file.seek(70_000), file.read(5), file.tell()) == (70_000, data[70_000:70_005], 70_005)
        buffer = bytearray(19 * MIB)
        assert file.readinto(memoryview(buffer)) == len(buffer)
        assert buffer == data[70_005 : 70_005 + len(buffer)]
        assert (file.seek(1), file.read()) == (1, data[1:])
        storage.write(Path("x.bin"), data[:-1])
        file.seek(0)
        with pytest.raises(OSError, match="replaced"):
            file.read(MIB)
    with pytest.raises(OSError, match="bytes, and not 7"):
        storage.stream_read(Path("x.bin"), ReadArgs(known_size_bytes=7))
    assert storage.read(Path("x.bin"), ReadArgs(pre_read_full_file=True)) == data[:-1]
    for verb in (storage.stream_read, storage.getsize, storage.delete, storage.ls, storage.rmdir):
        with pytest.raises(FileNotFoundError):
            verb(Path("none"))


def test_an_archive_is_opened_with_few_requests(faulty_s3: Callable[..., FaultyS3], s3_url: str) -> None:
    """As their resharder does, which then reads the slices that it needs."""
    through = faulty_s3()
    storage = TorchferryStorageConfig(s3_url, through.storage_options).create_storage()
    with storage.get_write_stream(Path("x.pt"), None) as stream:
        torch.save({f"w{number}": torch.full((9000,), float(number)) for number in range(100)}, stream)
    before = len(through.proxy.log)
    with storage.stream_read(Path("x.pt"), ReadArgs(pre_read_full_file=False)) as file:
        loaded = torch.load(file, map_location="meta")
    assert loaded["w99"].shape == (9000,)
    assert len(through.proxy.log) - before <= 6


# --- paths


def test_paths_are_relative_to_the_url(root: Root) -> None:
    storage = root.storage
    storage.mkdir(Path("step-1/deep"))
    storage.write(Path("/step-1/deep/a.bin"), b"1")
    storage.write(Path("step-1/b.bin"), bytearray(b"23"))
    assert storage.ls(Path()) == storage.ls(Path("/")) == ["step-1"]
    assert storage.ls(Path("step-1")) == ["b.bin", "deep"]
    assert (storage.getsize(Path("step-1/b.bin")), storage.read(Path("step-1//deep/./a.bin"))) == (2, b"1")
    assert storage.glob("step-1/*.bin") == ["step-1/b.bin"]
    assert [storage.isdir(Path(path)) for path in ("/", "step-1", "step-1/deep", "step-1/b.bin", "step", "none")] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert [storage.exists(Path(path)) for path in ("step-1", "step-1/b.bin", "step", "none")] == [
        True,
        True,
        False,
        False,
    ]
    assert storage.remap_path(Path("step-1")).endswith(f"{Path(os.fspath(root.config.url)).name}/step-1")
    for path in ("../x", "step-1/../../x", "s3://bucket/x"):
        with pytest.raises(ValueError, match="not a path below"):
            storage.exists(Path(path))
    for verb in (storage.delete, storage.rmdir, storage.stream_write):
        with pytest.raises(IsADirectoryError):
            verb(Path("/"))
    storage.delete(Path("step-1/b.bin"))
    storage.rmdir(Path("step-1"))
    assert not storage.exists(Path("step-1"))


def test_config_can_be_pickled_and_shows_no_secret(root: Root) -> None:
    again = pickle.loads(pickle.dumps(root.config))
    assert again == root.config
    assert "secret" not in repr(TorchferryStorageConfig("s3://bucket/x", {"key": "k", "secret": "verysecret"}))


# --- rename, by the table in Storage.rename


@pytest.fixture
def checkpoint(root: Root) -> Any:
    storage = root.storage
    for name in ("a.pt", "deep/b.pt", "metadata.pkl"):
        storage.mkdir(Path("tmp", name).parent)
        storage.write(Path("tmp", name), name.encode())
    storage.write(Path("file"), b"new")
    storage.mkdir(Path("empty"))
    storage.mkdir(Path("full"))
    storage.write(Path("full/old.pt"), b"old")
    storage.write(Path("other"), b"old")
    return storage


@pytest.mark.parametrize("target", ["absent", "empty"])
def test_rename_puts_a_directory_at_its_target(checkpoint: Any, target: str) -> None:
    checkpoint.rename(Path("tmp"), Path(target), is_directory=True)
    assert checkpoint.ls(Path(target)) == ["a.pt", "deep", "metadata.pkl"]
    assert checkpoint.read(Path(target, "deep/b.pt")) == b"deep/b.pt"
    assert not checkpoint.exists(Path("tmp"))


@pytest.mark.parametrize(("source", "target"), [("tmp", "full"), ("tmp", "other"), ("file", "full"), ("tmp", "tmp/in")])
def test_rename_refuses_an_occupied_target_and_changes_nothing(checkpoint: Any, source: str, target: str) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        checkpoint.rename(Path(source), Path(target), is_directory=source == "tmp")
    assert isinstance(caught.value, FileExistsError) or target == "tmp/in"
    assert checkpoint.ls(Path("tmp")) == ["a.pt", "deep", "metadata.pkl"]
    assert checkpoint.ls(Path("full")) == ["old.pt"]
    assert [checkpoint.read(Path(name)) for name in ("file", "other", "full/old.pt")] == [b"new", b"old", b"old"]


@pytest.mark.parametrize("target", ["absent", "other", "file"])
def test_rename_puts_a_file_at_its_target(checkpoint: Any, target: str) -> None:
    checkpoint.rename(Path("file"), Path(target))
    assert checkpoint.read(Path(target)) == b"new"
    assert checkpoint.exists(Path("file")) == (target == "file")


def test_what_stands_for_a_directory_in_a_bucket_is_no_name_in_it(
    s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    storage = TorchferryStorageConfig(s3_url, s3_storage_options).create_storage()
    storage.write(Path("tmp/file"), b"x")
    backend, path = open_backend(f"{s3_url}/tmp", storage_options=s3_storage_options)
    run(run_on, backend.loop, partial(backend.write, f"{path}/", bytes_of(b""), plan=backend.upload_plan(0)))
    assert storage.ls(Path("tmp")) == ["file"]
    storage.rename(Path("tmp"), Path("step-1"), is_directory=True)
    assert storage.ls(Path()) == ["step-1"]
    assert storage.read(Path("step-1/file")) == b"x"


def test_rename_of_nothing_is_an_error(checkpoint: Any) -> None:
    for is_directory in (True, False):
        with pytest.raises(FileNotFoundError):
            checkpoint.rename(Path("none"), Path("absent"), is_directory=is_directory)


def test_rename_copies_in_the_store_and_metadata_last(faulty_s3: Callable[..., FaultyS3], s3_url: str) -> None:
    through = faulty_s3()
    storage = TorchferryStorageConfig(s3_url, through.storage_options).create_storage()
    for number in range(20):
        storage.write(Path(f"tmp/{number}.pt"), bytes(MIB))
    storage.write(Path("tmp/metadata.pkl"), b"all")
    before = len(through.proxy.log)
    storage.rename(Path("tmp"), Path("step-1"), is_directory=True)
    deleted = [each.target for each in through.proxy.log[before:] if each.method == "DELETE"]
    assert deleted[0].partition("?")[0].endswith("tmp/metadata.pkl")  # what is left meanwhile is no checkpoint
    asked = [each for each in through.proxy.log[before:] if each.method in {"PUT", "GET"}]
    puts = [each.target.partition("?")[0] for each in asked if each.method == "PUT"]
    assert len(puts) == 21
    assert puts[-1].endswith("step-1/metadata.pkl")
    assert not [
        each for each in asked if each.method == "GET" and ".pt" in each.target.partition("?")[0]
    ]  # no bytes came here


def test_a_rename_that_fails_leaves_the_source_and_nothing_at_the_target(
    faulty_s3: Callable[..., FaultyS3], s3_url: str
) -> None:
    through = faulty_s3(Fault(method="PUT", target=r"step-1/7\.pt", status=403, code="AccessDenied", times=None))
    storage = TorchferryStorageConfig(s3_url, through.storage_options).create_storage()
    for number in range(10):
        storage.write(Path(f"tmp/{number}.pt"), b"x")
    with pytest.raises(StorageError):
        storage.rename(Path("tmp"), Path("step-1"), is_directory=True)
    assert not storage.exists(Path("step-1"))
    assert len(storage.ls(Path("tmp"))) == 10
