"""Adapters by name, options from dictionaries, the no-op adapter and what all adapters forward."""

from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from gemma_cases import gemma_config, rotary
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaAttention

from lightning_modules.adapters import (
    BaseAttentionAdapter,
    NoOpAttentionAdapter,
    TTTAdapterConfig,
    TTTAttentionAdapter,
    as_config,
    create_attention_adapter,
    register_attention_adapter,
)
from lightning_modules.adapters.base import CONTEXT_KEYS
from lightning_modules.layers.ttt import TTTConfig


def _attention() -> GemmaAttention:
    torch.manual_seed(0)
    return GemmaAttention(gemma_config(), layer_idx=2)


def test_options_may_be_a_nested_dict_or_the_dataclass() -> None:
    options = {"ttt_gate": "none", "layer": {"kind": "mlp", "num_heads": 4}}
    config = TTTAdapterConfig(ttt_gate="none", layer=TTTConfig(kind="mlp", num_heads=4))
    for given in (options, config, {**options, "layer": config.layer}):
        adapter = create_attention_adapter(_attention(), "ttt", given)
        assert isinstance(adapter, TTTAttentionAdapter)
        assert adapter.adapter_config == config


def test_no_options_are_the_defaults() -> None:
    adapter = create_attention_adapter(_attention(), "ttt")
    assert adapter.adapter_config == TTTAdapterConfig()
    assert isinstance(create_attention_adapter(_attention(), "noop"), NoOpAttentionAdapter)


@pytest.mark.parametrize(
    ("adapter_type", "options", "message"),
    [
        ("tttt", None, r"unknown adapter type 'tttt'; known types are .*noop.*, .*ttt"),
        ("ttt", {"tt_mode": "after_attn"}, "did you mean 'ttt_mode'"),
        ("ttt", {"layer": {"num_head": 2}}, r"ttt\.layer: unknown option 'num_head'; did you mean"),
        ("noop", {"alpha": 1}, "Options are none"),
        ("ttt", 3, "expected a dict or a TTTAdapterConfig"),
        ("ttt", TTTConfig(), "expected a dict or a TTTAdapterConfig"),
        ("ttt", {"ttt_mode": "before_attn"}, "choose one of after_attn"),
        ("ttt", {"ttt_gate": "adarms"}, "needs cond_size"),
        ("ttt", {"ttt_input_norm": "adarms"}, "needs cond_size"),
        ("ttt", {"layer": {"num_heads": 5}}, "set num_heads to one of"),
    ],
)
def test_wrong_options_name_the_right_ones(adapter_type: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_attention_adapter(_attention(), adapter_type, options)


def test_options_of_a_checkpoint_make_the_dataclass_again() -> None:
    config = TTTAdapterConfig(ttt_gate="none", layer=TTTConfig(kind="mlp", num_heads=4))
    assert as_config(TTTAdapterConfig, asdict(config), "ttt") == config
    assert as_config(TTTAdapterConfig, config, "ttt") is config
    with pytest.raises(ValueError, match=r"stored\.layer: unknown option 'heads'; did you mean"):
        as_config(TTTAdapterConfig, {"layer": {"heads": 2}}, "stored")


def test_a_new_adapter_is_one_class_and_its_options() -> None:
    @dataclass(frozen=True)
    class ScaleConfig:
        factor: float = 2.0

    @register_attention_adapter("scale_for_test", ScaleConfig)
    class ScaleAdapter(BaseAttentionAdapter):
        def __init__(self, base_attention: nn.Module, config: ScaleConfig) -> None:
            super().__init__(base_attention)
            self.factor = config.factor

        def adapt(self, attn_output: Tensor, hidden_states: Tensor, **context: Any) -> Tensor:
            return self.factor * attn_output

    attention, config = _attention(), gemma_config()
    adapter = create_attention_adapter(attention, "scale_for_test", {"factor": 3.0})
    x = torch.randn(1, 4, 32)
    call = {"position_embeddings": rotary(config, 1, 4), "attention_mask": None}
    assert torch.equal(adapter(x, **call)[0], 3.0 * attention(x, **call)[0])
    with pytest.raises(ValueError, match="under another name"):
        register_attention_adapter("ttt", ScaleConfig)(ScaleAdapter)


class _KeywordsOnly(nn.Module):
    """Attention that takes nothing by position and records its keywords."""

    def forward(self, *, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, str, str]:
        self.seen = kwargs
        return hidden_states * 2, "weights", "more"


def test_base_attention_is_called_with_keywords_and_never_sees_the_adapter_context() -> None:
    base = _KeywordsOnly()
    adapter = NoOpAttentionAdapter(base)
    context = dict.fromkeys(CONTEXT_KEYS)
    x = torch.randn(1, 2, 4)
    out = adapter(x, attention_mask="mask", position_ids="ids", **context)
    assert base.seen == {"attention_mask": "mask", "position_ids": "ids"}
    assert torch.equal(out[0], 2 * x) and out[1:] == ("weights", "more")


def test_noop_applies_the_gate_of_attention() -> None:
    adapter, x, gate = NoOpAttentionAdapter(_KeywordsOnly()), torch.randn(1, 2, 4), torch.randn(4)
    assert torch.equal(adapter(x, gate_attn=gate)[0], 2 * x * gate)


def test_attributes_are_read_from_the_base() -> None:
    attention = _attention()
    adapter = create_attention_adapter(attention, "ttt")
    assert adapter.layer_idx == 2 and adapter.config is attention.config
    assert adapter.head_dim == 16 and adapter.q_proj is attention.q_proj
    nested = NoOpAttentionAdapter(adapter)
    assert nested.layer_idx == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        adapter.no_such_thing  # noqa: B018
