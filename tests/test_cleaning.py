"""What killed saves leave, and ``torchferry.clean``, which removes it and nothing else."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import fsspec
import pytest
import torch
from google.oauth2.credentials import Credentials

import torchferry
from torchferry.cli import main
from torchferry.engine.loops import run_on
from torchferry.engine.types import MIB, Chunk
from torchferry.storage.registry import open_backend
from torchferry.testing import victims
from torchferry.testing.fixtures import GcsClient
from torchferry.testing.gcs import PROJECT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OBJ = {"weight": torch.arange(5)}
CLOUDS = ("s3", "gcs", "azure")


@pytest.fixture
def place(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A prefix that no other test uses, and the storage options that lead there."""
    cloud: str = request.param
    if cloud == "gcs":
        proxy, server = request.getfixturevalue("gcs_xml")
        bucket = f"ferry-{uuid.uuid4().hex[:12]}"
        GcsClient(server.endpoint).make_bucket(bucket)
        options = {"endpoint_url": proxy.endpoint, "project": PROJECT, "token": Credentials("ferry-test-token")}
        return f"gs://{bucket}/x", options
    return request.getfixturevalue(f"{cloud}_url"), request.getfixturevalue(f"{cloud}_storage_options")


def kill_a_save(url: str, storage_options: dict[str, Any] | None = None) -> None:
    victim = victims.start(victims.stage_until_killed, url, storage_options)
    victim.join(60)
    assert victim.exitcode == -9


async def clean_until_removed(url: str, options: dict[str, Any]) -> torchferry.CleanReport:
    """Cleans; again where something of the killed process was still on its way to the store."""
    with anyio.fail_after(60):
        while True:
            report = await torchferry.clean_async(url, older_than=0, storage_options=options)
            if report.removed:
                return report


@asynccontextmanager
async def save_under_way(url: str, options: dict[str, Any] | None = None) -> AsyncIterator[None]:
    """A save that has staged something and has not ended."""
    backend, path = open_backend(url, storage_options=options)
    loop, staged = asyncio.get_running_loop(), asyncio.Event()

    async def chunks() -> AsyncIterator[Chunk]:
        for _ in range(20):
            yield Chunk(bytes(MIB))
        loop.call_soon_threadsafe(staged.set)
        await anyio.sleep_forever()

    writing = asyncio.create_task(
        run_on(backend.loop, backend.write, path, chunks(), plan=backend.upload_plan(50 * MIB, 5 * MIB))
    )
    await staged.wait()
    try:
        yield
    finally:
        writing.cancel()
        await asyncio.wait([writing])


@pytest.mark.parametrize("place", CLOUDS, indirect=True)
async def test_clean_removes_what_a_killed_save_left_and_no_checkpoint(place: tuple[str, dict[str, Any]]) -> None:
    url, options = place
    await torchferry.save_async(OBJ, f"{url}/run/step-1.pt", storage_options=options)
    await asyncio.to_thread(kill_a_save, f"{url}/run/step-2.pt", options)
    await asyncio.to_thread(kill_a_save, f"{url}/run-2/step-2.pt", options)

    planned = await torchferry.clean_async(f"{url}/run", older_than=0, dry_run=True, storage_options=options)
    cleaned = await clean_until_removed(f"{url}/run/", options)
    for report in (planned, cleaned):
        assert [found.url.removeprefix(url) for found in report.removed] == ["/run/step-2.pt"]
    nothing = torchferry.CleanReport()
    assert await torchferry.clean_async(f"{url}/run", older_than=0, storage_options=options) == nothing
    assert torch.equal(
        (await torchferry.load_async(f"{url}/run/step-1.pt", storage_options=options))["weight"], OBJ["weight"]
    )
    one = await clean_until_removed(f"{url}/run-2/step-2.pt", options)
    assert len(one.removed) == 1, "an object's own URL"


@pytest.mark.parametrize("place", CLOUDS, indirect=True)
async def test_clean_never_touches_a_save_that_is_under_way(place: tuple[str, dict[str, Any]]) -> None:
    url, options = place
    async with save_under_way(f"{url}/step-1.pt", options):
        report = await torchferry.clean_async(url, storage_options=options)
        assert not report.removed
        with anyio.fail_after(60):
            while not report.younger:  # not every store shows at once what is staged
                report = await torchferry.clean_async(url, storage_options=options)


