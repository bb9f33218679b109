"""Two ranks with a checkpoint manager: what each of them saw, as JSON on standard output. Run by test_manager.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torchferry import CheckpointManager

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.filterwarnings("error", category=UserWarning, module="torchferry")


def error_of(func: Callable[[], Any]) -> str | None:
    try:
        func()
    except Exception as error:  # noqa: BLE001 - what the test wants to see
        return type(error).__name__
    return None


def main(rank: int, place: Path) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
    seen: dict[str, Any] = {}

    with CheckpointManager(place / "run", max_to_keep=2, save_interval_steps=2) as manager:
        seen["nothing yet"] = manager.resume()
        seen["saved"] = [manager.save(step, {"step": step, "rank": rank}) for step in range(1, 7)]
        manager.wait_until_finished()
        seen["restored"] = manager.restore()
        seen["step"] = manager.restored_step
        seen["steps"] = manager.all_steps()
        seen["not there"] = error_of(lambda: manager.restore(2))

    def only_on_rank_1(storage: Any, _: str) -> Any:
        if rank == 1:
            raise RuntimeError("of rank 1")
        return storage

    tensors = CheckpointManager(place / "tensors")
    tensors.save(1, {"a": torch.ones(3)})
    seen["failed on rank 1"] = error_of(lambda: tensors.restore(map_location=only_on_rank_1))
    tensors.close()

    (place / "blocked/step-0000000001.pt").mkdir(parents=True, exist_ok=True)
    blocked = CheckpointManager(place / "blocked", background=False)
    seen["failed on rank 0"] = error_of(lambda: blocked.save(1, {"step": 1}))
    blocked.close()
    blocked = CheckpointManager(place / "blocked")
    seen["began"] = blocked.save(1, {"step": 1})
    seen["failed in the background"] = error_of(blocked.close)

    with CheckpointManager(place / "preempted", save_interval_steps=100, handle_preemption=True) as manager:
        seen["before SIGTERM"] = [manager.save(7, {"step": 7}), manager.reached_preemption()]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        seen["after SIGTERM"] = [manager.reached_preemption(), manager.save(8, {"step": 8})]
        seen["preempted"] = manager.all_steps()
    dist.destroy_process_group()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), Path(sys.argv[2]))))
