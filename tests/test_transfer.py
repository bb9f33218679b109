"""One transfer: what it counts, what it tells the user's callback, and the report of it."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest
import torch
from fsspec.callbacks import Callback
from opentelemetry import trace

import torchferry
from torchferry import TransferReport
from torchferry.engine import transfer as transfer_module
from torchferry.engine.transfer import Transfer, current
from torchferry.engine.types import MIB


def test_bytes_that_move_again_after_a_failure_are_no_progress() -> None:
    """Or a store that takes a part and then answers 503, each time, would never be given up."""
    transfer = Transfer("save", "x://y")
    transfer.moved(100)
    transfer.last_progress = 0.0
    transfer.moved(-100)
    transfer.moved(100)
    assert transfer.last_progress == 0.0
    transfer.moved(1)
    assert transfer.last_progress > 0.0


def test_reads_of_a_copy_are_progress_of_the_copy_and_not_counted() -> None:
    transfer = Transfer("copy", "x://y")
    with transfer.running(None), transfer.reading_side():
        transfer.last_progress = 0.0
        current().moved(5)
    assert transfer.last_progress > 0.0
    assert transfer.report().nbytes == 0


async def test_the_callback_hears_the_last_byte_only_when_the_object_is_there() -> None:
    callback = Callback()
    transfer = Transfer("save", "x://y", callback=callback)
    with transfer.running(None):
        async with transfer.telling():
            transfer.set_size(10)
            transfer.moved(10)
            transfer.tell()
            assert callback.value == 9
        assert callback.value == callback.size == 10


async def test_the_callback_is_told_while_nothing_else_happens() -> None:
    told = anyio.Event()

    class Hearing(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            told.set()

    with anyio.fail_after(30):
        async with Transfer("save", "x://y", callback=Hearing()).telling() as _:
            pass
        transfer = Transfer("save", "x://y", callback=Hearing())
        async with transfer.telling():
            transfer.set_size(10)
            transfer.moved(5)
            await told.wait()


async def test_every_transfer_is_reported(
    s3_url: str, s3_storage_options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "torchferry")
    reports: list[TransferReport] = []
    url, copy = f"{s3_url}/x.pt", f"{s3_url}/y.pt"
    options: dict[str, Any] = {"storage_options": s3_storage_options, "report": reports.append}
    stat = await torchferry.save_async(torch.zeros(10 * MIB), url, **options)
    await torchferry.load_async(url, **options)
    await torchferry.verify_async(url, **options)
    await torchferry.copy_async(
        url,
        copy,
        source_storage_options=s3_storage_options,
        target_storage_options=s3_storage_options,
        report=reports.append,
    )
    assert [(report.verb, report.url) for report in reports] == [
        ("save", url),
        ("load", url),
        ("verify", url),
        ("copy", copy),
    ]
    assert all(report.nbytes == stat.size for report in reports)
    assert all(report.client_bytes == report.retries == 0 for report in reports)
    assert [report.parts for report in reports] == [3, 0, 0, 3]
    assert {"pickling", "sending", "publishing"} <= set(reports[0].stages)
    assert {"opening", "reading", "unpickling"} <= set(reports[1].stages)
    assert all(str(report) in caplog.text for report in reports)


def test_a_save_has_succeeded_also_where_its_report_is_not_taken(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.pt"
    assert torchferry.save([1], path, report=[].index).size == path.stat().st_size
    assert "is not in list" in caplog.text


async def test_a_report_names_no_secret(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchferry")
    reports: list[TransferReport] = []
    url = f"memory://{tmp_path.name}/x.pt?sig=hush"
    await torchferry.save_async([1], url, report=reports.append)
    assert "hush" not in reports[0].url + caplog.text


async def test_what_a_store_says_reaches_the_log_in_one_line_and_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    transfer = Transfer("load", "s3://bucket/key")
    with caplog.at_level("INFO", "torchferry"), transfer.running(None):
        transfer.through_client(1, "status 400 (\x1b[2J\nsave s3://bucket/key: 1.0 MB" + "x" * 1000 + ")")
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 400


async def test_a_transfer_that_fails_is_not_reported_as_done() -> None:
    reports: list[TransferReport] = []
    with pytest.raises(FileNotFoundError):
        await torchferry.load_async("memory://nothing/x.pt", report=reports.append)
    assert reports == []


def test_a_transfer_is_a_span_where_opentelemetry_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Span(trace.NonRecordingSpan):
        def set_attributes(self, attributes: Any) -> None:
            seen.update(attributes)

    class Tracer(trace.NoOpTracer):
        def start_as_current_span(self, name: str, *_: Any, **__: Any) -> Any:
            seen["name"] = name
            return trace.use_span(Span(trace.INVALID_SPAN_CONTEXT))

    monkeypatch.setattr(transfer_module, "_tracer", Tracer)
    with Transfer("save", "x://y").running(None) as transfer:
        transfer.moved(7)
    assert (seen["name"], seen["torchferry.nbytes"]) == ("torchferry.save", 7)
