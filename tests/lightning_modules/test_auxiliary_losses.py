"""Losses that layers leave in a chunk's FastState: added once per chunk, logged by name."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.base import AdapterModule, Chunk
from lightning_modules.streams import NO_STREAM, FastState, StreamPlan


class Module(AdapterModule):
    """Two layers that each leave a loss; `recompute` runs them under activation checkpointing."""

    def __init__(self, recompute: bool) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.1), persistent=False)
        self.weights = nn.ParameterList(torch.tensor([1.0, 2.0]) for _ in range(2))
        self.recompute = recompute
        self.logged: dict[str, Tensor] = {}

    def _layer(self, index: int, x: Tensor, fast_state: FastState) -> Tensor:
        weight = self.weights[index]
        fast_state.add_loss(f"layers.{index}", router_balance=0.1 * weight.square().sum())
        return x * weight

    def chunk_loss(self, chunk: Chunk, fast_state: FastState, generator: object) -> Tensor:
        x = chunk["x"]
        for index in range(2):
            if self.recompute:
                x = checkpoint(self._layer, index, x, fast_state, use_reentrant=False)
            else:
                x = self._layer(index, x, fast_state)
        return x.sum()

    def log(self, name: str, value: Tensor, **options: object) -> None:
        self.logged[name] = value


def _chunks() -> list[Chunk]:
    plans = [StreamPlan((0,), (index,), (index == 0,)) for index in range(3)]
    tensors = [{k: torch.tensor(v) for k, v in plan._asdict().items()} for plan in plans]
    return [
        {"x": torch.full((1, 2), 0.5), "plan": plan, **values}
        for plan, values in zip(plans, tensors, strict=True)
    ]


def test_losses_of_all_layers_and_chunks_count_once_with_and_without_checkpointing() -> None:
    for recompute in (False, True):
        module = Module(recompute)
        module.streams.begin_step("train")
        total = module.training_step(_chunks(), 0)
        # three chunks; x w w sums to 0.5 (1 + 4); two layers leave 0.1 (1 + 4) each
        torch.testing.assert_close(total, torch.tensor(3 * (2.5 + 2 * 0.5)))
        torch.testing.assert_close(module.logged["train/loss"], torch.tensor(2.5))
        torch.testing.assert_close(module.logged["train/router_balance"], torch.tensor(1.0))
        total.backward()
        expected = 3 * (torch.tensor([0.5, 1.0]) + 0.2 * torch.tensor([1.0, 2.0]))
        for weight in module.weights:
            torch.testing.assert_close(weight.grad, expected)


def test_a_chunk_without_files_does_not_lower_the_logged_loss() -> None:
    chunks = _chunks()
    ended = StreamPlan((NO_STREAM,), (0,), (True,))
    chunks[2] |= {"plan": ended, **{k: torch.tensor(v) for k, v in ended._asdict().items()}}
    chunks[2]["x"] = torch.zeros(1, 2)  # whose loss is 0
    module = Module(recompute=False)
    module.streams.begin_step("train")
    module.training_step(chunks, 0)
    torch.testing.assert_close(module.logged["train/loss"], torch.tensor(2.5))
