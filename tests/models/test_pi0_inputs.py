"""Pictures and instructions against transformers' own processor, and what is said of bad ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pi0_cases import CONFIG, FEATURES, TASKS, TOP, WRIST, make_chunk, make_pi0, save_official
from PIL import Image
from torch import Tensor

from lightning_modules.models.pi0_inputs import PROMPT_LENGTH, PI0Inputs
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.models.projection_lora import ProjectionLoRA

IMAGE_TOKENS, SIDE = 4, 28


@pytest.fixture(scope="module")
def inputs() -> PI0Inputs:
    return make_pi0().model.inputs


def official(inputs: PI0Inputs, chunk: dict[str, Any], cameras: list[str]) -> dict[str, Tensor]:
    """What the official processor makes of the same pictures and texts."""
    return inputs.processor(
        images=[[chunk[key][row] for key in cameras] for row in range(3)],
        text=[TASKS[int(task)] for task in chunk["task"]],
        padding="max_length",
        max_length=len(cameras) * IMAGE_TOKENS + PROMPT_LENGTH,
    )


def test_everything_equals_the_official_processor(inputs: PI0Inputs) -> None:
    chunk = make_chunk()
    expected = official(inputs, chunk, [TOP, WRIST])
    for name, value in inputs(chunk, 3)._asdict().items():
        assert torch.equal(value, expected[name]), name


def test_a_camera_that_is_absent_is_masked_and_takes_no_tokens(inputs: PI0Inputs) -> None:
    chunk = make_chunk()
    del chunk[TOP]
    seen, expected = inputs(chunk, 3), official(inputs, chunk, [WRIST])
    assert seen.pixel_attention_mask.tolist() == [[False, True]] * 3
    length = expected["input_ids"].shape[1]
    assert torch.equal(seen.input_ids[:, :length], expected["input_ids"])
    assert torch.equal(seen.attention_mask[:, :length], expected["attention_mask"])
    assert not seen.attention_mask[:, length:].any()
    assert torch.equal(seen.pixel_values[:, 1:], expected["pixel_values"])


def test_a_camera_may_be_missing_in_some_rows_only(inputs: PI0Inputs) -> None:
    chunk = make_chunk()
    chunk[f"{TOP}_is_pad"] = torch.tensor([False, True, False])
    mixed, full = inputs(chunk, 3), inputs(make_chunk(), 3)
    without = inputs({key: value for key, value in chunk.items() if TOP not in key}, 3)
    for ours, all_rows, none in zip(mixed[:2], full[:2], without[:2], strict=True):
        assert torch.equal(ours[[0, 2]], all_rows[[0, 2]]) and torch.equal(ours[1], none[1])
    assert mixed.pixel_attention_mask.tolist() == [[True, True], [False, True], [True, True]]


def test_the_model_sees_no_more_of_a_missing_camera_than_if_it_were_absent() -> None:
    module, chunk = make_pi0(), make_chunk()
    noise, time = torch.randn(3, 6, 8), torch.rand(3)
    chunk[f"{TOP}_is_pad"] = torch.ones(3, dtype=torch.bool)
    masked = module.model(module.model.observe(chunk), noise, time)
    absent = {key: value for key, value in chunk.items() if TOP not in key}
    assert torch.equal(masked, module.model(module.model.observe(absent), noise, time))
    del chunk[f"{TOP}_is_pad"]
    assert not torch.allclose(masked, module.model(module.model.observe(chunk), noise, time))


def test_pictures_keep_their_aspect_and_are_padded_as_pillow_resizes_them(inputs) -> None:
    chunk = make_chunk()
    pixels = inputs(chunk, 3).pixel_values[0, 0]  # 20 x 40 becomes 14 x 28
    picture = Image.fromarray(chunk[TOP][0].permute(1, 2, 0).numpy())
    resized = np.asarray(picture.resize((28, 14), Image.Resampling.BICUBIC), np.float32)
    expected = torch.from_numpy(resized).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels[:, :14], expected, rtol=0, atol=1.01 / 127.5)  # rounding
    assert (pixels[:, 14:] == 0).all()


def test_floating_pictures_are_taken_as_zero_to_one(inputs: PI0Inputs) -> None:
    chunk = make_chunk()
    floating = {**chunk, TOP: chunk[TOP] / 255, WRIST: chunk[WRIST] / 255}
    assert torch.equal(inputs(floating, 3).pixel_values, inputs(chunk, 3).pixel_values)


def test_instructions_in_words_equal_those_of_the_recording(inputs: PI0Inputs) -> None:
    chunk = make_chunk()
    words = {**chunk, "task": [TASKS[int(task)] for task in chunk["task"]]}
    for ours, expected in zip(inputs(words, 3), inputs(chunk, 3), strict=True):
        assert torch.equal(ours, expected)
    one = inputs({**chunk, "task": TASKS[1]}, 3)
    assert torch.equal(one.input_ids[0], inputs(chunk, 3).input_ids[1])


def test_without_a_task_the_only_one_is_meant(inputs: PI0Inputs) -> None:
    chunk = make_chunk()
    del chunk["task"]
    with pytest.raises(ValueError, match="no 'task', but the policy knows 2: give one in words"):
        inputs(chunk, 3)
    single = make_pi0(features={"tasks": {3: "Push."}}).model.inputs
    assert torch.equal(single(chunk, 3).input_ids, inputs({**chunk, "task": "Push."}, 3).input_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({TOP: torch.zeros(3, 20, 40, 3)}, r"images.top has shape \(3, 20, 40, 3\); expected \[3"),
        ({"task": ["a", "b"]}, "2 instructions for 3 observations"),
        ({"task": "x" * 60}, "has 63 tokens, pi0 reads 48: shorten it"),
    ],
)
def test_bad_observations_name_cause_and_fix(inputs, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inputs({**make_chunk(), **change}, 3)


def test_no_picture_at_all_is_an_error(inputs: PI0Inputs) -> None:
    chunk = make_chunk()
    with pytest.raises(ValueError, match=f"no picture: give at least one of {TOP}, {WRIST}"):
        inputs({"task": chunk["task"]}, 3)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"horizon": 5}, "chunks of 6 actions .chunk_size., but the data's horizon is 5: set"),
        ({"state_dim": 9}, "state_dim=9, but this pi0 takes at most 8 .max_state_dim."),
        ({"action_dim": 9}, "action_dim=9, but this pi0 takes at most 8 .max_action_dim."),
        ({"image_keys": []}, "the data has none: set image_keys of the DataModule"),
        ({"tasks": {}}, "reads the instruction of every episode"),
    ],
)
def test_data_that_does_not_fit_names_cause_and_fix(features: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PI0Options(config=CONFIG).check({**FEATURES, **features})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either pi0.pretrained .* or pi0.config"),
        ({"pretrained": "a", "config": {}}, "either pi0.pretrained .* or pi0.config"),
        ({"config": {}, "train": "some"}, "train='some': choose one of"),
        ({"config": {}, "vlm_dtype": "float16"}, "choose float32 or bfloat16"),
        ({"config": {}, "train": "all", "vlm_dtype": "bfloat16"}, "set pi0.vlm_dtype to float32"),
    ],
)
def test_bad_options_name_cause_and_fix(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PI0Options(**options)


def test_bad_lora_names_cause_and_fix() -> None:
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        ProjectionLoRA(rank=0)
    with pytest.raises(ValueError, match="choose from q_proj"):
        ProjectionLoRA(targets=("query",))


def test_a_folder_that_is_no_pi0_names_cause_and_fix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no readable config.json"):
        PI0Options(pretrained=str(tmp_path)).check(FEATURES)
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pytest.raises(ValueError, match="is a 'gemma' model, not 'pi0'"):
        PI0Options(pretrained=str(tmp_path)).check(FEATURES)


def test_a_missing_tokenizer_and_another_models_tokenizer_are_errors(tmp_path: Path) -> None:
    save_official(tmp_path)
    PI0Options(pretrained=str(tmp_path)).check(FEATURES)
    (tmp_path / "empty").mkdir()
    options = PI0Options(pretrained=str(tmp_path), processor=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no tokenizer in .*: name a folder or hub id"):
        options.check(FEATURES)
    other = {**CONFIG, "vlm_config": {**CONFIG["vlm_config"], "image_token_id": 299}}
    from transformers import PI0Config

    PI0Config(**other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="<image> the id 260, the model expects 299"):
        PI0Options(pretrained=str(tmp_path)).check(FEATURES)


def test_layers_that_cannot_attend_to_each_other_are_an_error() -> None:
    config = {**CONFIG, "dit_config": {**CONFIG["dit_config"], "num_hidden_layers": 3}}
    with pytest.raises(ValueError, match="num_hidden_layers must agree: 3 in dit_config, 2 in vlm"):
        PI0Options(config=config).check(FEATURES)


def test_options_of_another_backbone_are_an_error() -> None:
    from expert_cases import make_module

    with pytest.raises(ValueError, match="does not read the options of 'pi0'"):
        make_module(pi0=PI0Options(config=CONFIG))
    with pytest.raises(ValueError, match="compile_model=true is for backbone: state"):
        make_pi0(module={"compile_model": True})
    with pytest.raises(ValueError, match="has 2, but the expert's 2 layers are 0 to 1"):
        make_pi0(module={"ttt_layer_positions": [0, 2]})
    with pytest.raises(ValueError, match="an expert without adarms has none"):
        make_pi0(ttt={"ttt_gate": "adarms"})
