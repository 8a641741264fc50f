"""Configuration of LaCT language models, under the keys of the published files."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedConfig

from lightning_modules.layers.lact_options import (
    LaCTAttentionConfig,
    LaCTFeatureConfig,
    LaCTLayerConfig,
    LaCTMemoryConfig,
    LaCTUpdateConfig,
)

OptionsT = TypeVar("OptionsT")

FIXED = {
    "lr_parameterization": ("mamba",),
    "ttt_loss_type": ("dot_product",),
    "hidden_act": ("swish", "silu"),
}
"""Published keys with a single meaning that is implemented."""

MLP_MULTIPLE = 256


class LaCTConfig(PreTrainedConfig):
    """Size and options of a `LaCTForCausalLM`.

    Configuration files of the published models load as they are; their keys for fused kernels
    are kept and have no effect. Keys that are not listed are those of `LaCTAttentionConfig`,
    `LaCTMemoryConfig`, `LaCTFeatureConfig` and `LaCTUpdateConfig`.

    Args:
        vocab_size: tokens.
        hidden_size: d.
        num_hidden_layers: blocks of a LaCT layer and a gated MLP.
        intermediate_size: width of the MLP; None: `2/3 hidden_ratio d`, rounded up to a multiple
            of 256.
        hidden_ratio: see `intermediate_size`.
        norm_eps: added to the mean square in the RMSNorms around layers (those inside have 1e-5).
        initializer_range: standard deviation of linear maps and embeddings at the start.
        max_position_embeddings: length in training, for information; positions have no end.
        branches: `both`, or `attention` or `memory` alone in every layer (baselines).
        tie_word_embeddings: the output layer is the embedding.

    Raises:
        ValueError: an option, or how it fits to another. Options that are most likely not meant
            give a UserWarning.
    """

    model_type = "lact_swiglu"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_attn_heads"}

    vocab_size: int = 32_000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    intermediate_size: int | None = None
    hidden_ratio: float = 4
    hidden_act: str = "swish"
    norm_eps: float = 1e-6
    initializer_range: float = 0.006
    max_position_embeddings: int = 2048
    lr_parameterization: str = "mamba"
    ttt_loss_type: str = "dot_product"
    branches: str = "both"

    num_attn_heads: int = LaCTAttentionConfig.num_attn_heads
    window_size: int | None = LaCTAttentionConfig.window_size
    rope_theta: float = LaCTAttentionConfig.rope_theta
    qkv_bias: bool = LaCTAttentionConfig.qkv_bias
    attn_qk_norm: bool = LaCTAttentionConfig.attn_qk_norm

    num_lact_heads: int = LaCTMemoryConfig.num_lact_heads
    inter_multi: float = LaCTMemoryConfig.inter_multi
    r: int = LaCTMemoryConfig.r
    residual_ttt: bool = LaCTMemoryConfig.residual_ttt
    w0_w2_low_rank: int = LaCTMemoryConfig.w0_w2_low_rank
    fw_init_gain: float = LaCTMemoryConfig.fw_init_gain

    qkv_silu: bool = LaCTFeatureConfig.qkv_silu
    no_v_silu: bool = LaCTFeatureConfig.no_v_silu
    ttt_nope: bool = LaCTFeatureConfig.ttt_nope
    learnable_ttt_scale: bool = LaCTFeatureConfig.learnable_ttt_scale

    lact_chunk_size: int = LaCTUpdateConfig.lact_chunk_size
    lr_dim: int = LaCTUpdateConfig.lr_dim
    base_lr: float = LaCTUpdateConfig.base_lr
    use_momentum: bool = LaCTUpdateConfig.use_momentum
    use_muon: bool = LaCTUpdateConfig.use_muon
    muon_dtype: str = LaCTUpdateConfig.muon_dtype
    ttt_prenorm: bool = LaCTUpdateConfig.ttt_prenorm
    greedy: bool = LaCTUpdateConfig.greedy
    recompute: bool = LaCTUpdateConfig.recompute

    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for key, known in FIXED.items():
            if (value := getattr(self, key)) not in known:
                raise ValueError(f"{key}={value!r} is not implemented: use {known[0]!r}")
        for doubt in self.layer.doubts():
            warnings.warn(doubt, stacklevel=4)
        super().__post_init__(**kwargs)

    @property
    def layer(self) -> LaCTLayerConfig:
        """Options of a layer, checked."""
        return LaCTLayerConfig(
            self.hidden_size,
            attention=self._options(LaCTAttentionConfig),
            memory=self._options(LaCTMemoryConfig),
            features=self._options(LaCTFeatureConfig),
            update=self._options(LaCTUpdateConfig),
            branches=self.branches,  # type: ignore[arg-type]
        )

    def _options(self, config: type[OptionsT]) -> OptionsT:
        return config(**{field.name: getattr(self, field.name) for field in fields(config)})  # type: ignore[arg-type]

    @property
    def mlp_size(self) -> int:
        """Width of the MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        wanted = int(self.hidden_size * self.hidden_ratio * 2 / 3)
        return MLP_MULTIPLE * -(-wanted // MLP_MULTIPLE)
