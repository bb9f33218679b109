"""Models saved with one number of ranks and loaded with another, by us and by the stock writer and reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

WAYS = (("ours", "ours"), ("ours", "stock"), ("stock", "ours"))


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("fsdp2", 2), [("fsdp2", 3), ("plain", 1), ("tp", 2)]),
        (("fsdp2", 3), [("fsdp2", 4), ("fsdp1", 2)]),
        (("fsdp1", 4), [("fsdp1", 3), ("hsdp", 4)]),
        (("hsdp", 4), [("fsdp2", 2), ("ddp", 3)]),
        (("tp", 2), [("tp", 4), ("fsdp2", 3)]),
        (("ddp", 2), [("ddp", 3), ("fsdp2", 2)]),
        (("plain", 1), [("fsdp2", 4)]),
    ],
    ids=lambda value: f"{value[0]}-{value[1]}" if isinstance(value, tuple) else "",
)
def test_a_model_and_its_optimizer_load_on_other_ranks_and_in_other_placements(
    ranks: Any,
    s3_url: str,
    s3_storage_options: dict[str, Any],
    saved: tuple[str, int],
    loaded: list[tuple[str, int]],
) -> None:
    """Stock readers read what we wrote; ours reads what the stock writer wrote."""
    place = {"url": s3_url, "options": s3_storage_options}
    kind, world = saved
    ranks.run("save_model", world, kind=kind, how=("ours", "stock"), **place)
    for kind, world in loaded:
        ranks.run("load_model", world, kind=kind, how=WAYS, **place)


def test_stock_functions_take_our_writer_and_reader(
    ranks: Any, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    place = {"url": s3_url, "options": s3_storage_options}
    ranks.run("save_model", 2, kind="fsdp2", how=("stock with ours",), **place)
    ranks.run("load_model", 3, kind="fsdp2", how=(("stock with ours", "stock with ours"),), **place)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_all_ranks_ask_for_is_read_once_and_broadcast(
    ranks: Any, s3_url: str, s3_storage_options: dict[str, Any], kind: str
) -> None:
    """Each rank reads about as much of it; under FSDP2, parts and what is replicated beside them."""
    place = {"url": s3_url, "options": s3_storage_options}
    ranks.run("save_model", 2, kind="ddp", how=("ours",), **place)
    place["url"] = f"{s3_url}/ours"
    (whole,) = ranks.run("load_alike", 1, **place)
    moved = ranks.run("load_alike", 3, kind=kind, **place)
    assert sum(moved) < whole * 1.02
    assert max(moved) < whole * 0.5


def test_ranks_that_want_other_dtypes_read_for_themselves(
    ranks: Any, s3_url: str, s3_storage_options: dict[str, Any]
) -> None:
    place = {"url": s3_url, "options": s3_storage_options}
    ranks.run("save_model", 2, kind="ddp", how=("ours",), **place)
    place["url"] = f"{s3_url}/ours"
    first, second = ranks.run("load_alike", 2, other=True, **place)
    assert first == second > 6 << 20


@pytest.mark.parametrize("background", [True, False])
def test_a_manager_keeps_a_series_of_sharded_checkpoints(
    ranks: Any, s3_url: str, s3_storage_options: dict[str, Any], background: bool
) -> None:
    first, second = ranks.run("manage", 2, url=s3_url, options=s3_storage_options, background=background)
    assert first == ([3, 4], 4.0, 4)
    assert second == ([], 4.0, 4)


def test_what_fails_on_one_rank_of_a_series_fails_on_all_and_the_next_step_is_saved(ranks: Any, tmp_path: Path) -> None:
    for said, latest in ranks.run("manage_with_failures", 2, url=str(tmp_path)):
        first, second = said
        assert "not today" in first
        assert "A metric is a number or text" in second
        assert latest == 3


def test_a_part_of_a_tensor_is_refused_as_one_object(ranks: Any, tmp_path: Path) -> None:
    """It would look complete. A replicated tensor is whole, and whoever means a part says so."""
    for said in ranks.run("save_one_object", 2, path=str(tmp_path)):
        *parts, whole = said
        assert whole == ""
        for text in parts:
            assert "StateDictOptions(full_state_dict=True, cpu_offload=True)" in text
            assert "torchferry.distributed.save" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-3.pt", "0-part.pt", "1-3.pt", "1-part.pt"]
