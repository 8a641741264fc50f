"""Run a function in two or more processes that reduce over gloo."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 300
"""A process that takes longer hangs: it is killed, and the test fails."""


def in_two_processes(work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `work(rank, folder, *args)` in ranks 0 and 1; fails unless both end well.

    Args:
        work: function of a module, which child processes can import.
        folder: empty; for the processes' meeting point and for what `work` saves.
        *args: further arguments of `work`.
    """
    in_processes(2, work, folder, *args)


def in_processes(world: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    """As `in_two_processes`, in ranks 0 to world - 1."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_run, args=(rank, world, work, folder, args))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    for worker in workers:
        worker.kill()
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * world


def _run(
    rank: int, world: int, work: Callable[..., None], folder: Path, args: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    work(rank, folder, *args)
    # A DistributedDataParallel that outlives the group can hang in the destructor of gloo.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
