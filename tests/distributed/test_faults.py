"""What goes wrong while ranks save and load: the old checkpoint or the new one, on every rank, and no rank waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from s3fs import S3FileSystem
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import torchferry
import torchferry.distributed as ferry
from torchferry.distributed import writer
from torchferry.engine.types import ObjectStat
from torchferry.storage.local import LocalBackend
from torchferry.storage.registry import open_backend
from torchferry.testing.faultproxy import Fault

TIMEOUT = 20.0  # of the process groups: what hangs fails the test


def keys_below(s3_client: Any, url: str) -> list[str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    page = s3_client.list_objects_v2(Bucket=bucket, Prefix=prefix)
    return sorted(found["Key"].removeprefix(f"{prefix}/") for found in page.get("Contents", []))


def stale(url: str, options: dict[str, Any]) -> list[ferry.StaleSave]:
    backend, path = open_backend(f"{url}/x", storage_options=options)
    return asyncio.run_coroutine_threadsafe(
        ferry.stale_saves(backend, path.removesuffix("x")), backend.loop or asyncio.new_event_loop()
    ).result(30)


@pytest.mark.parametrize(("refused", "rank"), [("__1_0.distcp", 1), (".metadata", 0)])
def test_a_part_that_is_refused_fails_the_save_on_every_rank(
    ranks: Any, s3_url: str, s3_client: Any, s3_storage_options: dict[str, Any], faulty_s3: Any, refused: str, rank: int
) -> None:
    """The error names the rank, the cause and the URL; the old checkpoint stays, and nothing else."""
    ranks.run("save_tensors", 2, url=s3_url, options=s3_storage_options)
    before = keys_below(s3_client, s3_url)
    options = faulty_s3(
        Fault(method="PUT", target=refused, status=403, code="AccessDenied", times=None)
    ).storage_options
    answers = ranks.try_to("save_tensors", 2, timeout=TIMEOUT, url=s3_url, options=options, fill=2.0)
    for answer in answers:
        assert answer.kind == "StoragePermissionError"
        assert s3_url in answer.text
        assert f"rank {rank} of 2" in answer.text
    if rank:
        assert keys_below(s3_client, s3_url) == before
    assert ranks.run("load_tensors", 2, url=s3_url, options=s3_storage_options) == [1.0, 1.0]


@pytest.mark.parametrize("times", [1, None])
def test_an_item_that_is_damaged_on_its_way_is_read_again_once(
    s3_url: str, s3_storage_options: dict[str, Any], faulty_s3: Any, caplog: pytest.LogCaptureFixture, times: int | None
) -> None:
    saved = {"large": torch.randn(2, 1 << 20), "small": torch.randn(1000)}
    ferry.save(saved, s3_url, storage_options=s3_storage_options, no_dist=True)
    fault = Fault(method="GET", target=r"\.distcp", times=times, corrupt_download_byte=3_000)  # both have it
    faulty = faulty_s3(fault).storage_options
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    if times is None:
        with pytest.raises(torchferry.CheckpointCorruptError, match="is damaged"):
            ferry.load(loaded, s3_url, storage_options=faulty, no_dist=True)
        return
    ferry.load(loaded, s3_url, storage_options=faulty, no_dist=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
    assert "Reading it again" in caplog.text


@pytest.mark.parametrize("verb", ["verify", "copy"])
@pytest.mark.parametrize("times", [1, None])
def test_a_shard_that_is_damaged_on_its_way_is_verified_and_copied_again(
    s3_url: str, s3_storage_options: dict[str, Any], faulty_s3: Any, verb: str, times: int | None
) -> None:
    saved = {"large": torch.randn(2, 1 << 20), "small": torch.randn(1000)}
    ferry.save(saved, f"{s3_url}/a", storage_options=s3_storage_options, no_dist=True)
    fault = Fault(method="GET", target=r"\.distcp", times=times, corrupt_download_byte=3_000_000)
    options = faulty_s3(fault).storage_options

    def go() -> None:
        if verb == "verify":
            torchferry.verify(f"{s3_url}/a", storage_options=options)
        else:
            other = {"target_storage_options": s3_storage_options}
            torchferry.copy(f"{s3_url}/a/", f"{s3_url}/b/", source_storage_options=options, **other)

    if times is None:
        with pytest.raises(torchferry.CheckpointCorruptError, match="large"):
            go()
        return
    go()
    assert fault.times != 1
    if verb == "copy":
        loaded = torchferry.load(f"{s3_url}/b", storage_options=s3_storage_options)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("where", ["before", "in", "behind"])
def test_a_stock_item_that_is_damaged_on_its_way_is_read_again(
    tmp_path: Path, s3_url: str, s3_storage_options: dict[str, Any], faulty_s3: Any, where: str
) -> None:
    """The tensor of the second of three items, or the archive before or behind it."""
    saved = {f"{number}": torch.randn(3 << 17) for number in range(3)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    S3FileSystem(**s3_storage_options).put(f"{tmp_path}/", f"{s3_url}/", recursive=True)
    item = (tmp_path / "__0_0.distcp").stat().st_size // 3
    # Both ends of the first item are looked into; the next request is for all bytes from its tensor on.
    byte = item + {"before": -200, "in": 3_000, "behind": saved["0"].nbytes + 50}[where]
    fault = Fault(method="GET", target=r"\.distcp", skip=2, corrupt_download_byte=byte)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    ferry.load(loaded, s3_url, storage_options=faulty_s3(fault).storage_options, no_dist=True)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.items())
    assert fault.times != 1


@pytest.mark.parametrize(
    ("when", "victim", "after"),
    [
        ("before its shard", 1, 1.0),
        ("during its shard", 1, 1.0),
        ("after its shard", 1, 1.0),
        ("before .metadata", 0, 1.0),
        ("after .metadata", 0, 2.0),
    ],
)
def test_a_rank_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(
    ranks: Any, s3_url: str, s3_storage_options: dict[str, Any], when: str, victim: int, after: float
) -> None:
    place = {"url": s3_url, "options": s3_storage_options}
    ranks.run("save_tensors", 2, **place)
    answers = ranks.try_to("save_and_die", 2, timeout=TIMEOUT, when=when, victim=victim, **place)
    assert answers[victim].kind == "killed"
    assert answers[1 - victim].kind == "RankFailedError"
    assert ranks.run("load_tensors", 2, **place) == [after, after]
    left = stale(s3_url, s3_storage_options)
    ranks.run("save_tensors", 2, fill=3.0, **place)
    assert torchferry.load(s3_url, storage_options=s3_storage_options)["rows"].unique().tolist() == [3.0]
    if victim == 0:
        assert left
    else:  # the rank that would have committed is alive, and has removed its own
        shards = [path.rpartition("/")[2] for save in left for path in save.paths]
        assert shards == (["__1_0.distcp"] if when == "after its shard" else [])
    assert all(save.age < 300 for save in left)


def test_an_error_of_one_rank_reaches_all_while_loading(
    ranks: Any, s3_url: str, s3_client: Any, s3_storage_options: dict[str, Any]
) -> None:
    place = {"url": s3_url, "options": s3_storage_options}
    missing = ranks.try_to("load_tensors", 2, timeout=TIMEOUT, **place)
    assert [answer.kind for answer in missing] == ["CheckpointNotFoundError"] * 2
    ranks.run("save_tensors", 2, **place)
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    shard = next(key for key in keys_below(s3_client, s3_url) if key.endswith("__1_0.distcp"))
    body = s3_client.get_object(Bucket=bucket, Key=f"{prefix}/{shard}")["Body"].read()
    flipped = bytearray(body)
    flipped[len(flipped) // 2] ^= 1
    s3_client.put_object(Bucket=bucket, Key=f"{prefix}/{shard}", Body=bytes(flipped))
    changed = ranks.try_to("load_tensors", 2, timeout=TIMEOUT, **place)
    assert [answer.kind for answer in changed] == ["CheckpointChangedError"] * 2
    assert "__1_0.distcp" in changed[0].text


def test_a_flipped_bit_is_found_though_each_rank_reads_a_part(ranks: Any, tmp_path: Path) -> None:
    """Two ranks have saved, three load: no rank reads an item as a whole, and all know."""
    url = str(tmp_path / "c")
    ranks.run("save_tensors", 2, url=url, options={})
    ranks.run("load_rows", 3, url=url, options={})
    (shard,) = (tmp_path / "c").rglob("__1_0.distcp")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    answers = ranks.try_to("load_rows", 3, timeout=TIMEOUT, url=url, options={})
    assert [answer.kind for answer in answers] == ["CheckpointCorruptError"] * 3
    assert "rows at" in answers[0].text


@pytest.mark.parametrize("times", [1, None])
def test_a_bit_that_flips_on_its_way_is_read_again_once_though_each_rank_reads_a_part(
    ranks: Any, s3_url: str, s3_storage_options: dict[str, Any], faulty_s3: Any, times: int | None
) -> None:
    ranks.run("save_tensors", 2, url=s3_url, options=s3_storage_options)
    fault = Fault(method="GET", target=r"\.distcp", times=times, corrupt_download_byte=3_000)
    options = faulty_s3(fault).storage_options
    answers = ranks.try_to("load_rows", 3, timeout=TIMEOUT, url=s3_url, options=options)
    if times is None:
        assert [answer.kind for answer in answers] == ["CheckpointCorruptError"] * 3
        return
    assert [values for values, _ in answers] == [[1.0]] * 3
    assert any("rows does not match its CRC32. Reading it again." in text for _, said in answers for text in said)


def test_an_error_of_the_rank_that_reads_for_all_reaches_all(ranks: Any, tmp_path: Path) -> None:
    """And a rank that dies before it sends leaves none waiting."""
    place: dict[str, Any] = {"url": str(tmp_path / "c"), "options": {}}
    ranks.run("save_model", 2, kind="ddp", how=("ours",), **place)
    place["url"] = str(tmp_path / "c/ours")
    answers = ranks.try_to("load_alike_and_die", 2, timeout=TIMEOUT, **place)
    assert answers[1].kind == "killed"
    assert answers[0].kind == "RankFailedError"
    for shard in (tmp_path / "c").rglob("*.distcp"):
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    answers = ranks.try_to("load_alike", 2, timeout=TIMEOUT, **place)
    assert [answer.kind for answer in answers] == ["CheckpointCorruptError"] * 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_long_save_whose_shards_somebody_removed_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cleaned(ferry.StorageWriter):
        def finish(self, metadata: Any, results: Any) -> None:
            torchferry.clean(tmp_path, older_than=0)
            super().finish(metadata, results)

    ferry.save({"a": torch.ones(3)}, tmp_path, no_dist=True)
    monkeypatch.setattr(writer, "new_save_name", lambda: "save-20240101T000000Z-0123abcd")  # it began long ago
    with pytest.raises(CheckpointException, match="was removed while the save was under way"):
        dcp.save({"a": torch.zeros(3)}, storage_writer=Cleaned(tmp_path), no_dist=True)
    assert torch.equal(torchferry.load(tmp_path)["a"], torch.ones(3))
    ferry.save({"a": torch.zeros(3)}, tmp_path, no_dist=True)  # one of whose shards all are there
    assert torch.equal(torchferry.load(tmp_path)["a"], torch.zeros(3))


@pytest.mark.parametrize(("sharded", "times"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_clean_goes_on_when_a_save_commits_while_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sharded: bool, times: int
) -> None:
    """It reads again what names the shards; where that changes once more, what lies beside it is left alone."""

    def save(name: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        if sharded:
            ferry.save({"a": torch.ones(3)}, tmp_path / name, no_dist=True)
        else:
            torchferry.save({"a": torch.ones(3)}, tmp_path / name / "m.safetensors", max_shard_size=4)

    published = ".metadata" if sharded else "m.safetensors.index.json"
    commits: list[str] = []
    stat = LocalBackend.stat

    async def stat_and_commit(self: LocalBackend, path: str) -> ObjectStat:
        found = await stat(self, path)
        if path.endswith(f"/busy/{published}") and len(commits) < times:
            commits.append(path)
            new = Path(path).with_name("new")
            new.write_bytes(Path(path).read_bytes())
            new.replace(path)
        return found

    for name in ("busy", "dead"):
        save(name)
        save(name)  # the second of two has the time in its shards' names
        if name == "dead":
            (tmp_path / name / published).unlink()
    left = {path for path in (tmp_path / "dead").rglob("*") if path.is_file()}
    monkeypatch.setattr(LocalBackend, "stat", stat_and_commit)
    assert torchferry.clean(tmp_path, older_than=0).removed
    assert len(commits) == times
    assert left > {path for path in (tmp_path / "dead").rglob("*") if path.is_file()}
    assert ("left alone" in caplog.text) is (times == 2)
    assert torchferry.load(tmp_path / "busy" / ("" if sharded else published))["a"].tolist() == [1, 1, 1]


def test_two_saves_at_once_to_one_url_leave_one_of_them(
    ranks: Any, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    """Each is of two ranks, whose groups know nothing of each other."""
    place = {"url": s3_url, "options": s3_storage_options}
    ranks.run("save_two_at_once", 4, **place)
    left = torchferry.load(s3_url, storage_options=s3_storage_options)
    values = {float(value) for tensor in left.values() for value in tensor.unique()}
    assert values in ({1.0}, {2.0})


@pytest.mark.parametrize("how", ["save", "async_save"])
def test_what_one_rank_cannot_save_fails_on_all_and_never_mixes_with_the_next_save(
    ranks: Any, tmp_path: Path, how: str
) -> None:
    answers = ranks.run("save_after_a_failure", 2, url=str(tmp_path), options={}, how=how)
    for (said,) in answers:
        assert "rank 1 of 2 failed: ValueError: no state yet" in said
    loaded = torchferry.load(tmp_path)
    assert {name: tensor.unique().tolist() for name, tensor in loaded.items()} == {
        "rows": [2.0],
        "columns": [2.0],
        "replicated": [2.0],
    }


def test_ranks_that_name_several_places_are_refused(ranks: Any, tmp_path: Path) -> None:
    urls = [str(tmp_path / "a"), str(tmp_path / "b")]
    for answer in ranks.try_to("save_to_several_places", 2, timeout=TIMEOUT, urls=urls):
        assert answer.kind == "CheckpointValueError"
        assert all(url in answer.text for url in urls)
    assert not list(tmp_path.rglob(".metadata"))
    assert not list(tmp_path.rglob("*.distcp"))
    for url in urls:
        ferry.save({"a": torch.ones(3)}, url, no_dist=True)
    for answer in ranks.try_to("load_from_several_places", 2, timeout=TIMEOUT, urls=urls):
        assert answer.kind == "CheckpointValueError"


def test_a_group_that_is_destroyed_before_the_save_is_over_is_an_error_and_no_part_of_a_checkpoint(
    ranks: Any, tmp_path: Path
) -> None:
    for said in ranks.run("save_and_destroy_the_group", 2, url=str(tmp_path)):
        assert said.startswith("RankFailedError")
        assert "the process group was destroyed" in said
    assert not (tmp_path / ".metadata").exists()


def test_a_series_of_a_part_of_the_ranks_is_opened_again_and_no_rank_hangs(ranks: Any, tmp_path: Path) -> None:
    for answer in ranks.try_to("series_of_a_part_of_the_ranks", 4, url=str(tmp_path), timeout=20.0):
        assert answer == ([0, 1, 2], 3)


def test_what_fails_on_one_rank_before_or_after_a_load_fails_on_all(ranks: Any, tmp_path: Path) -> None:
    for said in ranks.try_to("load_into_what_fails", 2, url=str(tmp_path), timeout=20.0):
        assert len(said) == 2
        assert "rank 1 of 2 failed: ValueError: no state yet" in said[0]
        assert "rank 1 of 2 failed: ValueError: not with ['x']" in said[1]


@pytest.mark.parametrize("times", [1, 9])
def test_ranks_restore_one_version_or_say_that_it_was_replaced(ranks: Any, tmp_path: Path, times: int) -> None:
    first, second = ranks.try_to("restore_what_is_replaced", 2, url=str(tmp_path), times=times, timeout=20.0)
    assert first == second
    if times == 1:
        assert first == [1.0, 1.0]
    else:
        assert "was replaced while the ranks loaded it" in first


def test_groups_of_our_own_wait_as_long_as_that_of_the_training(ranks: Any) -> None:
    for answer in ranks.try_to("timeouts_of_groups", 2, timeout=17.0):
        assert answer == [17.0, 17.0]
