"""Leak canary: on tokens that nobody can predict, only a model that reads the future beats chance.

Tokens are independent and uniform over V, so that no causal model can have a loss below ln V. Each
routing strategy is trained on fresh ones and measured on others.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from memory_cases import memory_options
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.models.memory import inject_memory

VOCABULARY, LENGTH, ROWS = 32, 8, 64
CHANCE = math.log(VOCABULARY)
PROMPT = (torch.arange(LENGTH) < 2).expand(ROWS, -1)


def trained(strategy: str, steps: int = 300, **router: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    router = {"num_chapters": 32, "block_size": 2, "window": 4, **router}
    inject_memory(model, memory_options(strategy, bank={"num_rows": 128}, router=router))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model, *draw()).mean().backward()
        optimizer.step()
    return model.eval()


def draw() -> tuple[Tensor, Tensor]:
    """Inputs and labels, fresh in every call."""
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


def losses(model: LlamaForCausalLM, inputs: Tensor, labels: Tensor) -> Tensor:
    """Loss of every token, `[rows, T]`."""
    prompt = PROMPT[:, : inputs.shape[1]]
    logits = model(input_ids=inputs, use_cache=False, prompt_mask=prompt).logits
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


@torch.no_grad()
def measured(model: LlamaForCausalLM, prefixes: bool = False) -> tuple[float, float]:
    """Mean loss of 100,000 fresh tokens and its standard error; of the last token of prefixes."""
    found = []
    for _ in range(200):
        inputs, labels = draw()
        if not prefixes:
            found.append(losses(model, inputs, labels).flatten())
        for end in range(1, LENGTH + 1) if prefixes else ():
            found.append(losses(model, inputs[:, :end], labels[:, :end])[:, -1])
    values = torch.cat(found)
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize(
    ("strategy", "router"),
    [
        ("token", {}),
        ("block", {}),
        ("rolling", {}),
        ("prompt", {}),
        ("block", {"mixing": "mixture", "shared": 2}),
    ],
    ids=["token", "block", "rolling", "prompt", "mixture with shared chapters"],
)
def test_causal_routing_never_beats_chance(strategy: str, router: dict[str, object]) -> None:
    loss, error = measured(trained(strategy, **router))
    assert loss >= CHANCE - 3 * error, f"{loss} nats, but chance is {CHANCE}"
    assert loss < CHANCE + 0.02  # trained, not broken


def test_routing_by_the_whole_sequence_beats_chance_and_prefixes_show_that_it_cheats() -> None:
    model = trained("sequence")
    loss, error = measured(model)
    assert loss < CHANCE - 20 * error, f"{loss} nats: the canary has no power"
    honest, error = measured(model, prefixes=True)
    assert honest >= CHANCE - 3 * error
