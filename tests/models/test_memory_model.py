"""Memory inside decoder layers: identity at the start, its place, weights, parameter counts."""

import copy
from typing import Any

import pytest
import torch
import yaml
from architecture_cases import ARCHITECTURES, build_model, tokens
from config_cases import CONFIGS
from memory_cases import (
    CHAPTERS,
    add_memory,
    logits,
    memory_model,
    memory_options,
    memory_parameters,
)
from torch import nn

from lightning_modules.adapters import as_config, inject_adapters
from lightning_modules.layers.memory_branch import MemoryConfig
from lightning_modules.memory_bank import MemoryBankModule
from lightning_modules.models.memory import inject_memory, memory_layers, remove_memory
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.models.projection_lora import ProjectionLoRA, inject_lora

PRODUCT_KEYS = {
    "memory": {"product_keys": {"num_keys": 5, "num_heads": 2, "top_k": 3, "key_width": 8}}
}
VARIANTS = {
    "A": {},
    "B": {"memory": {"variant": "B"}},
    "product_keys": PRODUCT_KEYS,
    "per_layer": {"sharing": "per_layer"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_memory_leaves_the_model_as_it_was_bit_for_bit(
    architecture: str, variant: str
) -> None:
    model, ids = build_model(architecture), tokens(2, 11)
    expected = logits(model, ids)
    base = dict(model.named_parameters())
    inject_memory(model, memory_options(**copy.deepcopy(VARIANTS[variant])))
    assert len(memory_layers(model)) == 2
    assert torch.equal(logits(model, ids), expected)
    assert all(dict(model.named_parameters())[name] is base[name] for name in base)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_removed_memory_leaves_the_same_objects(architecture: str, variant: str) -> None:
    model, ids = build_model(architecture), tokens(2, 11)
    expected, classes = logits(model, ids), [type(m) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    add_memory(model, memory_options(**copy.deepcopy(VARIANTS[variant])))
    assert not torch.equal(logits(model, ids), expected)
    remove_memory(model)
    assert [type(m) for m in model.modules()] == classes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(logits(model, ids), expected)


def by_hand(model: nn.Module, hidden: torch.Tensor, variant: str) -> torch.Tensor:
    """The layers of a Llama, written out with what the memory adds in its place."""
    decoder = model.get_decoder()
    positions = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for layer in decoder.layers:
        x = layer.input_layernorm(hidden)
        hidden = hidden + layer.self_attn(x, position_embeddings=positions, attention_mask=None)[0]
        if variant == "A":
            hidden = hidden + layer.memory.reader(layer.memory.norm(hidden), None, "")
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        if variant != "A":
            hidden = hidden + layer.memory.reader(layer.memory.norm(hidden), None, "")
        if variant == "B":
            hidden = hidden + layer.memory.mlp(layer.memory.mlp_norm(hidden))
    return model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("variant", ["A", "B"])
def test_the_memory_has_its_place_as_the_layers_written_out_by_hand(variant: str) -> None:
    model = memory_model(memory={"variant": variant})
    ids = tokens(2, 11)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        expected = by_hand(model, embedded, variant)
        after_mlp = by_hand(model, embedded, "behind the MLP")
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-12)
    assert (logits(model, ids) - after_mlp).abs().max() > 1e-3  # the known mistake would show


def test_banks_are_in_the_model_once_whoever_reads_them() -> None:
    shared, own = memory_model(), memory_model(sharing="per_layer")
    for model, count in ((shared, 1), (own, 2)):
        assert len(model.memory_banks) == count
        readers = [layer.memory.reader for _, layer in memory_layers(model)]
        assert len({id(reader.bank) for reader in readers}) == count
        assert sum("memory_banks" in name for name in model.state_dict()) == count
        twin = copy.deepcopy(model)
        banks = [layer.memory.reader.bank for _, layer in memory_layers(twin)]
        assert banks[0] is twin.memory_banks[0] and banks[0] is not readers[0].bank


@pytest.mark.parametrize("strategy", ["token", "block", "rolling", None])
def test_every_parameter_of_a_memory_learns(strategy: str | None) -> None:
    model = memory_model(strategy, router={"balance_coefficient": 0.0, "renormalize": False})
    model.train()
    ids = tokens(3, 20)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for parameter in memory_parameters(model):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0


def test_memory_goes_in_beside_lora_and_adapters_of_attention() -> None:
    model, ids = build_model("qwen3"), tokens(2, 9)
    expected = logits(model, ids)
    inject_lora(model, ProjectionLoRA(rank=2))
    inject_adapters(model, [("*", "noop")])
    inject_memory(model, memory_options(memory={"variant": "B"}))
    assert torch.equal(logits(model, ids), expected)
    names = [name for name, _ in model.named_parameters() if ".memory." in name]
    assert names and not any("lora" in name for name in names)


@pytest.mark.parametrize("strategy", ["block", "token"])
def test_bfloat16_weights_need_no_autocast(strategy: str) -> None:
    model = add_memory(build_model("llama").bfloat16(), memory_options(strategy))
    ids = tokens(2, 9)
    out = model(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in memory_parameters(model))


class Foreign(nn.Module):
    """A decoder layer of a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(2, 2)


def test_models_without_a_known_place_are_refused() -> None:
    with pytest.raises(ValueError, match="class Foreign.*known are GemmaDecoderLayer"):
        inject_memory(nn.ModuleList([Foreign()]), MemoryOptions())
    with pytest.raises(ValueError, match="no decoder layers"):
        inject_memory(nn.Linear(2, 2), MemoryOptions())
    model = memory_model()
    with pytest.raises(ValueError, match="has a memory already"):
        inject_memory(model, memory_options())


def test_rows_that_chapters_do_not_divide_are_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match="25.*24"):
        memory_options(bank={"num_rows": 25})
    with pytest.raises(ValueError, match="choose A or B"):
        MemoryConfig(variant="C")


def published(**router: Any) -> MemoryBankModule:
    """The model of the 371M config, on meta."""
    options = yaml.safe_load((CONFIGS / "memory_371m.yaml").read_text())["model"]["init_args"]
    options["memory"]["memory"]["router"] |= router
    memory = as_config(MemoryOptions, options["memory"], "memory")
    with torch.device("meta"):
        module = MemoryBankModule(torch.optim.AdamW, config=options["config"], memory=memory)
        module.build({"vocab_size": 49_152, "chunk_length": 2048, "tbptt": 1, "mode": "packed"})
    return module


@pytest.mark.parametrize(("shared", "layers"), [(0, 22_042_628), (1, 22_039_552)])
def test_371m_has_exactly_the_published_numbers_of_parameters(shared: int, layers: int) -> None:
    module = published(shared=shared)
    counts = {"base": 0, "memory": 0, "bank": 0}
    for name, parameter in module.named_parameters():
        counts[module.parameter_group(name)] += parameter.numel()
    assert counts == {"base": 147_874_560, "bank": 201_375_744, "memory": layers}
    assert round(sum(counts.values()) / 1e6, 2) == 371.29


def test_routing_by_block_adds_a_vector_per_layer() -> None:
    block, token = (
        sum(p.numel() for p in published(strategy=s).parameters()) for s in ("block", "token")
    )
    assert block - token == 4 * 768


def test_a_quarter_of_the_chapters_is_read() -> None:
    model = memory_model("token")
    seen: list[torch.Tensor] = []
    for _, layer in memory_layers(model):
        layer.memory.reader.router.register_forward_hook(
            lambda m, a, out: seen.append(out.chapters)
        )
    logits(model, tokens(2, 9))
    assert [tuple(c.shape) for c in seen] == [(2, 9, 2)] * 2
    assert all(c.min() >= 0 and c.max() < CHAPTERS for c in seen)