async def test_age_of_an_upload_to_s3_counts_from_its_last_part(
    s3_client: Any, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    upload = {"Bucket": bucket, "Key": f"{prefix}/step-1.pt"}
    upload |= {"UploadId": s3_client.create_multipart_upload(**upload)["UploadId"]}
    while (
        int(time.time())
        <= s3_client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"][0]["Initiated"].timestamp()
    ):
        pass  # times of this store are whole seconds
    s3_client.upload_part(**upload, PartNumber=1, Body=b"x")
    (found,) = (await torchferry.clean_async(s3_url, storage_options=s3_storage_options)).younger
    assert found.modified == s3_client.list_parts(**upload)["Parts"][0]["LastModified"]
    (listed,) = s3_client.list_multipart_uploads(Bucket=bucket, Prefix=prefix)["Uploads"]
    assert found.modified > listed["Initiated"]


def test_local_save_takes_away_what_its_killed_predecessors_left(tmp_path: Path) -> None:
    kill_a_save(str(tmp_path / "step-1.pt"))
    assert len(list(tmp_path.iterdir())) == 1
    torchferry.save(OBJ, tmp_path / "step-1.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.pt"]


async def test_clean_of_a_directory_removes_old_temporary_files_that_nobody_has_locked(tmp_path: Path) -> None:
    ours = [
        tmp_path / "run" / name for name in (".torchferry-0123456789abcdef.tmp", ".torchferry-fedcba9876543210.tmp")
    ]
    others = [tmp_path / "run" / "x.tmp", tmp_path / ".torchferry-0123456789abcdef.tmp"]
    ours[0].parent.mkdir()
    for path in (*ours, *others):
        path.write_bytes(b"x")
    hours_ago = time.time() - 7000
    for path in (ours[0], *others):
        os.utime(path, (hours_ago, hours_ago))
    report = await torchferry.clean_async(tmp_path / "run")
    assert [Path(found.path) for found in report.removed] == [ours[0]]
    assert [Path(found.path) for found in report.younger] == [ours[1]]
    assert [path.exists() for path in (*ours, *others)] == [False, True, True, True]
    async with save_under_way(str(tmp_path / "run/step-1.pt")):
        report = await torchferry.clean_async(tmp_path / "run", older_than=0)
        assert [Path(found.path) for found in report.removed] == [ours[1]]
        assert len(report.kept) == 1, "a save has it locked"


@pytest.mark.parametrize(
    "names",
    [
        ("c/save-20240101T000000Z-0123abcd/__0_0.distcp", "c/save-20240101T000000Z-0123abcd/__1_0.distcp"),
        tuple(f"m-20240101T000000Z-0123abcd-0000{number}-of-00002.safetensors" for number in (1, 2)),
    ],
)
async def test_clean_never_touches_the_shards_of_a_save_that_is_under_way(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """Its first shard was finished hours ago, and the last is being staged."""
    first, last = (tmp_path / name for name in names)
    first.parent.mkdir(parents=True, exist_ok=True)
    first.write_bytes(b"x")
    hours_ago = time.time() - 7000
    os.utime(first, (hours_ago, hours_ago))
    async with save_under_way(str(last)):
        report = await torchferry.clean_async(tmp_path)
        assert (len(report.removed), len(report.younger)) == (0, 2)
        report = await torchferry.clean_async(tmp_path, older_than=0)
        assert (len(report.removed), len(report.kept)) == (0, 2), "a save has it locked"
        assert first.exists()
    assert len((await torchferry.clean_async(tmp_path)).removed) == 1
    assert not first.exists()


def test_clean_never_touches_what_is_staged_beside_a_shard_that_was_finished_just_now(tmp_path: Path) -> None:
    save = tmp_path / "save-20240101T000000Z-0123abcd"
    save.mkdir()
    staged = save / ".torchferry-0123456789abcdef.tmp"
    for path in (staged, save / "__0_0.distcp"):
        path.write_bytes(b"x")
    os.utime(staged, (0, 0))
    assert len(torchferry.clean(tmp_path).younger) == 2
    assert len(torchferry.clean(tmp_path, older_than=0).removed) == 2


def test_clean_works_on_any_fsspec_filesystem() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/clean/run/.torchferry-0123456789abcdef.tmp", b"x")
    torchferry.save(OBJ, "memory://clean/run/x.pt")
    assert len(torchferry.clean("memory://clean").younger) == 1
    assert len(torchferry.clean("memory://clean", older_than=0).removed) == 1
    assert torchferry.clean("memory://", older_than=0) == torchferry.CleanReport()
    assert memory.ls("/clean/run", detail=False) == ["/clean/run/x.pt"]


def test_clean_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(torchferry.CheckpointNotFoundError, match="nowhere"):
        torchferry.clean(tmp_path / "nowhere")
    torchferry.save(OBJ, tmp_path / "x.pt")
    with pytest.raises(torchferry.StorageError, match="Not a directory"):
        torchferry.clean(tmp_path / "x.pt")


def test_clean_removes_the_shards_of_a_killed_save_that_no_index_names_and_nobody_elses(tmp_path: Path) -> None:
    """Those that have the time of a save in their names. Plain ones may be anybody's, and others do not look so."""
    tensors = {f"w{i}": torch.ones(100) for i in range(2)}

    def save(name: str) -> set[str]:
        before = {path.name for path in tmp_path.iterdir()}
        torchferry.save(tensors, tmp_path / name, max_shard_size=400)
        return {path.name for path in tmp_path.iterdir()} - before

    save("m.safetensors")
    kept = tmp_path / "kept.index.json"
    (tmp_path / "m.safetensors.index.json").rename(kept)  # another name: it goes on to name the plain shards
    left = save("m.safetensors") - {"m.safetensors.index.json"}
    (tmp_path / "m.safetensors.index.json").unlink()  # as a kill before the index leaves it
    save("m.safetensors")
    torchferry.copy(kept, tmp_path / "n", verify=False)
    torchferry.copy(kept, tmp_path / "n", verify=False)  # an index by the name of a file, of shards with a time
    for name in ("x-20240101-00001-of-00002.safetensors", "x-00001-of-00002.safetensors", "m.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert len(left) == 2
    assert {Path(each.path).name for each in torchferry.clean(tmp_path).younger} == left
    (tmp_path / "damaged.json").write_text("{")
    assert not torchferry.clean(tmp_path, older_than=0).removed
    (tmp_path / "damaged.json").unlink()
    before = {path.name for path in tmp_path.iterdir()}
    assert {Path(each.path).name for each in torchferry.clean(tmp_path, older_than=0).removed} == left
    assert before - {path.name for path in tmp_path.iterdir()} == left
    for index in (kept, tmp_path / "m.safetensors.index.json", tmp_path / "n"):
        assert len(torchferry.load(index)) == 2


def test_clean_leaves_alone_what_is_no_shard_in_a_directory_named_as_of_a_save(tmp_path: Path) -> None:
    """And a checkpoint of somebody's that is called so, whose shards are named as ours."""
    died, theirs = (tmp_path / f"save-20240101T000000Z-0123abc{number}" for number in (1, 2))
    kept = [died / "notes.txt", died / "model.pt", died / "__0_0.distcp.txt", died / "sub/__0_0.distcp"]
    kept += [theirs / "__0_0.distcp", theirs / ".metadata"]
    for path in (died / "__0_0.distcp", *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert len(torchferry.clean(tmp_path, older_than=0).removed) == 1
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.mark.parametrize("older_than", [float("nan"), "1h", -5])
def test_an_age_that_is_no_number_of_seconds_is_refused(tmp_path: Path, older_than: Any) -> None:
    with pytest.raises(torchferry.UnsupportedOptionError, match="older_than= is a number of seconds"):
        torchferry.clean(tmp_path, older_than=older_than)


@pytest.mark.parametrize("older_than", [float("inf"), 1e12])
def test_nothing_is_as_old_as_an_age_before_all_dates(tmp_path: Path, older_than: float) -> None:
    (tmp_path / ".torchferry-1.tmp").touch()
    assert not torchferry.clean(tmp_path, older_than=older_than).removed


def test_command_cleans_and_says_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = tmp_path / ".torchferry-0123456789abcdef.tmp"
    left.write_bytes(b"x")
    assert main(["clean", str(tmp_path)]) == 0
    assert "0 removed, 1 younger, 0 kept" in capsys.readouterr().out
    assert main(["clean", str(tmp_path), "--older-than", "0", "--dry-run"]) == 0
    assert f"would be removed: temporary file file://{left}" in capsys.readouterr().out
    assert left.exists()
    assert main(["clean", str(tmp_path), "--older-than", "0s"]) == 0
    assert "1 removed, 0 younger, 0 kept" in capsys.readouterr().out
    assert not left.exists()
    assert main(["clean", str(tmp_path), "--older-than", "soon"]) == 2
    assert "not a time such as 90s" in capsys.readouterr().err
