"""What every adapter can do in every architecture: each check raises AssertionError if it cannot.

The tests run these checks one by one (`tests/adapters/test_architectures.py`), and
`benchmarks/adapter_matrix.py` prints them as a table.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architecture_cases import (
    ARCHITECTURES,
    CLOSE,
    AdapterCase,
    adapted_model,
    assert_every_parameter_learns,
    build_model,
    tokens,
)
from pi0_capabilities import CHECKS as PI0_CHECKS
from pi0_capabilities import PI0
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from lightning_modules.adapters import inject_adapters, remove_adapters
from lightning_modules.generation import FastStateCache
from lightning_modules.streams import FastState

LENGTH, NEW_TOKENS = 11, 7
"""Longer than the sliding window and than two mini-batches, and no multiple of either."""


def zero_gate(architecture: str, case: AdapterCase, attention: str = "sdpa") -> None:
    """An adapter that adds nothing leaves the base's logits bit-identical, in both modes."""
    model, ids = build_model(architecture, attention), tokens(2, LENGTH)
    expected = [model.train(train)(ids).logits for train in (True, False)]
    inject_zero(model, case)
    for train, logits in zip((True, False), expected, strict=True):
        assert torch.equal(model.train(train)(ids).logits, logits)


def attention_implementations(architecture: str, case: AdapterCase) -> None:
    """SDPA and eager attention give the same, and zero gates are exact in both."""
    ids = tokens(2, LENGTH)
    logits = [adapted_model(architecture, case, name)(ids).logits for name in ("sdpa", "eager")]
    torch.testing.assert_close(*logits, **CLOSE)
    zero_gate(architecture, case, "eager")


def train(architecture: str, case: AdapterCase) -> None:
    """Two chunks of a stream, one backward: every parameter of the adapter learns."""
    model = adapted_model(architecture, case).train()
    losses_and_gradients(model)
    assert_every_parameter_learns(model, case)


def generate(architecture: str, case: AdapterCase) -> None:
    """Greedy decoding with the cache chooses what reading everything again chooses."""
    model, ids = adapted_model(architecture, case), tokens(2, LENGTH)
    cache = FastStateCache(model.config)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    sequence, logits = ids, []
    for _ in range(NEW_TOKENS):
        logits.append(model(sequence, use_cache=False).logits[:, -1])
        sequence = torch.cat([sequence, logits[-1].argmax(-1, keepdim=True)], dim=1)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(logits), **CLOSE)
    assert torch.equal(out.sequences, sequence)
    assert bool(cache.slots) == case.carries_state


def compile_in_place(architecture: str, case: AdapterCase, backend: str = "aot_eager") -> None:
    """`model.compile()` gives the eager logits and states in two chunks of a stream.

    In one graph, if the adapter can be. The chunks are padded, so that the attention mask reaches
    the adapters too.
    """
    model = adapted_model(architecture, case)
    expected = two_chunks(model)
    torch.compiler.reset()
    counters.clear()
    model.compile(backend=backend)
    for actual, wanted in zip(two_chunks(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)
    if case.one_graph:
        assert counters["stats"]["unique_graphs"] <= 2, "one graph when fresh, one that goes on"
        assert not counters["graph_break"]


def checkpointing(architecture: str, case: AdapterCase) -> None:
    """Activation checkpointing with two chunks of a stream: bit-equal loss and gradients."""
    plain = adapted_model(architecture, case).train()
    recomputed = adapted_model(architecture, case).train()
    enable_checkpointing(recomputed)
    calls = []
    recomputed.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(losses_and_gradients(plain), losses_and_gradients(recomputed))
    assert len(calls) == 4, "two chunks, forward and recomputed"
    theirs = dict(recomputed.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, theirs[name].grad), name


def bf16_autocast(architecture: str, case: AdapterCase) -> None:
    """Under bf16 autocast: finite logits and gradients, and zero gates leave the base as it is."""
    ids, model = tokens(2, LENGTH), build_model(architecture)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(ids).logits
        inject_zero(model, case)
        assert torch.equal(model(ids).logits, expected)
        model = adapted_model(architecture, case).train()
        assert model(ids).logits.isfinite().all()
        losses_and_gradients(model)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def saves_the_base(architecture: str, case: AdapterCase) -> None:
    """`save_pretrained` after removal writes the files that it wrote before injection."""
    model = build_model(architecture)
    before = _saved(model)
    inject_zero(model, case)
    model(tokens(2, LENGTH))
    remove_adapters(model)
    assert _saved(model) == before


ARCHITECTURES_ONLY = tuple(ARCHITECTURES)
MODELS = (*ARCHITECTURES_ONLY, PI0)
"""Rows of the table: language models, and the action expert of pi0."""


def models_of(case: AdapterCase) -> tuple[str, ...]:
    """Those of `MODELS` that can have the adapter."""
    return ARCHITECTURES_ONLY if case.causal else MODELS


Check = Callable[[str, AdapterCase], None]


def _or_pi0(check: Check, of_pi0: Callable[[AdapterCase], None]) -> Check:
    """The check of language models, or pi0's of the same name."""

    def either(architecture: str, case: AdapterCase) -> None:
        of_pi0(case) if architecture == PI0 else check(architecture, case)

    return either


_CHECKS: dict[str, Check] = {
    "zero gate": zero_gate,
    "train": train,
    "generate": generate,
    "compile": compile_in_place,
    "checkpointing": checkpointing,
    "bf16": bf16_autocast,
    "sdpa and eager": attention_implementations,
    "save base": saves_the_base,
}
CAPABILITIES = {name: _or_pi0(check, PI0_CHECKS[name]) for name, check in _CHECKS.items()}
"""Title of the column -> check of an adapter in one of `MODELS`."""


def inject_zero(model: PreTrainedModel, case: AdapterCase) -> None:
    """Put the adapter in, so that it adds nothing."""
    options = case.options if case.zero is None else case.zero
    inject_adapters(model, [("*", case.adapter_type, options)])


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Activation checkpointing in every layer, by its newer or its older name."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def losses_and_gradients(model: nn.Module) -> Tensor:
    """Losses of two chunks of a stream `[2]`, one backward through both."""
    state, losses = FastState.transient(), []
    for ids in tokens(2, 2 * LENGTH).split(LENGTH, dim=1):
        losses.append(model(ids, labels=ids, use_cache=False, fast_state=state).loss)
        state = state.advance()
    stacked = torch.stack(losses)
    stacked.sum().backward()
    return stacked.detach()


@torch.no_grad()
def two_chunks(model: nn.Module) -> list[Any]:
    """Logits of two chunks of a stream, padded in front, and the state after them."""
    state, outs = FastState.transient(), []
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :3] = 0
    for chunk in tokens(2, 2 * LENGTH).split(LENGTH, dim=1):
        out = model(chunk, attention_mask=mask, use_cache=False, fast_state=state)
        outs.append(out.logits[mask.bool()])
        state = state.advance()
    return [*outs, state.outgoing]


def _saved(model: PreTrainedModel) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
