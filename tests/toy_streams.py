"""A tiny LightningModule over streams for the tests of callbacks: it publishes every topic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.file_boundary import FileBoundaryReset
from lightning_modules.streams import NO_STREAM, FastState, StreamPlan, StreamState

ROWS, TOKENS, HIDDEN, HEADS = 4, 5, 8, 2


class ToyModule(pl.LightningModule):
    """`depth` gated linear layers; every chunk publishes what monitors know.

    `history` keeps what was published, one entry per chunk, as the numbers to compare with.
    """

    def __init__(self, depth: int = 3, lr: float = 0.05) -> None:
        super().__init__()

        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(depth))
        self.dropout = nn.Dropout(0.1)
        self.alpha = nn.Parameter(torch.full((HIDDEN,), 0.3))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.lr = lr
        self.streams = StreamState()
        self.history: list[dict[str, Any]] = []
        self.poison: tuple[int, str, int] | None = None
        """(chunk number, slot, row) whose fast state becomes NaN."""

    def forward(self, x: Tensor, fast_state: FastState) -> Tensor:
        for index, layer in enumerate(self.layers):
            branch = layer(x)
            gate = torch.tanh(branch.mean(dim=1, keepdim=True))
            self._publish(f"layers.{index}.self_attn", gate, branch, x, fast_state)
            x = x + gate * self.dropout(branch) * torch.tanh(self.alpha)
        return x * self.scale

    def _publish(
        self, slot: str, gate: Tensor, branch: Tensor, x: Tensor, fast_state: FastState
    ) -> None:
        rows = branch.detach().reshape(len(branch), HEADS, -1)
        if fast_state.listens("gate"):
            ratio = (gate * branch).norm(dim=(1, 2)) / x.norm(dim=(1, 2))
            fast_state.publish(
                "gate", slot, gate_attn=2 * gate, gate_ttt=gate * torch.tanh(self.alpha),
                alpha=torch.tanh(self.alpha), ratio_attn=2 * ratio, ratio_ttt=ratio,
            )  # fmt: skip
        if fast_state.listens("fast_weight"):
            norm = rows.norm(dim=2)
            if self.poison is not None and self.poison[:2] == (len(self.history), slot):
                norm = norm.clone()
                norm[self.poison[2]] = float("nan")
            fast_state.publish(
                "fast_weight", slot, state_norm=norm, weight_norm=norm.new_full((HEADS,), 3.0),
                cosine=torch.cos(norm), eta=rows.abs().unsqueeze(1).mean(-1).expand(-1, TOKENS, -1),
            )  # fmt: skip
        if fast_state.listens("inner_loss"):
            before = rows.square().mean(dim=2)
            fast_state.publish("inner_loss", slot, before=before, after=0.5 * before)

    def training_step(self, batch: list[dict[str, Any]], batch_idx: int) -> Tensor:
        loss = torch.zeros((), device=self.device)
        for chunk in batch:
            fast_state = self.streams.begin(chunk)
            if fast_state.listens("gate"):
                fast_state.publish("gate", "model", time=chunk["time"])
            loss = loss + self(chunk["x"], fast_state).square().mean()
            self.history.append({"published": fast_state.published, "chunk": chunk})
        self.log("train/loss", loss.detach())
        self.seen += 1
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def toy_batches(steps: int, chunks: int = 2, idle_row: int | None = None) -> list[list[dict]]:
    """Batches of `chunks` chunks; row r reads files 10 r, 10 r + 1, ... of 3 + r chunks each."""
    generator = torch.Generator().manual_seed(1)
    position = [(10 * row, 0) for row in range(ROWS)]
    batches = []
    for _ in range(steps):
        batches.append([_chunk(position, idle_row, generator) for _ in range(chunks)])
    return batches


def _chunk(position: list[tuple[int, int]], idle_row: int | None, generator: Any) -> dict:
    ids = [NO_STREAM if row == idle_row else stream for row, (stream, _) in enumerate(position)]
    index = [0 if row == idle_row else place for row, (_, place) in enumerate(position)]
    plan = StreamPlan(tuple(ids), tuple(index), tuple(place == 0 for place in index))
    for row, (stream, place) in enumerate(position):
        position[row] = (stream + 1, 0) if place == 2 + row else (stream, place + 1)
    return {
        "x": torch.randn(ROWS, TOKENS, HIDDEN, generator=generator),
        "time": torch.rand(ROWS, generator=generator),
        "stream_id": torch.tensor(plan.stream_id),
        "chunk_index": torch.tensor(plan.chunk_index),
        "is_first": torch.tensor(plan.is_first),
        "plan": plan,
    }


def same(item: Any) -> Any:
    """Collate function that changes nothing."""
    return item


def fit(
    module: pl.LightningModule,
    batches: list[Any],
    folder: Path,
    callbacks: list[pl.Callback],
    ckpt_path: str | None = None,
    **options: Any,
) -> pl.Trainer:
    """`Trainer.fit` with a TensorBoard logger and nothing else that would wait for the device."""
    defaults = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False}
    options = defaults | {"log_every_n_steps": 1000} | options
    trainer = pl.Trainer(
        logger=TensorBoardLogger(folder, name="", version="", max_queue=10000),
        callbacks=[*callbacks, FileBoundaryReset()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = DataLoader(batches, batch_size=None, collate_fn=same)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def read_tensorboard(folder: Path) -> EventAccumulator:
    """Everything that was written into the event files of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def scalar(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Values of a scalar tag by step."""
    return {event.step: event.value for event in events.Scalars(tag)}
