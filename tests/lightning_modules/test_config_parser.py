"""Wrong input on the command line ends in one line that names it and the closest valid name."""

from __future__ import annotations

import pytest
import yaml
from cli_cases import CONFIG

OF_MODULE = "of CaseModule"


def with_value(path: str, value: object) -> str:
    """`CONFIG` with one value set at a dotted path (digits index lists)."""
    config = yaml.safe_load(CONFIG)
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[int(parent) if parent.isdigit() else parent]
    node[last] = value
    return yaml.safe_dump(config, sort_keys=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.yaml", None, "config file 'absent.yaml' not found"),
        ("broken.yaml", "model: [1, 2\nfoo: }", "line 2, column 4 (in broken.yaml)"),
        ("empty.yaml", "", "expected a mapping of keys to values (in empty.yaml)"),
        ("list.yaml", "- 1\n- 2\n", "expected a mapping of keys to values (in list.yaml)"),
    ],
)
def test_bad_config_file_is_named(run_cli, tmp_path, name, content, message) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    result = run_cli("fit", "--config", name)
    assert result.code == 2
    assert message in result.last_line


def test_absent_config_names_the_closest(run_cli, monkeypatch, tmp_path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").touch()
    monkeypatch.setattr("lightning_modules.config_parser.ROOT", tmp_path)
    result = run_cli("fit", "--config", "configs/quikstart.yaml")
    assert result.last_line.endswith("; did you mean 'configs/quickstart.yaml'?")


# --- wrong input: one line, exit code 2 ---

WRONG_OPTIONS = [
    ("--trainr.max_steps=3", "unknown key 'trainr'; did you mean 'trainer'?"),
    ("--trainer.max_step=3", "unknown key 'trainer.max_step'; did you mean 'max_steps'?"),
    (
        "--model.horizn=3",
        f"unknown key 'model.init_args.horizn' {OF_MODULE}; did you mean 'horizon'?",
    ),
    (
        "--model.init_args.horizo=3",
        f"unknown key 'model.init_args.horizo' {OF_MODULE}; did you mean 'horizon'?",
    ),
    (
        "--model.expert.memory.sise=3",
        "unknown key 'model.init_args.expert.memory.sise' of CaseMemory; did you mean 'size'?",
    ),
    (
        "--model.optimizer.lrr=3",
        "unknown key 'model.init_args.optimizer.init_args.lrr' of AdamW; did you mean 'lr'?",
    ),
    (
        "--data.batchsize=3",
        "unknown key 'data.init_args.batchsize' of CaseData; did you mean 'batch_size'?",
    ),
    ("--trainer.max_steps=x", "wrong value 'x' for 'trainer.max_steps': expected int"),
    (
        "--model.expert.memory.size=x",
        "wrong value 'x' for 'model.init_args.expert.memory.size' of CaseMemory: expected int",
    ),
    (
        "--model.expert.memory.kind=linea",
        "wrong value 'linea' for 'model.init_args.expert.memory.kind' of CaseMemory: "
        "expected 'linear' or 'mlp'; did you mean 'linear'?",
    ),
    (
        "--model.optimizer.lr=x",
        "wrong value 'x' for 'model.init_args.optimizer.init_args.lr' of AdamW: "
        "expected float | Tensor",
    ),
    ("--model=CaseModul", "unknown class 'CaseModul' for 'model'; did you mean 'CaseModule'?"),
    ("--data=CaseDat", "unknown class 'CaseDat' for 'data'; did you mean 'CaseData'?"),
    (
        "--model.optimizer=AdanW",
        f"unknown class 'AdanW' for 'model.init_args.optimizer' {OF_MODULE}; did you mean 'AdamW'?",
    ),
    (
        "--trainer.callbacks+=CaseMonito",
        "unknown class 'CaseMonito' for 'trainer.callbacks'; did you mean 'CaseMonitor'?",
    ),
    (
        "--trainer.logger=TensorboardLoger",
        "unknown class 'TensorboardLoger' for 'trainer.logger'; did you mean 'TensorBoardLogger'?",
    ),
]


@pytest.mark.parametrize(("option", "message"), WRONG_OPTIONS)
def test_wrong_option_is_named_with_the_closest_valid_name(fit, option, message) -> None:
    result = fit(option)
    assert result.code == 2
    assert result.last_line == f"error: {message}"
    assert len(result.err.splitlines()) == 2


WRONG_VALUES = [
    ("modle", {"a": 1}, "unknown key 'modle'; did you mean 'model'?"),
    ("trainer.max_step", 3, "unknown key 'trainer.max_step'; did you mean 'max_steps'?"),
    (
        "trainer.callbacks.0.init_args.every",
        3,
        "unknown key 'trainer.callbacks.init_args.every' of CaseMonitor; "
        "did you mean 'every_n_steps'?",
    ),
    (
        "trainer.callbacks.0.init_arg",
        {"every_n_steps": 3},
        "unknown key 'trainer.callbacks.init_arg'; did you mean 'init_args'?",
    ),
    (
        "model.init_args.expert.hiden_size",
        3,
        "unknown key 'model.init_args.expert.hiden_size' of CaseExpert; "
        "did you mean 'hidden_size'?",
    ),
    (
        "model.init_args.expert.inner",
        {"sise": 3},
        "unknown key 'model.init_args.expert.inner.sise' of CaseExpert; did you mean 'size'?",
    ),
    (
        "model.init_args.groups.gate.lr_scal",
        3,
        "unknown key 'model.init_args.groups.lr_scal' of ParameterGroup; did you mean 'lr_scale'?",
    ),
    (
        "model.init_args.optimizer.init_args.weight_deca",
        3,
        "unknown key 'model.init_args.optimizer.init_args.weight_deca' of AdamW; "
        "did you mean 'weight_decay'?",
    ),
    (
        "trainer.callbacks.0.init_args.every_n_steps",
        "x",
        "wrong value 'x' for 'trainer.callbacks.init_args.every_n_steps' of CaseMonitor: "
        "expected int",
    ),
    (
        "model.init_args.expert.memory",
        7,
        "wrong value '7' for 'model.init_args.expert.memory' of CaseExpert: "
        "expected CaseMemory | null",
    ),
    (
        "model.init_args.expert.inner",
        7,
        "wrong value '7' for 'model.init_args.expert.inner' of CaseExpert: "
        "expected a mapping with keys kind, limit, rates, size",
    ),
    (
        "model.init_args.horizon",
        None,
        f"wrong value 'null' for 'model.init_args.horizon' {OF_MODULE}: expected int",
    ),
    ("trainer.max_steps", 2.5, "wrong value '2.5' for 'trainer.max_steps': expected int"),
    (
        "trainer.callbacks.0.class_path",
        "CaseMonitr",
        "unknown class 'CaseMonitr' for 'trainer.callbacks'; did you mean 'CaseMonitor'?",
    ),
    (
        "trainer.callbacks.0.class_path",
        "cli_cases.CaseMonitr",
        "unknown class 'cli_cases.CaseMonitr' for 'trainer.callbacks' "
        "(module 'cli_cases' has no attribute 'CaseMonitr'); did you mean 'CaseMonitor'?",
    ),
    (
        "trainer.callbacks.0.class_path",
        "cli_cases.CaseData",
        "class 'cli_cases.CaseData' does not fit 'trainer.callbacks' "
        "(does not correspond to a subclass of Callback)",
    ),
    (
        "model.init_args.optimizer.class_path",
        "torch.optim.AdanW",
        f"unknown class 'torch.optim.AdanW' for 'model.init_args.optimizer' {OF_MODULE} "
        "(module 'torch.optim' has no attribute 'AdanW'); did you mean 'AdamW'?",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG_VALUES)
def test_wrong_config_is_named_with_the_closest_valid_name(
    run_cli, tmp_path, path, value, message
) -> None:
    (tmp_path / "wrong.yaml").write_text(with_value(path, value))
    result = run_cli("fit", "--config", "wrong.yaml")
    assert result.code == 2
    assert result.last_line.removesuffix(" (in wrong.yaml)") == f"error: {message}"
    assert len(result.err.splitlines()) == 2


def test_missing_key_is_named(run_cli, fit, tmp_path) -> None:
    config = yaml.safe_load(CONFIG)
    del config["model"]["init_args"]["optimizer"]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(config))
    message = "error: missing key 'model.init_args.optimizer' of CaseModule"
    assert run_cli("fit", "--config", "wrong.yaml").last_line.startswith(message)
    assert run_cli("fit").last_line.startswith("error: missing key 'data'")


# --- errors while running ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.groups.gate.lr_scale", "-1"), "lr_scale=-1.0 must be positive"),
        (("--model.groups", "{gat: {}}"), "unknown parameter group 'gat'"),
        (("--trainer.accelerator", "abacus"), "accelerator='abacus'"),
        (("--ckpt_path", "absent.ckpt"), "absent.ckpt"),
        (("--data.batch_size", "0"), "batch_size=0"),
    ],
)
def test_rejected_input_ends_in_one_line_without_a_traceback(fit, options, message) -> None:
    result = fit(*options)
    assert result.code == 1
    assert result.last_line.startswith("error: ")
    assert message in result.last_line
    assert "Traceback" not in result.err


def test_a_bug_keeps_its_own_type_and_traceback(fit) -> None:
    with pytest.raises(RuntimeError, match="shape") as caught:
        fit("--model.fail", "true")
    assert caught.traceback[-1].name == "__init__"
    assert caught.value.__cause__ is None
