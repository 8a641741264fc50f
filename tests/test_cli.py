"""The command line: runs, overrides, merges, finds files, answers fast."""

from __future__ import annotations

import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from cli_cases import CONFIG

import cli

ROOT = Path(cli.__file__).parent


@pytest.fixture
def printed(fit):
    """The configuration that `--print_config` prints."""
    return lambda *args: yaml.safe_load(fit(*args, "--print_config").out)


# --- first screen ---


def test_help_answers_within_a_second_without_importing_lightning() -> None:
    code = "import sys, cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    assert seconds < 1
    first_screen = done.stdout.splitlines()
    assert len(first_screen) <= 40
    assert max(len(line) for line in first_screen) <= 100
    assert "memory that learns while it reads" in first_screen[0]


def test_help_names_only_models_that_exist() -> None:
    import lightning_modules

    listed = cli.HELP.partition("models")[2].partition("from nothing")[0].split()
    names = {word for word in listed if word.endswith("Module")}
    assert names == set(lightning_modules.__all__)


@pytest.mark.parametrize("args", [(), ("-h",), ("--help",)])
def test_no_command_shows_the_first_screen(run_cli, args) -> None:
    assert run_cli(*args) == (0, cli.HELP, "")


def test_wrong_command_names_the_closest(run_cli) -> None:
    result = run_cli("fitt", "--config", "case.yaml")
    assert result == (2, "", "error: unknown command 'fitt'; did you mean 'fit'?\n")


def test_console_script_is_declared() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"]
    assert scripts.split() == ["fast-weights", "=", "cli:main"]


# --- runs ---


def test_fit_runs_with_short_names_and_the_two_stream_callbacks(fit) -> None:
    result = fit()
    assert result.code == 0, result.err
    callbacks = next(line for line in result.out.splitlines() if line.startswith("callbacks:"))
    for name in ("CaseMonitor", "RichModelSummary", "FileBoundaryReset", "StreamStateCheckpoint"):
        assert callbacks.split().count(name) == 1


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_commands_run_cli(run_cli, command) -> None:
    assert run_cli(command, "--config", "case.yaml", "--trainer.limit_val_batches", "1").code == 0


def test_saved_config_runs_again_and_is_overwritten(fit, tmp_path) -> None:
    options = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path))
    assert fit(*options, "--trainer.logger.version", "0").code == 0
    saved = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    assert fit("--config", str(saved)).code == 0
    assert yaml.safe_load(saved.read_text())["seed_everything"] == 0


def test_fit_ends_with_a_command_that_runs(fit, run_cli, tmp_path) -> None:
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path))
    saving = ("--trainer.enable_checkpointing", "true", "--trainer.callbacks+=ModelCheckpoint")
    result = fit(*logger, *saving, "--trainer.callbacks.save_last", "true")
    run = "lightning_logs/version_0"
    assert f"last checkpoint: {run}/checkpoints/last.ckpt" in result.out.splitlines()
    command = f"test --config {run}/config.yaml --ckpt_path {run}/checkpoints/last.ckpt"
    assert f"next: python cli.py {command}" == result.out.splitlines()[-1]
    tested = run_cli(*command.split())
    assert tested.code == 0, tested.err


@pytest.mark.parametrize("step", [1, 2])
def test_interrupted_fit_says_how_it_goes_on(fit, run_cli, tmp_path, step: int) -> None:
    logger = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path))
    saving = ("--trainer.enable_checkpointing", "true", "--trainer.callbacks+=ModelCheckpoint")
    often = ("--trainer.callbacks.save_last", "true", "--trainer.callbacks.every_n_train_steps")
    ctrl_c = ("--trainer.callbacks+=CaseInterrupt", "--trainer.callbacks.step", str(step))
    result = fit(*logger, *saving, *often, "1", *ctrl_c)
    assert result.code == 1
    lines = result.out.splitlines()
    assert f"interrupted at step {step}" in lines
    if step == 1:  # checkpoints are saved behind all other callbacks, so there is none yet
        assert lines[-1] == "no checkpoint was saved yet: the next fit begins anew"
        return
    run = "lightning_logs/version_0"
    command = f"fit --config {run}/config.yaml --ckpt_path {run}/checkpoints/last.ckpt"
    assert lines[-1] == f"go on: python cli.py {command}"
    again = run_cli(*command.split(), "--trainer.max_steps", "1")
    assert again.code == 0, again.err


