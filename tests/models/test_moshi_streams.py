"""Moshi's temporal decoder with TTT-LoRA over files of audio codes: states go on and reset."""

from pathlib import Path
from typing import Any

import pytest
import torch
from audio_cases import CODEBOOKS, make_audio, write_codes
from torch import Tensor
from torch.nn import functional as F
from transformers import MoshiForCausalLM
from ttt_lora_module_cases import make_module

from lightning_modules.generation import FastStateCache
from lightning_modules.streams import NO_STREAM, FastState
from lightning_modules.ttt_lora import TTTLoRAModule

MOSHI = {
    "model_type": "moshi",
    "hidden_size": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "sliding_window": 256,
    "initializer_range": 0.2,
}
SLOTS = {
    f"model.layers.{n}.{group}.ttt_lora"
    for n in range(2)
    for group in ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2")
}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
"""float64 sums in another order (other matrix sizes) through two layers."""
ROUNDED = {"rtol": 1e-6, "atol": 1e-6}
"""The same in float32, in which losses are computed."""


def built(data: Any) -> TTTLoRAModule:
    """A float64 module whose adapters do something."""
    module = make_module(config=MOSHI)
    placement = {"inner_dim": 4, "learner": module.ttt_lora.learner}
    module.ttt_lora = type(module.ttt_lora)(**placement)  # all linear layers of Moshi
    module.build(data.features)
    module.double().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.named_parameters():
        if module.parameter_group(name) != "base":
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise
    return module


@pytest.fixture
def data(tmp_path: Path) -> Any:
    return make_audio(write_codes(tmp_path), val_fraction=0, tbptt=2)


def rows_of(slots: dict[str, dict[str, Tensor]], row: int) -> list[Tensor]:
    return [fields[key][row] for _, fields in sorted(slots.items()) for key in sorted(fields)]


@torch.no_grad()
def test_a_row_resets_exactly_where_its_file_changes_and_others_go_on(data: Any) -> None:
    module, before = built(data), None
    assert isinstance(module.model, MoshiForCausalLM)
    seen = {"alone": 0, "goes on": 0}
    for batch in data.train_dataloader():
        module.streams.begin_step("train")
        for chunk in batch:
            handle = module.streams.begin(chunk)
            entering = handle.advance().outgoing
            if before is not None:
                assert set(entering) == SLOTS
                for row, first in enumerate(chunk["is_first"].tolist()):
                    state, last = rows_of(entering, row), rows_of(before, row)
                    if first:
                        assert not any(value.any() for value in state)
                    else:
                        assert all(map(torch.equal, state, last))
                        assert any(value.abs().max() > 1e-3 for value in state)
                        seen["goes on"] += 1
                seen["alone"] += chunk["is_first"].sum().item() == 1
            module.chunk_loss(chunk, handle, None)
            before = handle.outgoing
        module.streams.commit()
    assert seen["alone"] >= 2 and seen["goes on"] >= 4, seen


@torch.no_grad()
def test_files_in_rows_beside_others_read_as_alone(data: Any) -> None:
    module = built(data)
    beside = losses_by_file(module, data)
    assert set(beside) == set(data.store.names)
    for number, name in enumerate(data.store.names):
        tokens = torch.from_numpy(data.store.document(number).astype("int64"))
        torch.testing.assert_close(beside[name], losses_alone(module, tokens), **ROUNDED)
    module.streams.persistent = False
    forgetful = losses_by_file(module, data)
    first, rest = slice(None, data.chunk_length), slice(data.chunk_length, None)
    torch.testing.assert_close(forgetful["c.npy"][first], beside["c.npy"][first], **ROUNDED)
    assert (forgetful["c.npy"][rest] - beside["c.npy"][rest]).abs().max() > 1e-3


def losses_alone(module: TTTLoRAModule, tokens: Tensor) -> Tensor:
    """Loss of every code of a file that is read chunk by chunk in a batch of one row."""
    handle, losses = FastState(), []
    for inputs, labels in zip(tokens[:-1].split(15), tokens[1:].split(15), strict=True):
        logits = module.model(inputs[None], use_cache=False, fast_state=handle).logits[0]
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        handle = handle.advance()
    return torch.cat(losses)


def losses_by_file(module: TTTLoRAModule, data: Any) -> dict[str, Tensor]:
    """Loss of every code, one file after the other."""
    found: dict[str, list[Tensor]] = {}
    module.streams.clear("train")
    for batch in data.train_dataloader():
        module.streams.begin_step("train")
        for chunk in batch:
            losses = module.token_losses(chunk, module.streams.begin(chunk))
            for row, stream in enumerate(chunk["stream_id"].tolist()):
                if stream != NO_STREAM:
                    name = data.store.names[data._split[0][stream]]
                    found.setdefault(name, []).append(losses[row][chunk["mask"][row]])
        module.streams.commit()
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(15, 15, 4), (1, 2, 31), (33, 1)])
def test_one_pass_equals_chunks_with_the_state_between(data: Any, sizes: tuple[int, ...]) -> None:
    module = built(data)
    ids = torch.stack([torch.from_numpy(data.store.document(n)[:34].astype("int64"))
                       for n in (0, 2)])  # fmt: skip
    assert ids.shape == (2, 34)
    whole = FastStateCache(module.model.config)
    expected = module.model(ids, past_key_values=whole).logits
    parts = FastStateCache(module.model.config)
    logits = [module.model(part, past_key_values=parts).logits for part in ids.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)
    assert set(parts.slots) == SLOTS
    for row in range(2):
        for value, one in zip(rows_of(parts.slots, row), rows_of(whole.slots, row), strict=True):
            torch.testing.assert_close(value, one, **CLOSE)


@torch.no_grad()
def test_what_is_generated_is_frames_of_codes(data: Any) -> None:
    module = built(data)
    prompt = torch.from_numpy(data.store.document(0)[:7].astype("int64"))[None]
    out = module.generate(prompt, max_new_tokens=8, do_sample=False)
    expected = prompt
    for _ in range(8):
        following = module.model(expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, following[:, None]], dim=1)
    assert torch.equal(out, expected)
    prompted = data.tokenizer.frames(prompt[0].tolist())
    assert prompted.shape == (CODEBOOKS, 2)
