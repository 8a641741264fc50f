"""A policy that is made from a checkpoint alone acts as the module that was saved."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from checkpoint_cases import save
from expert_cases import FEATURES, HORIZON, STATE, STRIDE, make_chunk, make_module
from torch.utils.data import DataLoader
from toy_streams import same

from callbacks import EMA, FileBoundaryReset
from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.layers.normalization import Normalizer
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.policy import ActionExpertPolicy


def actions(policy: ActionExpertPolicy, steps: int = 2 * STRIDE + 1) -> np.ndarray:
    policy.reset()
    observations = np.random.default_rng(0).normal(size=(steps, 2, STATE)).astype(np.float32)
    return np.stack([policy.select_action(observation) for observation in observations])


def normalized(module: ActionExpertModule) -> ActionExpertModule:
    """The module with statistics of its own."""
    generator = np.random.default_rng(1)
    widths = {"observation.state": FEATURES["state_dim"], "action": FEATURES["action_dim"]}
    statistics = {
        name: {"mean": generator.normal(size=width), "std": generator.uniform(0.5, 2, size=width)}
        for name, width in widths.items()
    }
    module.normalization = "z_score"
    module.normalizer = Normalizer(statistics, "z_score")
    return module


CASES: dict[str, dict[str, Any]] = {
    "reset": {},
    "carry": {"ttt_state": "carry_episode", "layer": {"kind": "mlp", "target_norm": True}},
    "write": {"ttt_state": "carry_denoise", "ttt_write": "action", "ttt_layer_positions": [1]},
    "adarms": {"ttt": {"ttt_gate": "adarms_tanh", "ttt_mode": "after_residual"}},
    "control": {"with_ttt": False, "expert": {"adarms": False}},
    "delta": {"features": {"delta_actions": (1,), "stride": None}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_policy_of_a_checkpoint_acts_as_its_module(case: str, tmp_path: Path) -> None:
    module = normalized(make_module(**CASES[case])).eval()
    expected = actions(ActionExpertPolicy(module, seed=3))
    policy = ActionExpertPolicy.from_checkpoint(save(module, tmp_path / "a.ckpt"), seed=3)
    np.testing.assert_array_equal(actions(policy), expected)
    assert not policy.module.training
    assert not any(parameter.requires_grad for parameter in policy.module.parameters())
    other = ActionExpertPolicy.from_checkpoint(str(tmp_path / "a.ckpt"), seed=4)
    assert not np.allclose(actions(other), expected)


@pytest.mark.parametrize("option", ["execution_horizon", "denoise_steps"])
def test_options_of_acting_are_those_of_the_run(option: str, tmp_path: Path) -> None:
    module = make_module().eval()
    setattr(module, option, 2)
    path = save(module, tmp_path / "a.ckpt")
    rebuilt = ActionExpertPolicy.from_checkpoint(path)
    assert getattr(rebuilt.module, option) == 2
    np.testing.assert_array_equal(actions(rebuilt), actions(ActionExpertPolicy(module)))
    assert ActionExpertPolicy.from_checkpoint(path, execute=HORIZON).execute == HORIZON


def _as_lightning_2_6(checkpoint: dict[str, Any]) -> None:
    checkpoint["pytorch-lightning_version"] = "2.6.0"


def test_lightnings_load_from_checkpoint_with_the_options_of_the_run(tmp_path: Path) -> None:
    module = make_module().eval()
    path = save(module, tmp_path / "a.ckpt", _as_lightning_2_6)
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8}
    loaded = ActionExpertModule.load_from_checkpoint(
        path,
        optimizer=torch.optim.AdamW,
        expert=ExpertConfig(**sizes, intermediate_size=32),
        ttt=TTTAdapterConfig(layer=TTTConfig(num_heads=2)),
        execution_horizon=STRIDE,
        denoise_steps=3,
        normalization="none",
    )
    expected = actions(ActionExpertPolicy(module))
    np.testing.assert_array_equal(actions(ActionExpertPolicy(loaded.eval())), expected)


def test_a_rebuilt_module_refuses_to_train(tmp_path: Path) -> None:
    policy = ActionExpertPolicy.from_checkpoint(save(make_module(), tmp_path / "a.ckpt"))
    policy.module.requires_grad_(True)
    with pytest.raises(RuntimeError, match="run python cli.py fit --ckpt_path"):
        policy.module.configure_optimizers()


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.ckpt", "none.ckpt does not exist: name the file"), ("", "is a folder: name the file")],
)
def test_a_missing_file_is_an_error(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        ActionExpertPolicy.from_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"seed_everything: 0\n", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_checkpoint_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.yaml cannot be read as a checkpoint"):
        ActionExpertPolicy.from_checkpoint(tmp_path / "config.yaml")


def test_code_that_hides_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "owned",)

    path = save(make_module(), tmp_path / "a.ckpt", lambda c: c.update(payload=Payload()))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint \\(UnpicklingError\\)"):
        ActionExpertPolicy.from_checkpoint(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(2)])
def test_the_checkpoint_of_something_else_is_an_error(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not the checkpoint of an ActionExpertModule"):
        ActionExpertPolicy.from_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize("lost", ["action_shift", "action_scale", "observation_state_shift"])
def test_a_checkpoint_without_a_statistic_is_an_error(lost: str, tmp_path: Path) -> None:
    def lose(checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"][f"normalizer.{lost}"]

    path = save(normalized(make_module()), tmp_path / "a.ckpt", lose)
    feature = "action" if "action" in lost else "observation.state"
    with pytest.raises(KeyError, match=f"no shift and scale for feature '{feature}'"):
        ActionExpertPolicy.from_checkpoint(path)


def test_data_without_a_statistic_that_the_run_needs_is_an_error() -> None:
    module, widths = make_module(), {"observation.state": STATE, "action": 3}
    module.normalization = "quantile"
    statistics = {name: {"q01": np.zeros(width)} for name, width in widths.items()}
    with pytest.raises(KeyError, match=r"'quantile' of 'observation.state' needs .*\['q99'\]"):
        module.build(FEATURES, statistics)


class Remember(pl.Callback):
    """Forgets nothing of the module's weights at the end of training."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_the_averages_of_ema_act_and_not_the_trained_weights(tmp_path: Path) -> None:
    module, remember = make_module(), Remember()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[remember, EMA(decay=0.5), FileBoundaryReset()],
    )  # fmt: skip
    batches = [[make_chunk(index, first=True)] for index in range(4)]
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=same))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    averaged = actions(ActionExpertPolicy(module))  # which the callback left in the module
    policy = ActionExpertPolicy.from_checkpoint(tmp_path / "end.ckpt")
    np.testing.assert_array_equal(actions(policy), averaged)
    module.load_state_dict(remember.weights)
    assert not np.allclose(actions(ActionExpertPolicy(module)), averaged), "power"
