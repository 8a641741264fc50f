"""TTTLoRAModule in two processes: each reads its stream as one process reads both."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ttt_lora_module_cases import make_module
from two_processes import in_two_processes

from lightning_modules.streams import StreamPlan
from lightning_modules.ttt_lora import TTTLoRAModule

LENGTH, STEPS, TBPTT = 12, 4, 2
FEATURES = {"vocab_size": 64, "chunk_length": LENGTH, "tbptt": TBPTT, "mode": "stream"}
FILES = ((0, 3, 5, 8), (1, 5, 8))
"""Of each row: chunks with which its files begin, the last one is its end. They differ by row."""


def built(method: str) -> TTTLoRAModule:
    module = make_module(method)
    module.build(FEATURES)
    return module.double()


def chunk_of(number: int, rows: tuple[int, ...]) -> dict[str, Any]:
    """Chunk of a step for these rows, files of different lengths in each."""
    columns: dict[str, list[Any]] = {"stream_id": [], "chunk_index": [], "is_first": []}
    tokens = []
    for row in rows:
        begins = (0, *FILES[row])
        file = max(i for i, begin in enumerate(begins) if begin <= number)
        columns["stream_id"].append(10 * row + file)
        columns["chunk_index"].append(number - begins[file])
        columns["is_first"].append(number == begins[file])
        generator = torch.Generator().manual_seed(100 * row + number)
        tokens.append(torch.randint(0, 64, (LENGTH + 1,), generator=generator))
    ids = torch.stack(tokens)
    plan = StreamPlan(*(tuple(columns[name]) for name in StreamPlan._fields))
    stream = {name: torch.tensor(values) for name, values in columns.items()}
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "plan": plan, **stream}


class Steps(nn.Module):
    """The losses of a step's chunks as the forward call that DistributedDataParallel wraps."""

    def __init__(self, module: TTTLoRAModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: int, rows: tuple[int, ...]) -> Tensor:
        module, chunks = self.module, range(step * TBPTT, (step + 1) * TBPTT)
        module.streams.begin_step("train")
        losses = []
        for number in chunks:
            chunk = chunk_of(number, rows)
            losses.append(module.chunk_loss(chunk, module.streams.begin(chunk), None))
        return torch.stack(losses).sum()


def learn(model: nn.Module, module: TTTLoRAModule, rows: tuple[int, ...]) -> dict[str, Any]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(step, rows).backward()
        module.streams.commit()
        optimizer.step()
    return {"weights": module.state_dict(), "slots": module.streams.slots("train")}


def train_in_process(rank: int, folder: Path, method: str) -> None:
    module = built(method)
    model = nn.parallel.DistributedDataParallel(Steps(module), broadcast_buffers=False)
    torch.save(learn(model, module, (rank,)), folder / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ttt_lora+lora", "in_place"])
def test_two_processes_learn_what_one_learns_from_both_streams(method: str, tmp_path: Path) -> None:
    in_two_processes(train_in_process, tmp_path, method)
    module = built(method)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    whole = learn(Steps(module), module, (0, 1))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    trained = [name for name, p in module.named_parameters()]
    assert any((whole["weights"][n] - start[n]).abs().max() > 1e-3 for n in trained)
    # float64: the mean of two sums in another order, through four steps
    close = {"rtol": 1e-9, "atol": 1e-11}
    for part in parts:
        for name in trained:
            torch.testing.assert_close(part["weights"][name], whole["weights"][name], **close)
    assert whole["slots"]
    for slot, fields in whole["slots"].items():
        for key, rows in fields.items():
            both = torch.cat([part["slots"][slot][key] for part in parts])
            torch.testing.assert_close(both, rows, **close)
        learned = fields["dw"]
        assert (learned[0] - learned[1]).abs().max() > 1e-6, "both rows learned the same"
