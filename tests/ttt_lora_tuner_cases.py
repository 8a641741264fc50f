"""Tiny decoders with TTT-LoRA or In-Place TTT that does something, and streams through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architecture_cases import ARCHITECTURES, build_model, tokens
from gemma_cases import randomise
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import MoshiConfig, MoshiForCausalLM, PreTrainedModel
from ttt_lora_cases import FORMS

from lightning_modules.adapters.ttt_lora import TTTLoraConfig, TTTLoraLinear
from lightning_modules.generation import FastStateCache
from lightning_modules.layers.in_place_mlp import InPlaceConfig
from lightning_modules.models.in_place import InPlaceOptions, inject_in_place
from lightning_modules.streams import FastState

MINI_BATCH, LENGTH = 4, 13
EXACT = {"rtol": 0, "atol": 1e-10}
"""float64 sums in another order through two layers."""
CELLS = "ttt_lora_cells"
LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
MOSHI = {
    "vocab_size": 41,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "num_codebooks": 2,
    "audio_vocab_size": 11,
}
KNOWN = [*ARCHITECTURES, "moshi"]
"""Architectures whose linear layers the tuner knows by name."""


def plain_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A random decoder without adapters, eval mode."""
    if architecture != "moshi":
        return build_model(architecture, seed=seed).to(dtype)
    torch.manual_seed(seed)
    return randomise(MoshiForCausalLM(MoshiConfig(**MOSHI)), seed, scale=0.1).eval().to(dtype)


def config_of(form: str = "A_plain", **options: Any) -> TTTLoraConfig:
    """Inner size 3, mini-batches of 4."""
    mode, loss = FORMS[form]
    given = {"inner_dim": 3, "mini_batch_size": MINI_BATCH, "mode": mode, "loss": loss}
    return TTTLoraConfig(**{**given, **options})


def peft_model(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    shaken: bool = True,
    **options: Any,
) -> PeftModel:
    """`get_peft_model`, eval mode; its adapter does something unless not shaken."""
    torch.manual_seed(2)
    model = get_peft_model(plain_model(architecture, dtype), config_of(**options)).eval()
    return shake(model) if shaken else model


@torch.no_grad()
def shake(model: nn.Module, seed: int = 1, names: tuple[str, ...] = (CELLS, ".ttt.")) -> Any:
    """Add noise to every parameter of adapters, so that nothing is at a special value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


def add_ttt_lora(model: nn.Module, form: str = "A_plain", **options: Any) -> None:
    torch.manual_seed(2)
    inject_adapter_in_model(config_of(form, **options), model)


def add_in_place(model: PreTrainedModel, every_n: int = 1, **options: Any) -> None:
    layer = InPlaceConfig(**{"chunk_size": MINI_BATCH, "eta": 0.2, "clip": None, **options})
    inject_in_place(model, InPlaceOptions(every_n=every_n, layer=layer))


def _together(model: PreTrainedModel) -> None:
    add_in_place(model)
    add_ttt_lora(model, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj"])


METHODS: dict[str, Callable[[PreTrainedModel], None]] = {
    "A_plain": lambda model: add_ttt_lora(model),
    "A_ln": lambda model: add_ttt_lora(model, "A_ln", group_siblings=False),
    "B_plain": lambda model: add_ttt_lora(model, "B_plain", rate_per_token=True, q_residual=True),
    "B_ln": lambda model: add_ttt_lora(model, "B_ln"),
    "in_place": lambda model: add_in_place(model),
    "in_place_symmetric": lambda model: add_in_place(model, symmetric=True),
    "together": _together,
}
"""Everything whose fast state comes from the context of a layer."""
CAUSAL = list(METHODS)


def adapted(
    method: str, architecture: str = "llama", dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A model with a method that does something, all of it trainable, eval mode."""
    torch.manual_seed(2)
    model = plain_model(architecture, dtype)
    METHODS[method](model)
    return shake(model).requires_grad_(True).eval()


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that TTT-LoRA and In-Place TTT added."""
    named = model.named_parameters()
    return {name: p for name, p in named if CELLS in name or ".ttt." in name}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **context: Any) -> Tensor:
    """Of one call without keys and values."""
    return model(input_ids=ids, **{"use_cache": False, **context}).logits


@torch.no_grad()
def decode(
    model: nn.Module, ids: Tensor, sizes: list[int], cache: Any = None, **options: Any
) -> tuple[Tensor, FastStateCache]:
    """Logits of ids read in pieces, keys, values and fast state in one cache."""
    cache = FastStateCache(model.config, **options) if cache is None else cache
    parts = [model(input_ids=part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, dim=1), cache


def read_chunks(model: nn.Module, ids: Tensor, sizes: list[int], **options: Any) -> Any:
    """Logits of chunks without keys and values of each other, and the last handle."""
    state, parts = FastState(**options), []
    for index, part in enumerate(ids.split(sizes, dim=1)):
        state = state.advance() if index else state
        parts.append(model(input_ids=part, use_cache=False, fast_state=state).logits)
    return torch.cat(parts, dim=1), state


def adapter_layers(model: nn.Module) -> dict[str, TTTLoraLinear]:
    """Linear layers with TTT-LoRA by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, TTTLoraLinear)}


def lora_config(**options: Any) -> LoraConfig:
    """peft's LoRA on q_proj and up_proj."""
    return LoraConfig(**{**LORA, "target_modules": ["q_proj", "up_proj"], **options})


def text(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random token ids, without padding."""
    return tokens(rows, length, seed)
