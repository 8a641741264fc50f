"""Input that no parser can know to be wrong ends in one line that names the cause and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from datamodules.base import StreamDataModule
from lightning_modules.base import Schedule
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.pretrained import check_base
from lightning_modules.user_errors import answer

ROOT = Path(cli.__file__).parent


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("case.yaml",), "'case.yaml' is no option; config files go behind --config"),
        ((), "missing key 'data': give it in a --config file, e.g. --config configs/quick"),
        (("--config",), "argument -c/--config: expected one argument"),
        (("--confg", "case.yaml"), "unknown key 'confg'; did you mean 'config'?"),
        (("--model.help", "LaCTModul"), "unknown class 'LaCTModul' for --model.help; did you"),
        (("--data.help", "ChatData"), "unknown class 'ChatData' for --data.help; did you mean"),
        (("--print_config=coments",), "unknown flag 'coments' of --print_config; did you mean"),
        (("--seed_everything", "abc"), "wrong value 'abc' for 'seed_everything': expected bool"),
    ],
)
def test_wrong_use_of_the_command_line_is_named(run_cli, args, message) -> None:
    result = run_cli("fit", *args)
    assert result.code == 2
    assert result.last_line.startswith(f"error: {message}")
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("--max_steps", "'max_steps'; did you mean 'trainer.max_steps'?"),
        ("--model.memory_size", "CaseModule; did you mean 'expert.memory'?"),
        ("--model.hidden", "CaseModule; did you mean 'expert.hidden_size'?"),
        ("--model.horizn", "CaseModule; did you mean 'horizon'?"),
    ],
)
def test_an_option_without_its_group_is_found(fit, key, answer) -> None:
    result = fit(key, "3")
    assert result.code == 2
    assert result.last_line.endswith(answer)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--trainer.accelerator", "gpu"), 1, "torch finds no GPU here: use --trainer.acc"),
        (("--trainer.strategy", "dpp"), 1, "invalid strategy name: `strategy='dpp'`"),
        (("--trainer.max_steps", "-5"), 1, "`max_steps` must be a non-negative integer or -1"),
        (("--seed_everything", "-1"), 1, "seed_everything=-1 must lie between 0 and"),
        (("--model.optimizer.lr", "-1"), 1, "Invalid learning rate: -1.0"),
        (("--model.optimizer", "torch.optim.Adan"), 2, "unknown class 'torch.optim.Adan' for"),
        (("--ckpt_path", "text.ckpt"), 1, "is no checkpoint, damaged, or has more in it than"),
        (("--ckpt_path", "cut.ckpt"), 1, "names is damaged or not complete: use another one"),
        (("--ckpt_path", "."), 1, "is a folder: name the file, e.g."),
        (("--ckpt_path", "other.ckpt"), 1, "the checkpoint does not fit the model (size mismatch"),
        (("--model.expert.memory.rates", "x"), 2, "; write it as a list: '[x]'"),
        (("--ckpt_path", "less.ckpt"), 1, '(Missing key(s) in state_dict: "layer.weight"): give'),
        (("--data.num_workers", "-1"), 1, "num_workers=-1 must be at least 0"),
    ],
)
def test_wrong_value_ends_in_one_line_without_a_traceback(
    fit, tmp_path, args, code, message
) -> None:
    if "gpu" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    state = {"layer.weight": torch.zeros(2, 2), "layer.bias": torch.zeros(4)}
    checkpoint: dict[str, Any] = {"state_dict": state, "loops": {}, "global_step": 0, "epoch": 0}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    checkpoint["state_dict"] = {}
    torch.save({**checkpoint, "pytorch-lightning_version": "2.6.0"}, tmp_path / "less.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "other.ckpt").read_bytes()[:500])
    result = fit(*args)
    assert result.code == code
    assert result.last_line.startswith("error: ")
    assert message in result.last_line
    assert "Traceback" not in result.err


def test_data_of_another_kind_names_the_data_that_fits(run_cli) -> None:
    quickstart = ("fit", "--config", str(ROOT / "configs" / "quickstart.yaml"))
    result = run_cli(*quickstart, "--trainer.logger", "false", "--data", "RecallDataModule")
    assert result.code == 1
    expected = (
        "RecallDataModule does not have them: use ActionChunkDataModule or RecordedSimulation"
    )
    assert expected in result.last_line


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", -64), ("num_layers", 0), ("head_dim", 0), ("observation_tokens", 0)],
)
def test_sizes_of_the_expert_are_positive(name, value) -> None:
    with pytest.raises(ValueError, match=f"expert.{name}={value} must be at least 1"):
        ExpertConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "lama"}, "config.model_type='lama' is unknown.*did you mean 'llama'?"),
        ({"hiden_size": 64}, "unknown key 'hiden_size' of llama; did you mean 'hidden_size'?"),
        ({"hidden_size": "abc"}, "config of llama: .*hidden_size.*expected int"),
        ({"num_attention_heads": 5, "hidden_size": 64}, "config of llama: .*not a multiple of"),
    ],
)
def test_configuration_of_a_model_from_scratch_is_checked(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_base({"model_type": "llama", **options}, None)


def test_configuration_by_another_name_and_with_an_attention_passes() -> None:
    options = {"n_embd": 32, "hidden_size": 32, "attn_implementation": "eager"}
    check_base({"model_type": "gpt2", **options}, None)


@pytest.mark.parametrize("name", ["batch_size", "tbptt"])
def test_sizes_of_a_batch_are_positive(name) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        StreamDataModule(**{name: 0})


def test_schedule_goes_forward() -> None:
    with pytest.raises(ValueError, match="warmup_steps=-1 .* must be at least 0"):
        Schedule(warmup_steps=-1)


def test_a_bug_has_no_answer() -> None:
    try:
        torch.zeros(2).view(3)
    except RuntimeError as error:
        assert answer(error) is None
