"""LaCTConfig: published files and parameter counts, errors by message, doubts."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lact_model_cases import SMALL, lact_config
from transformers import AutoConfig

from lightning_modules.layers.lact import LaCTLayer
from lightning_modules.models.lact import LaCTForCausalLM
from lightning_modules.models.lact_config import LaCTConfig

PUBLISHED: dict[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_cross_entropy": True,
    "fuse_norm": True,
    "hidden_act": "swish",
    "hidden_size": 1536,
    "num_attn_heads": 24,
    "num_hidden_layers": 24,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "lact_swiglu",
    "num_lact_heads": 4,
    "inter_multi": 1,
    "qkv_bias": False,
    "attn_qk_norm": False,
    "qkv_silu": True,
    "lact_chunk_size": 2048,
    "window_size": 2048,
    "use_muon": True,
    "lr_dim": 1,
    "lr_parameterization": "mamba",
    "learnable_ttt_scale": True,
    "w0_w2_low_rank": 32,
    "fw_init_gain": 0.5,
    "use_momentum": True,
    "rope_theta": 1000000,
    "norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32000,
}
"""Content of the 760M file of github.com/a1600012888/LaCT (lact_llm/configs) with low rank,
momentum and Muon; the 3B files differ in the hidden size, and one in its 25 attention heads."""

DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attn_heads": 32,
    "num_lact_heads": 4,
    "inter_multi": 1,
    "qkv_bias": False,
    "attn_qk_norm": False,
    "lact_chunk_size": 2048,
    "use_muon": False,
    "lr_dim": 1,
    "qkv_silu": True,
    "no_v_silu": False,
    "learnable_ttt_scale": True,
    "use_momentum": True,
    "ttt_prenorm": False,
    "ttt_nope": False,
    "w0_w2_low_rank": -1,
    "window_size": 2048,
    "rope_theta": 10000.0,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "initializer_range": 0.006,
    "norm_eps": 1e-6,
    "vocab_size": 32000,
    "fw_init_gain": 0.5,
    "r": 1,
    "residual_ttt": False,
}


def _count(**changed: Any) -> int:
    """Parameters of the published model with some keys changed."""
    with torch.device("meta"):
        model = LaCTForCausalLM(LaCTConfig(**{**PUBLISHED, **changed}))
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_models_have_their_parameter_counts() -> None:
    assert _count() == 797_625_312
    assert _count(hidden_size=3072) == 2_982_516_192
    assert _count(r=2, residual_ttt=True) == 816_499_680


@pytest.mark.parametrize("r", [1, 2, 3])
def test_fast_weights_have_the_counts_of_the_formulas(r: int) -> None:
    def weights(**options: Any) -> int:
        with torch.device("meta"):
            layer = LaCTLayer(lact_config(r=r, residual_ttt=r > 1, **options).layer)
        names = ("w0", "w1", "w2", "stacked_mlps")
        return sum(p.numel() for n, p in layer.named_parameters() if n.split(".")[0] in names)

    assert weights(hidden_size=128, num_attn_heads=2) == 24_576 * r
    d, heads, multi, rank = 96, 3, 2, 5
    options = {"hidden_size": d, "num_attn_heads": 6, "num_lact_heads": heads, "inter_multi": multi}
    assert weights(**options) == r * 3 * d**2 * multi // heads
    size, inner = d // heads, multi * d // heads
    expected = r * heads * (2 * rank * (inner + size) + size * inner)
    assert weights(**options, w0_w2_low_rank=rank) == expected


def test_defaults_are_the_published_ones_and_leave_no_doubt() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LaCTConfig()
    assert {key: getattr(config, key) for key in DEFAULTS} == DEFAULTS
    assert config.mlp_size == 5632 and LaCTConfig(intermediate_size=7).mlp_size == 7


def test_a_published_file_loads_and_survives_saving(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LaCTConfig) and config.num_attention_heads == 24
    config.window_size, config.r, config.residual_ttt = None, 2, True
    config.save_pretrained(tmp_path)
    again = LaCTConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert again.layer == config.layer and again.window_size is None
    kept = {key: value for key, value in again.to_dict().items() if key in PUBLISHED}
    assert kept == {**PUBLISHED, "window_size": None}


ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {**PUBLISHED, "hidden_size": 3072, "num_attn_heads": 25},
        "hidden_size=3072 is not divisible by num_attn_heads=25: set num_attn_heads to 24 or 32",
    ),
    ({"num_lact_heads": 3}, "not divisible by num_lact_heads=3: set num_lact_heads to 2 or 4"),
    ({"num_attn_heads": 16}, "attention heads of 1 channels cannot be rotated in pairs"),
    (
        {"hidden_size": 24, "num_attn_heads": 2, "num_lact_heads": 4},
        "6 channels, no multiple of the 12 of an attention head.*multiple of num_lact_heads=4, or "
        "set ttt_nope=True",
    ),
    ({"r": 0}, "r=0 must be a whole number of at least 1: it counts the networks"),
    ({"r": -1}, "r=-1 must be"),
    ({"r": 1.5}, "r=1.5 must be a whole number"),
    ({"r": True}, "r=True must be a whole number"),
    ({"inter_multi": 0.1}, r"int\(8 \* inter_multi\) must be at least 1, so use 0.125 or more"),
    ({"lact_chunk_size": 0}, "lact_chunk_size=0 must be a whole number of at least 1"),
    ({"window_size": 0}, "window_size=0 must be .*null attends to all tokens before"),
    (
        {"w0_w2_low_rank": 9},
        r"w0_w2_low_rank=9 is more than W0 and W2 \(8 x 8\).*use 1 to 8, or -1",
    ),
    ({"w0_w2_low_rank": -2}, "w0_w2_low_rank=-2 is no rank: use at least 1, or -1"),
    ({"lr_dim": 3}, "lr_dim=3 must be 1, or 8"),
    ({"base_lr": 0.0}, "base_lr=0.0 must be positive"),
    ({"lr_dim": 8, "inter_multi": 2}, "lr_dim=8 must be .* with inter_multi=1"),
    ({"muon_dtype": "float8"}, "muon_dtype='float8' is unknown: choose one of bfloat16"),
    ({"rope_theta": 0}, "rope_theta=0 must be positive"),
    ({"lr_parameterization": "exp"}, "lr_parameterization='exp' is not implemented: use 'mamba'"),
    ({"ttt_loss_type": "l2"}, "ttt_loss_type='l2' is not implemented: use 'dot_product'"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented: use 'swish'"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_an_option_that_does_not_fit_is_an_error_with_a_fix(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LaCTConfig(**{"hidden_size": 16, **SMALL, **options})


def test_heads_that_cross_rotations_are_fine_without_rotations() -> None:
    options = {**SMALL, "hidden_size": 24, "num_attn_heads": 2, "num_lact_heads": 4}
    assert LaCTConfig(**options, ttt_nope=True).ttt_nope


DOUBTS: list[tuple[dict[str, Any], str]] = [
    ({"window_size": 3}, "window_size=3 is less than lact_chunk_size=4.*use window_size=4 or more"),
    ({"use_muon": True}, "use_muon with lact_chunk_size=4 below 8.*at least 8 tokens"),
    ({"r": 2}, "r=2 without residual_ttt.*set residual_ttt=True"),
]


@pytest.mark.parametrize(("options", "message"), DOUBTS)
def test_an_option_that_is_most_likely_not_meant_is_a_warning(
    options: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        LaCTConfig(**{"hidden_size": 16, **SMALL, **options})
    meant = {"window_size": None, "lact_chunk_size": 8, "residual_ttt": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LaCTConfig(**{"hidden_size": 16, **SMALL, **options, **meant})


@pytest.mark.filterwarnings("ignore:r=3 without residual_ttt")
def test_a_fresh_stack_without_residual_squares_its_signal_away() -> None:
    for residual in (True, False):
        torch.manual_seed(0)
        config = LaCTConfig(hidden_size=256, num_attn_heads=4, r=3, residual_ttt=residual).layer
        x = torch.nn.functional.normalize(torch.randn(4, 64, 32), dim=1)
        for j, (w0, w1, w2) in enumerate(zip(*LaCTLayer(config).fast_weights, strict=True)):
            length = x.norm(dim=1).mean()
            y = w1 @ (torch.nn.functional.silu(w0 @ x) * (w2 @ x))
            x = x + y if residual and j < 2 else y
            if not residual:
                expected = length**2 / (2 * 64**0.5)
                torch.testing.assert_close(x.norm(dim=1).mean(), expected, rtol=0.2, atol=0)
        assert (x.norm(dim=1).mean() > 1e-2) == residual
