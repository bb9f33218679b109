from __future__ import annotations

from torchferry.engine.transfer import Transfer, current


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