def test_fit_without_logger_and_checkpoint_promises_nothing(fit) -> None:
    assert "next:" not in fit().out


def test_option_wins_over_config(printed) -> None:
    config = printed(
        "--model.horizon", "9", "--model.expert.memory.size=5", "--model.optimizer.lr=2"
    )
    arguments = config["model"]["init_args"]
    assert arguments["horizon"] == 9
    assert arguments["expert"]["memory"]["size"] == 5
    assert arguments["optimizer"]["init_args"]["lr"] == 2.0
    assert config["trainer"]["max_steps"] == 2


def test_null_reaches_a_nested_option(printed) -> None:
    config = printed("--model.expert.inner.limit=3", "--model.expert.memory.limit=null")
    expert = config["model"]["init_args"]["expert"]
    assert expert["inner"]["limit"] == 3
    assert expert["memory"]["limit"] is None
    assert printed("--model.expert.memory=null")["model"]["init_args"]["expert"]["memory"] is None


def test_later_config_wins_and_the_rest_is_kept(printed, tmp_path) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_steps: 7}\ndata: {init_args: {tbptt: 2}}")
    config = printed("--config", "more.yaml")
    assert config["trainer"]["max_steps"] == 7
    assert config["trainer"]["accelerator"] == "cpu"
    assert config["data"]["init_args"]["tbptt"] == 2
    assert config["data"]["init_args"]["batch_size"] == 2


def test_class_is_replaced_by_a_short_name(printed) -> None:
    config = printed("--model.optimizer", "SGD")
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.SGD"


def test_one_group_of_parameters_is_overridden(printed) -> None:
    groups = printed("--model.groups.gate.lr_scale", "4")["model"]["init_args"]["groups"]
    assert groups["gate"]["lr_scale"] == 4.0


def test_data_is_sharded_by_the_stream_sampler_alone(printed) -> None:
    assert printed()["trainer"]["use_distributed_sampler"] is False


def test_print_config_with_comments_explains_keys(fit) -> None:
    assert "# " in fit("--print_config=comments").out


# --- files ---


def test_config_is_found_beside_cli_from_any_directory(run_cli, monkeypatch, tmp_path) -> None:
    (tmp_path / "root" / "configs").mkdir(parents=True)
    (tmp_path / "root" / "configs" / "far.yaml").write_text(CONFIG)
    monkeypatch.setattr("lightning_modules.config_parser.ROOT", tmp_path / "root")
    assert run_cli("fit", "--config", "configs/far.yaml", "--print_config").code == 0


def test_config_in_the_current_directory_comes_first(run_cli, monkeypatch, tmp_path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "case.yaml").write_text("not: [valid")
    monkeypatch.setattr("lightning_modules.config_parser.ROOT", tmp_path / "root")
    assert run_cli("fit", "--config", "case.yaml", "--print_config").code == 0


@pytest.mark.slow
def test_cli_runs_as_a_script_from_another_directory(tmp_path) -> None:
    code = [sys.executable, str(ROOT / "cli.py"), "fit", "--model.horizn", "3"]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: unknown key 'model.init_args.horizn'")


@pytest.mark.slow
def test_completion_for_bash_knows_commands_and_options() -> None:
    pytest.importorskip("shtab", reason="shtab writes it: pip install shtab")
    code = [sys.executable, str(ROOT / "cli.py"), "--print_completion=shtab-bash"]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_subparsers=(fit validate test predict)" in done.stdout
    assert "--trainer.max_steps" in done.stdout
