"""Batches of chunks by worker processes, resumable at the exact batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from datamodules.sampler import ChunkRequest, StreamBatchSampler
from lightning_modules.streams import NO_STREAM, StreamPlan

Chunk = dict[str, Any]


class ChunkDataset(Protocol):
    """What the loader needs: chunks per file, and one chunk by request.

    An idle request brings any sample of the right shapes whose padding flags say that nothing in
    it counts.
    """

    lengths: Sequence[int]

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]: ...


class _Tagged:
    """Map-style view of a dataset whose samples carry the request they answer."""

    def __init__(self, dataset: ChunkDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: ChunkRequest) -> tuple[ChunkRequest, dict[str, Tensor]]:
        return request, self.dataset[request]


def collate_chunks(
    samples: Sequence[tuple[ChunkRequest, dict[str, Tensor]]],
    tbptt: int,
    constants: Mapping[str, Any] | None = None,
) -> list[Chunk]:
    """Stack chunk-major samples into a list of `tbptt` chunks with the stream keys and the plan.

    `constants` go into every chunk as they are.
    """
    rows = len(samples) // tbptt
    parts = (samples[j * rows : (j + 1) * rows] for j in range(tbptt))
    return [{**_collate_chunk(part), **(constants or {})} for part in parts]


def _collate_chunk(samples: Sequence[tuple[ChunkRequest, dict[str, Tensor]]]) -> Chunk:
    requests = [request for request, _ in samples]
    plan = StreamPlan(
        stream_id=tuple(NO_STREAM if r.idle else r.file for r in requests),
        chunk_index=tuple(r.index for r in requests),
        is_first=tuple(r.is_first for r in requests),
    )
    chunk = default_collate([sample for _, sample in samples])
    chunk["stream_id"] = torch.tensor(plan.stream_id)
    chunk["chunk_index"] = torch.tensor(plan.chunk_index)
    chunk["is_first"] = torch.tensor(plan.is_first)
    chunk["plan"] = plan
    if "mask" in chunk:
        # The host can tell now; a model that reads rows without padding is faster.
        chunk["token_counts"] = tuple(chunk["mask"].sum(dim=1).tolist())
        chunk["padded"] = sum(chunk["token_counts"]) < chunk["mask"].numel()
    elif "input_ids" in chunk:
        rows, length = chunk["input_ids"].shape
        chunk["token_counts"] = (length,) * rows
    return chunk


class StreamLoader:
    """Iterable of batches (lists of `tbptt` chunks) that knows and restores its position.

    Not a `DataLoader` itself, so Lightning leaves its order alone; it finds `sampler.set_epoch`
    and saves `state_dict` in every checkpoint.

    Args:
        dataset: source of chunks.
        sampler: their order.
        constants: plain values that every chunk carries beside its tensors.
        num_workers: processes that read ahead; what they read does not change with their number.
        pin_memory: page-locked batches, for faster copies to a GPU.

    Attributes:
        waited: seconds that its user has waited for batches so far.
    """

    def __init__(
        self,
        dataset: ChunkDataset,
        sampler: StreamBatchSampler,
        *,
        constants: Mapping[str, Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.sampler = sampler
        self.batch_sampler = None  # Lightning looks for shuffling in both
        self.waited = 0.0
        self._position = 0
        self._epoch = sampler.epoch  # of which that is the position
        self._resume: dict[str, int] | None = None
        self._loader = DataLoader(
            _Tagged(dataset),  # type: ignore[arg-type]  # a map-style dataset keyed by requests
            batch_sampler=sampler,  # type: ignore[arg-type]
            collate_fn=partial(collate_chunks, tbptt=sampler.tbptt, constants=constants),
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Of its own: an iterator must not draw from the global generator, or a validation
            # run would change the training that follows it.
            generator=torch.Generator().manual_seed(sampler.seed),
        )

    @property
    def _iterator(self) -> Any:
        """The iterator that owns the workers: Lightning looks for it to end them after a run.

        Left to the garbage collector, every worker would hold up the process for five seconds.
        """
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self._loader._iterator = iterator

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[Chunk]]:
        """Batches of the sampler's epoch; after `load_state_dict` only those not yet seen.

        Raises:
            ValueError: the state is of other rows.
        """
        self._position, self._epoch = self._take_resume_position(), self.sampler.epoch
        self.sampler.start = self._position
        begin = time.perf_counter()
        for batch in self._loader:
            self.waited += time.perf_counter() - begin
            self._position += 1
            yield batch
            begin = time.perf_counter()

    def _take_resume_position(self) -> int:
        resume, self._resume = self._resume, None
        if resume is None or resume["epoch"] != self.sampler.epoch:
            return 0
        if resume["position"] > 0:
            self._check_rows(resume)
        return resume["position"]

    def _check_rows(self, resume: Mapping[str, int]) -> None:
        """Raise if batches were made of other rows: their number would be another place."""
        here = self._rows()
        if resume.get("world_size", here["world_size"]) != here["world_size"]:
            return  # the streams start afresh, with a warning of `StreamStateCheckpoint`
        for name, value in here.items():
            if resume.get(name, value) != value:
                raise ValueError(
                    f"the checkpoint was written in the middle of an epoch with {name}="
                    f"{resume[name]}, but {name} is {value} now: its rows, and what they have "
                    f"learned, would not go on; resume with data.init_args.{name}={resume[name]}"
                )

    def _rows(self) -> dict[str, int]:
        """What makes a number of batches a place in the files."""
        sampler = self.sampler
        return {name: getattr(sampler, name) for name in ("batch_size", "tbptt", "world_size")}

    def state_dict(self) -> dict[str, int]:
        """Epoch, number of batches of it that were handed out, and of what rows they are made.

        Until the first batch after `load_state_dict` it is what was loaded, and until the first one
        of an epoch none of that epoch has been handed out.
        """
        if self._resume is not None:
            return dict(self._resume)
        position = self._position if self._epoch == self.sampler.epoch else 0
        return {"epoch": self.sampler.epoch, "position": position, **self._rows()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind the batches that were handed out when `state` was taken."""
        self._resume = dict(state)
