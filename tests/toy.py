"""A LightningModule and a DataModule small enough to train for a few steps in every test."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.base import StreamDataModule
from datamodules.sampler import ChunkRequest
from lightning_modules.base import AdapterModule, Chunk, Schedule
from lightning_modules.streams import FastState

D = 4
LENGTHS = [3, 1, 4, 2, 5, 2, 1, 3]


class ToyState(NamedTuple):
    dw: Tensor


class ToyModule(AdapterModule):
    """One fast-weight layer, with noise and dropout from the global generator."""

    def __init__(self) -> None:
        super().__init__(
            lambda p: torch.optim.AdamW(p, lr=1e-2), Schedule(decay="constant"), persistent=True
        )
        self.weight = nn.Parameter(torch.randn(D, D) * 0.3)
        self.target = nn.Linear(D, D)
        self.dropout = nn.Dropout(0.2)

    def chunk_loss(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> Tensor:
        x = chunk["x"]
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        state = fast_state.read("toy", ToyState)
        dw = x.new_zeros(len(x), D, D) if state is None else state.dw
        dw = dw - 0.1 * x.transpose(1, 2) @ (x @ (self.weight + dw) - torch.tanh(self.target(x)))
        fast_state.write("toy", ToyState(dw))
        error = (self.dropout(x) @ (self.weight + dw) - chunk["y"]) * chunk["mask"][..., None]
        return error.square().mean()


class ToyDataset:
    lengths = LENGTHS

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(100 * max(0, request.file) + request.index)
        x = torch.randn(6, D, generator=generator)
        mask = torch.full((6,), not request.idle)
        return {"x": x, "y": x.roll(1, 0), "mask": mask}


class ToyData(StreamDataModule):
    def build_dataset(self, stage: str) -> ToyDataset:
        return ToyDataset()
