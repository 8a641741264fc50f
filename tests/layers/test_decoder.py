"""AdaptiveDecoderLayer: retrofit of a Gemma layer, and activation checkpointing."""

from typing import Any

import pytest
import torch
from gemma_cases import gemma_config, randomise, rotary
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaModel
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer

from lightning_modules.adapters import inject_adapters
from lightning_modules.layers.decoder import AdaptiveDecoderLayer
from lightning_modules.streams import FastState

BATCH, LENGTH, HIDDEN, COND = 2, 5, 32, 4


def _gemma_layer() -> GemmaDecoderLayer:
    torch.manual_seed(0)
    return randomise(GemmaDecoderLayer(gemma_config(), layer_idx=0))


@pytest.mark.parametrize("cond_size", [None, COND])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retrofitted_layer_equals_the_gemma_layer_bit_for_bit(
    cond_size: int | None, dtype: torch.dtype
) -> None:
    gemma = _gemma_layer().to(dtype).eval()
    layer = AdaptiveDecoderLayer.from_gemma(gemma, cond_size)
    assert layer.self_attn is gemma.self_attn and layer.mlp is gemma.mlp
    assert not any(module.training for module in layer.modules())
    cos_sin = tuple(table.to(dtype) for table in rotary(gemma_config(), BATCH, LENGTH))
    x = torch.randn(BATCH, LENGTH, HIDDEN).to(dtype)
    expected = gemma(x, position_embeddings=cos_sin)
    cond = None if cond_size is None else torch.randn(BATCH, COND).to(dtype)
    assert torch.equal(layer(x, position_embeddings=cos_sin, adarms_cond=cond), expected)


def test_retrofitted_layers_work_inside_a_gemma_model() -> None:
    torch.manual_seed(0)
    model = randomise(GemmaModel(gemma_config()), scale=0.1).eval()
    tokens = torch.arange(10).view(2, 5)
    expected = model(tokens).last_hidden_state
    for index, layer in enumerate(model.layers):
        model.layers[index] = AdaptiveDecoderLayer.from_gemma(layer, COND)
    cond = torch.randn(2, COND)
    assert torch.equal(model(tokens, adarms_cond=cond).last_hidden_state, expected)
    with torch.no_grad():
        model.layers[1].input_layernorm.dense.weight.add_(0.1)
    assert not torch.allclose(model(tokens, adarms_cond=cond).last_hidden_state, expected)


class _Stack(nn.Module):
    """Two retrofitted layers with TTT, over chunks whose state is carried from one to the next."""

    def __init__(self, adapter: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for index in range(2):
            torch.manual_seed(index)
            gemma = randomise(GemmaDecoderLayer(gemma_config(), layer_idx=index), index)
            self.layers.append(AdaptiveDecoderLayer.from_gemma(gemma, COND))
        inject_adapters(self, [("*", "ttt", adapter)])
        randomise(self, 7)

    def forward(
        self, chunks: Tensor, cond: Tensor, checkpointing: bool
    ) -> tuple[Tensor, FastState]:
        """Sum of the chunks' losses (`[k, B, T, hidden]`), and the last handle."""
        handle, loss = FastState.transient({"gate", "fast_weight"}), torch.zeros(())
        for x in chunks:
            context = {
                "position_embeddings": rotary(gemma_config(), BATCH, LENGTH),
                "adarms_cond": cond,
                "fast_state": handle,
                "write_mask": torch.arange(LENGTH).lt(3).expand(BATCH, -1),
            }
            for layer in self.layers:
                if checkpointing:
                    x = checkpoint(layer, x, use_reentrant=False, **context)
                else:
                    x = layer(x, **context)
            loss = loss + x.square().mean()
            last, handle = handle, handle.advance()
        return loss, last


CAUSAL = {"kind": "mlp", "num_heads": 2, "causal": True, "mini_batch_size": 3}


@pytest.mark.quick("*-layer1", "replace_attn-*")
@pytest.mark.parametrize("layer", [{"num_heads": 2}, {"kind": "mlp", "num_heads": 2}, CAUSAL])
@pytest.mark.parametrize("mode", ["after_attn", "after_residual", "parallel_attn", "replace_attn"])
def test_checkpointing_with_carried_state_changes_no_bit(layer: dict[str, Any], mode: str) -> None:
    options = {"ttt_mode": mode, "ttt_gate": "adarms_tanh", "cond_size": COND, "layer": layer}
    model = _Stack(options).train()
    chunks, cond = torch.randn(3, BATCH, LENGTH, HIDDEN), torch.randn(BATCH, COND)
    results = []
    for checkpointing in (False, True):
        model.zero_grad()
        loss, handle = model(chunks, cond, checkpointing)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss, gradients, handle))
    (plain, gradients, handle), (loss, again, same) = results
    assert torch.equal(loss, plain)
    for name, gradient in gradients.items():
        if gradient is None:
            assert mode == "replace_attn" and "base_attention" in name and again[name] is None
        else:
            assert torch.equal(again[name], gradient), name
    for slot, fields in handle.outgoing.items():
        for name, value in fields.items():
            assert torch.equal(same.outgoing[slot][name], value)
    for topic, slots in handle.published.items():
        for slot, values in slots.items():
            for name, value in values.items():
                assert torch.equal(same.published[topic][slot][name], value)


def test_gradients_flow_through_the_carried_state() -> None:
    model = _Stack({"cond_size": COND, "layer": {"num_heads": 2}})
    chunks, cond = torch.randn(2, BATCH, LENGTH, HIDDEN), torch.randn(BATCH, COND)
    chunks.requires_grad_()
    first = model(chunks[:1], cond, True)[0]
    both = model(chunks, cond, True)[0]
    (gradient,) = torch.autograd.grad(both - first, chunks)
    assert gradient[0].abs().max() > 1e-6 * gradient[1].abs().max() > 0
