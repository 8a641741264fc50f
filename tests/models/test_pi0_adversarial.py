"""Where pi0 could go wrong unseen: padding, masks, positions, precision, what is frozen."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pi0_cases import (
    CONFIG,
    HORIZON,
    PADDED,
    TASKS,
    TOP,
    WRIST,
    make_chunk,
    make_pi0,
    noise_and_time,
    official_inputs,
    sample,
    save_official,
    written,
)
from torch import Tensor, nn
from transformers import PI0ForConditionalGeneration

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.models.pi0 import Prefix
from lightning_modules.streams import FastState

ROWS = 4
IMAGE_TOKENS = 4
LENGTHS = [len(text) + 3 for text in TASKS.values()]  # bytes, <bos>, newline, the end of ByT5


def hard_chunk() -> dict[str, Any]:
    """Prompts of two lengths; both cameras, the first, the second, and none."""
    chunk = make_chunk(rows=ROWS)
    chunk[f"{TOP}_is_pad"] = torch.tensor([False, False, True, True])
    chunk[f"{WRIST}_is_pad"] = torch.tensor([False, True, False, True])
    return chunk


REAL = [2 * IMAGE_TOKENS + LENGTHS[0], IMAGE_TOKENS + LENGTHS[1],
        IMAGE_TOKENS + LENGTHS[0], LENGTHS[1]]  # fmt: skip
"""Tokens of the prefix of `hard_chunk` that are not padding."""


def row_of(chunk: dict[str, Any], row: int) -> dict[str, Any]:
    return {k: v[row : row + 1] for k, v in chunk.items() if isinstance(v, Tensor)}


def velocity(module: ActionExpertModule, chunk: dict[str, Any], **options: Any) -> Tensor:
    noise, time = noise_and_time(1, ROWS)
    return module.model(module.model.observe(chunk), noise, time, **options)


# --- the prefix ---


@pytest.mark.parametrize("adarms", [False, True])
def test_rows_with_other_cameras_and_prompts_sample_what_the_official_model_samples(
    tmp_path: Path, adarms: bool
) -> None:
    reference = save_official(tmp_path)
    module = make_pi0(
        pretrained=str(tmp_path), ttt={"alpha_init": 0.0}, shake=False, adarms=adarms
    ).eval()
    chunk, (noise, _) = hard_chunk(), noise_and_time(1, ROWS)
    expected = reference.sample_actions(**official_inputs(module, chunk), noise=noise, num_steps=3)
    assert torch.equal(sample(module, chunk, noise, 3), expected)


def test_a_row_without_a_camera_beside_others_equals_the_row_alone() -> None:
    module = make_pi0(adarms=True).double()
    chunk, (noise, time) = hard_chunk(), noise_and_time(1, ROWS)
    chunk["observation.state"] = chunk["observation.state"].double()
    noise, time = noise.double(), time.double()
    together = module.model(module.model.observe(chunk), noise, time)
    assert torch.isfinite(together).all()
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = module.model(module.model.observe(row_of(chunk, row)), noise[one], time[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-9, atol=1e-9)
    moved = module.model(module.model.observe(chunk), noise, time.index_fill(0, torch.tensor(1), 0))
    changed = [not torch.equal(moved[row], together[row]) for row in range(ROWS)]
    assert changed == [False, True, False, False], "time is the row's own"


def test_positions_go_on_where_each_rows_prefix_ends_and_masks_hide_what_they_must() -> None:
    module = make_pi0(adarms=True).eval()
    seen: dict[str, Tensor] = {}

    def spy(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update({key: kwargs[key] for key in ("position_ids", "attention_mask", "write_mask")})

    module.model.decoder.layers[0].register_forward_pre_hook(spy, with_kwargs=True)
    velocity(module, hard_chunk(), write="observation")
    suffix = torch.arange(1 + HORIZON)
    assert torch.equal(seen["position_ids"], torch.tensor(REAL)[:, None] + suffix)
    assert torch.equal(seen["write_mask"], (suffix == 0).expand(ROWS, -1))
    visible = seen["attention_mask"][:, 0]
    length = visible.shape[-1] - len(suffix)
    prefix = torch.arange(length) < torch.tensor(REAL)[:, None]
    assert torch.equal(visible[..., :length], prefix[:, None].expand(-1, len(suffix), -1))
    assert visible[:, 1:, length:].all(), "actions see the state and each other"
    assert visible[:, 0, length:].tolist() == [[True] + HORIZON * [False]] * ROWS


def test_what_is_cached_at_padding_is_never_read_and_reading_changes_nothing() -> None:
    module = make_pi0(adarms=True, train="all").train()
    prefix, (noise, time) = module.model.observe(hard_chunk()), noise_and_time(1, ROWS)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache.layers]
    first = module.model(prefix, noise, time)
    first.sum().backward(retain_graph=True)
    for layer, (keys, values) in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.get_seq_length() == keys.shape[-2]

    def changed(where: Tensor) -> Tensor:
        other: Prefix = prefix._replace(cache=deepcopy_cache(prefix))
        for layer in other.cache.layers:
            layer.values = layer.values + 100.0 * where[:, None, :, None]
        return module.model(other, noise, time)

    assert torch.equal(changed(prefix.attention_mask == 0), first)
    assert not torch.allclose(changed(prefix.attention_mask == 1), first)


def deepcopy_cache(prefix: Prefix) -> Any:
    layers = [(layer.keys.detach(), layer.values.detach()) for layer in prefix.cache.layers]
    copy = deepcopy(prefix._replace(cache=None, state=prefix.state.detach()))
    assert copy.cache is None
    cache = type(prefix.cache).__new__(type(prefix.cache))
    cache.__dict__.update(prefix.cache.__dict__)
    kind = type(prefix.cache.layers[0])
    cache.layers = [kind(keys, values) for keys, values in layers]
    return cache


def test_actions_alone_writing_know_nothing_of_the_state_and_the_state_token_all_of_it() -> None:
    module = make_pi0(adarms=True, ttt={"ttt_mode": "parallel_attn"})
    slots = {write: written(module, 1, write) for write in ("action", "observation")}
    with torch.no_grad():
        module.model.pi0.embed_action_time.state_proj.bias.add_(1.0)
    first = "layers.0.self_attn"  # what it reads has not been through attention
    assert torch.equal(written(module, 1, "action")[first]["dw"], slots["action"][first]["dw"])
    other = written(module, 1, "observation")[first]["dw"]
    assert not torch.allclose(other, slots["observation"][first]["dw"])


# --- padded dimensions ---


def test_padded_action_dimensions_get_no_gradient_but_are_sampled_as_the_official_does() -> None:
    module = make_pi0(adarms=True)
    module.chunk_loss(make_chunk(), FastState.transient(), None).backward()
    gradient = module.model.pi0.action_out_proj.weight.grad
    assert (gradient[3:] == 0).all() and (gradient[:3] != 0).any(dim=1).all()
    module.eval()
    with torch.no_grad():
        first = module.sample_actions(make_chunk(), None, torch.Generator().manual_seed(1))
        module.model.pi0.action_out_proj.bias[PADDED - 1] += 1.0
        other = module.sample_actions(make_chunk(), None, torch.Generator().manual_seed(1))
    assert first.shape == (3, HORIZON, 3)
    assert not torch.allclose(first, other), "the model reads its own padded dimensions"


# --- precision ---


def test_a_bfloat16_vision_language_model_is_the_official_one_in_bfloat16(tmp_path: Path) -> None:
    save_official(tmp_path)
    module = make_pi0(pretrained=str(tmp_path), shake=False, vlm_dtype="bfloat16").eval()
    official = PI0ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    chunk = hard_chunk()
    inputs = module.model.inputs(chunk, ROWS)
    with torch.no_grad():
        expected = official.model.vlm(
            inputs_embeds=official.model.embed_prefix(
                inputs.input_ids, inputs.pixel_values, inputs.pixel_attention_mask
            ),
            attention_mask=inputs.attention_mask,
            position_ids=inputs.attention_mask.cumsum(-1) - 1,
            token_type_ids=torch.zeros_like(inputs.input_ids),
            use_cache=True,
        ).past_key_values
        ours = module.model.observe(chunk).cache
        actions = module.sample_actions(chunk)  # the expert in float32, no autocast
    for mine, theirs in zip(ours.layers, expected.layers, strict=True):
        assert mine.keys.dtype == torch.bfloat16
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    assert actions.dtype == torch.float32 and torch.isfinite(actions).all()


@pytest.mark.parametrize("vlm_dtype", ["float32", "bfloat16"])
def test_frequencies_survive_true_bfloat16(vlm_dtype: str) -> None:
    right = {n: b for n, b in make_pi0(adarms=True).named_buffers() if n.endswith("freq")}
    assert len(right) == 5
    module = make_pi0(adarms=True, vlm_dtype=vlm_dtype).bfloat16()
    for name, buffer in module.named_buffers():
        if name in right:
            assert torch.equal(buffer, right[name]), name
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    double = make_pi0().double()
    assert {b.dtype for n, b in double.named_buffers() if n in right} == {torch.float64}


def test_time_features_are_computed_in_float32_under_autocast() -> None:
    module, time = make_pi0(adarms=True), torch.tensor([0.999, 1.0, 0.5])
    noise, _ = noise_and_time(1)
    features: list[Tensor] = []
    official = module.model.pi0.embed_action_time.sinusoid_embeds
    official.register_forward_hook(lambda *call: features.append(call[-1]))
    module.model.time_mlp.time_mlp_in.register_forward_pre_hook(
        lambda _, args: features.append(args[0])
    )
    prefix = module.model.observe(make_chunk())
    with torch.autocast("cpu", torch.bfloat16):
        module.model(prefix, noise, time)
    exact = time.double()[:, None] * official.sinusoid_freq.double()
    exact = torch.cat([exact.sin(), exact.cos()], dim=1)
    for found in features:
        # float32 angles of up to 1571: the sine of a bfloat16 one would be anything
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-4)
    assert len(features) == 2


@pytest.mark.parametrize("write", ["observation", "all"])
def test_recomputation_under_autocast_changes_neither_gradients_nor_states(write: str) -> None:
    results = []
    for recompute in (False, True):
        module = make_pi0(
            train="all", adarms=True, gradient_checkpointing=recompute,
            module={"ttt_state": "carry_episode", "ttt_write": write},
        ).train()  # fmt: skip
        module.streams.begin_step("train")
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            losses = [
                module.chunk_loss(chunk, module.streams.begin(chunk), None)
                for chunk in (make_chunk(0), make_chunk(1))
            ]
        sum(losses).backward()
        module.streams.commit()
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append((torch.stack(losses), gradients, module.streams.slots("train")))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    ttt = [g for n, g in results[0][1].items() if n.endswith("ttt.W1")]
    assert len(ttt) == 2 and all(g.abs().sum() > 0 for g in ttt)


# --- what is frozen ---


def with_dropout(**options: Any) -> ActionExpertModule:
    config = deepcopy(CONFIG)
    config["vlm_config"]["text_config"]["attention_dropout"] = 0.5
    return make_pi0(config=config, **options).train()


@pytest.mark.parametrize("train", ["added", "lora", "expert", "all"])
def test_dropout_of_a_frozen_vision_language_model_is_off_in_training(train: str) -> None:
    module = with_dropout(train=train)
    keys = [module.model.observe(make_chunk()).cache.layers[1].keys for _ in range(2)]
    assert torch.equal(*keys) == (train != "all")


def test_a_tokenizer_that_puts_something_before_the_pictures_is_an_error() -> None:
    inputs = make_pi0().model.inputs
    right = inputs.processor.tokenizer

    class Prefixed:
        bos_token = right.bos_token

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [right.bos_token_id, *right(text)["input_ids"]]}

    inputs.processor.tokenizer = Prefixed()
    with pytest.raises(
        ValueError, match="before the pictures, pi0 reads nothing there: switch off"
    ):
        inputs.tokens("Push.")


def test_another_value_anywhere_in_the_frozen_weights_changes_the_fingerprint(
    tmp_path: Path,
) -> None:
    save_official(tmp_path)
    module = make_pi0(pretrained=str(tmp_path), shake=False)
    before = module.model.fingerprint()
    with torch.no_grad():
        module.model.pi0.model.vlm.get_input_embeddings().weight[100:] += 1.0
    module.model._hash = None
    assert module.model.fingerprint() != before
