"""Modules that are not called, or do not answer, as Hugging Face attention: errors that say so."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.adapters import NoOpAttentionAdapter, inject_adapters


class BareOutput(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Loose(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs: Tensor) -> tuple[Tensor, None]:
        return hidden_states, None


def test_attention_with_another_signature_is_refused_by_name_and_nothing_changes() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2)
    attention = encoder.self_attn
    message = r"MultiheadAttention.forward takes \(query, key, .*keywords \(hidden_states=, ...\)"
    with pytest.raises(TypeError, match=message):
        inject_adapters(encoder, [("*", "noop", None)])
    assert encoder.self_attn is attention


def test_attention_that_returns_no_tuple_is_refused_by_name() -> None:
    adapter = NoOpAttentionAdapter(BareOutput())
    with pytest.raises(TypeError, match=r"BareOutput returned a Tensor; .*tuple \(attn_output, at"):
        adapter(hidden_states=torch.zeros(1, 2, 3))


def test_attention_called_with_positions_is_refused_by_name() -> None:
    adapter = NoOpAttentionAdapter(Loose())
    with pytest.raises(TypeError, match="Loose was called with positional arguments; .*keywords"):
        adapter(torch.zeros(1, 2, 3), None)


def test_attention_called_as_expected_passes() -> None:
    x = torch.randn(1, 2, 3)
    for call in (lambda a: a(hidden_states=x), lambda a: a(x)):
        out, weights = call(NoOpAttentionAdapter(Loose()))
        assert torch.equal(out, x) and weights is None
