"""RoutedAdapter against a loop over tokens: what it reads, what it writes, its losses."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adapter_cases import HIDDEN, LORA, NOOP, PAIR, inputs, make_adapter, member
from torch import Tensor, nn

from lightning_modules.adapters import BaseAttentionAdapter, RoutedAdapter, registry
from lightning_modules.layers.router import router_logits
from lightning_modules.streams import FastState

MEMBERS = {"one": member("hebb"), "two": member("hebb"), "low": LORA, "nothing": NOOP}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@dataclass(frozen=True)
class HebbConfig:
    """No options."""


class Hebb(BaseAttentionAdapter):
    """A memory to check by hand: `delta_t = S_t x_t`, `S_t = sum_{s <= t} w_s V x_s x_s^T`."""

    def __init__(self, base_attention: nn.Module, config: HebbConfig) -> None:
        super().__init__(base_attention)
        self.value = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def delta(
        self,
        attn_output: Tensor,
        hidden_states: Tensor,
        *,
        write_weight: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        weight = torch.ones_like(hidden_states[..., 0]) if write_weight is None else write_weight
        scores = (hidden_states @ hidden_states.mT).tril() * weight.unsqueeze(1)
        return scores @ self.value(hidden_states)


@pytest.fixture(autouse=True)
def hebb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    registry.register_attention_adapter("hebb", HebbConfig)(Hebb)


def _routed(members: dict[str, Any] | None = None, **options: Any) -> RoutedAdapter:
    adapter = make_adapter(member("routed", members=members or MEMBERS, **options))
    assert isinstance(adapter, RoutedAdapter)
    return adapter


def _naive_weights(adapter: RoutedAdapter, x: Tensor, top_k: int | None) -> list[float]:
    """Weights of the members for one token `[hidden]`."""
    logits = [
        sum(w * v for w, v in zip(row, x.tolist(), strict=True)) + bias
        for row, bias in zip(
            adapter.router.weight.tolist(), adapter.router.bias.tolist(), strict=True
        )
    ]
    total = sum(math.exp(logit) for logit in logits)
    weights = [math.exp(logit) / total for logit in logits]
    if top_k is not None:
        kept = sorted(range(len(weights)), key=lambda i: -weights[i])[:top_k]
        weights = [weight if i in kept else 0.0 for i, weight in enumerate(weights)]
    return weights


def _naive(
    adapter: RoutedAdapter, x: Tensor, top_k: int | None, outer: Tensor | None = None
) -> Tensor:
    """What a routed adapter of `MEMBERS` adds, token by token."""
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        memories = {name: torch.zeros(HIDDEN, HIDDEN, dtype=x.dtype) for name in ("one", "two")}
        for t in range(x.shape[1]):
            token = x[row, t]
            weights = _naive_weights(adapter, token, top_k)
            for index, (name, m) in enumerate(adapter.members.items()):
                if name in memories:
                    write = weights[index] * (1.0 if outer is None else outer[row, t])
                    memories[name] += write * torch.outer(m.value.weight @ token, token)
                    out[row, t] += weights[index] * (memories[name] @ token)
                elif name == "low":
                    branch = m.lora_B.weight @ (m.lora_A.weight @ token)
                    out[row, t] += weights[index] * (16.0 / 3) * branch
    return out


@torch.no_grad()
@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
def test_output_equals_a_loop_over_tokens_and_members(top_k: int | None) -> None:
    adapter, (attn_output, x) = _routed(top_k=top_k), inputs()
    gate = torch.randn(HIDDEN, dtype=torch.float64)
    expected = gate * attn_output + _naive(adapter, x, top_k)
    torch.testing.assert_close(adapter.adapt(attn_output, x, gate_attn=gate), expected, **EXACT)


@torch.no_grad()
def test_mistake_a_gate_that_does_not_gate_writes() -> None:
    adapter, (attn_output, x) = _routed(top_k=2), inputs()
    weights = adapter.mix(x).weights
    ungated = [
        weights[..., i : i + 1] * m.delta(attn_output, x)
        for i, (name, m) in enumerate(adapter.members.items())
        if name != "nothing"
    ]
    assert not torch.allclose(sum(ungated), _naive(adapter, x, 2))


@torch.no_grad()
def test_a_router_inside_a_router_multiplies_the_write_weights() -> None:
    inner = member("routed", members=MEMBERS, top_k=3)
    adapter, (attn_output, x) = _routed({"low": LORA, "inner": inner}), inputs()
    weights = adapter.mix(x).weights
    low = adapter.members["low"].delta(attn_output, x)
    nested = _naive(adapter.members["inner"], x, 3, outer=weights[..., 1])
    expected = weights[..., :1] * low + weights[..., 1:] * nested
    torch.testing.assert_close(adapter.delta(attn_output, x), expected, **EXACT)
    incoming = torch.rand(x.shape[:2], dtype=x.dtype)
    nested = _naive(adapter.members["inner"], x, 3, outer=weights[..., 1] * incoming)
    expected = weights[..., :1] * low + weights[..., 1:] * nested
    actual = adapter.delta(attn_output, x, write_weight=incoming)
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("top_k", [None, 1])
def test_ttt_members_take_inner_steps_of_their_weight(top_k: int | None) -> None:
    adapter, (attn_output, x) = _routed(PAIR, top_k=top_k), inputs()
    handle, expected = FastState.transient(), attn_output
    out = adapter.adapt(attn_output, x, fast_state=handle)
    for index, (name, m) in enumerate(adapter.members.items()):
        weight = torch.tensor(
            [[_naive_weights(adapter, token, top_k)[index] for token in row] for row in x],
            dtype=x.dtype,
        )
        alone, twin = FastState.transient(), copy.deepcopy(m)
        inner_lr = twin.ttt._eta  # the step of a token, times what the router gives it
        twin.ttt._eta = lambda *args, f=inner_lr, w=weight: f(*args) * w.unsqueeze(-1)
        change = twin.delta(attn_output, x, fast_state=alone, write_mask=weight > 0)
        expected = expected + weight.unsqueeze(-1) * change
        slot = f"layer/{name}"
        for field, value in alone.outgoing[slot].items():
            torch.testing.assert_close(handle.outgoing[slot][field], value, **EXACT)
    torch.testing.assert_close(out, expected, **EXACT)


def test_a_token_that_a_member_does_not_get_leaves_its_memory_alone() -> None:
    adapter, (attn_output, x) = _routed(PAIR, top_k=1), inputs()
    selected = adapter.mix(x).selected
    assert selected is not None and 0 < selected[0, :, 0].sum() < x.shape[1]
    handle = FastState.transient()
    adapter.adapt(attn_output, x, fast_state=handle)
    others, changed = attn_output.clone(), FastState.transient()
    others[~selected[..., 0]] += 1.0  # what TTT learns from, of tokens that went to the other one
    adapter.adapt(others, x, fast_state=changed)
    first, second = handle.outgoing, changed.outgoing
    assert torch.equal(first["layer/fast"]["dw"], second["layer/fast"]["dw"])
    assert not torch.allclose(first["layer/other"]["dw1"], second["layer/other"]["dw1"])


class _LooksAhead(RoutedAdapter):
    """The wrong variant: routes on the mean of the sequence."""

    def mix(self, hidden_states: Tensor) -> Any:
        return super().mix(hidden_states.mean(1, keepdim=True).expand_as(hidden_states))


def _first_bits_stay(adapter: RoutedAdapter) -> bool:
    attn_output, x = inputs()
    changed = [value.clone() for value in (attn_output, x)]
    for value in changed:
        value[:, 6] += 1.0
    outs = [adapter.adapt(*pair)[:, :6] for pair in ((attn_output, x), changed)]
    return torch.equal(*outs)


@pytest.mark.parametrize("top_k", [None, 1])
def test_causality_and_the_mistake_of_a_router_that_looks_at_later_tokens(
    top_k: int | None,
) -> None:
    adapter = _routed({**PAIR, "low": LORA}, top_k=top_k)
    assert _first_bits_stay(adapter)
    adapter.__class__ = _LooksAhead
    assert not _first_bits_stay(adapter)


# Losses and statistics


def _mask() -> Tensor:
    return torch.tensor([[True] * 11, [False] * 3 + [True] * 6 + [False] * 2])


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("mask", [None, _mask()])
def test_losses_equal_their_formulas_token_by_token(top_k: int | None, mask: Any) -> None:
    adapter = _routed(top_k=top_k, balance_coefficient=0.5, z_coefficient=0.25).train()
    (attn_output, x), handle = inputs(), FastState.transient()
    adapter.adapt(attn_output, x, mask=mask, fast_state=handle)
    tokens = x.flatten(0, 1) if mask is None else x[mask]
    probabilities = torch.tensor([_naive_weights(adapter, token, None) for token in tokens])
    chosen = torch.tensor([_naive_weights(adapter, token, top_k) for token in tokens])
    mean = probabilities.mean(0)
    load = mean if top_k is None else (chosen > 0).float().mean(0) / top_k
    squares = [router_logits(token, adapter.router).exp().sum().log() ** 2 for token in tokens]
    losses = handle.losses["layer"]
    assert set(losses) == {"router_balance", "router_z"}
    balance, z = losses["router_balance"].item(), losses["router_z"].item()
    assert balance == pytest.approx(0.5 * 4 * (load * mean).sum().item(), rel=1e-5)
    assert z == pytest.approx(0.25 * torch.stack(squares).mean().item(), rel=1e-9)
    for loss in losses.values():
        gradients = torch.autograd.grad(loss, list(adapter.router.parameters()), retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_losses_are_left_in_training_only_and_only_where_their_coefficient_is_positive() -> None:
    for train, options, names in [
        (False, {"balance_coefficient": 0.5, "z_coefficient": 0.5}, None),
        (True, {}, None),
        (True, {"balance_coefficient": 0.5}, {"router_balance"}),
        (True, {"z_coefficient": 0.5}, {"router_z"}),
    ]:
        adapter, handle = _routed(**options).train(train), FastState.transient()
        adapter.adapt(*inputs(), fast_state=handle)
        assert set(handle.losses.get("layer", {})) == (names or set())
        adapter.adapt(*inputs())  # without a handle there is nowhere to leave them


@pytest.mark.parametrize("top_k", [None, 2])
def test_statistics_are_loads_and_entropy_of_every_row_detached(top_k: int | None) -> None:
    adapter, (attn_output, x), mask = _routed(top_k=top_k), inputs(), _mask()
    silent, handle = FastState.transient(), FastState.transient({"router"})
    for listener in (silent, handle):
        adapter.adapt(attn_output, x, mask=mask, fast_state=listener)
    assert silent.published == {}
    values = handle.published["router"]["layer"]
    assert set(values) == {"load", "entropy"}
    assert not any(value.requires_grad for value in values.values())
    for row in range(2):
        tokens = x[row][mask[row]]
        probabilities = torch.tensor([_naive_weights(adapter, token, None) for token in tokens])
        kept = torch.tensor([_naive_weights(adapter, token, top_k) for token in tokens])
        load = kept.mean(0) if top_k is None else (kept > 0).float().mean(0) / top_k
        bits = -(probabilities * probabilities.log()).sum(-1).mean()
        torch.testing.assert_close(values["load"][row].float(), load, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(values["entropy"][row].float(), bits, rtol=1e-5, atol=1e-6)


def test_losses_and_statistics_need_a_slot() -> None:
    adapter = _routed(balance_coefficient=0.1).train()
    adapter.slot = ""
    with pytest.raises(ValueError, match="no slot"):
        adapter.adapt(*inputs(), fast_state=FastState.transient())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, r"top_k=5, but there are 4 members \(one, two, low, nothing\): choose 1 to"),
        ({"top_k": 0}, "top_k=0, but there are 4 members"),
        ({"balance_coefficient": -0.1}, "balance_coefficient=-0.1 must not be negative"),
        ({"z_coefficient": -1}, "z_coefficient=-1 must not be negative"),
        ({"topk": 1}, "unknown option 'topk'; did you mean 'top_k'"),
    ],
)
def test_mistakes_are_errors_that_name_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _routed(**options)
