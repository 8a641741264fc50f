"""pi0 as a policy is trained and used: fit on pictures, checkpoints, EMA, the closed loop."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from camera_folder import CAMERA, write_camera_folder
from checkpoint_cases import save
from pi0_cases import CONFIG, STRIDE, TASKS, TOP, WRIST, make_pi0, save_official

from callbacks import EMA, FileBoundaryReset
from datamodules.action_chunks import ActionChunkDataModule
from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.policy import ActionExpertPolicy


def observations(steps: int, rows: int = 2) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "observation.state": rng.normal(size=(rows, 5)).astype(np.float32),
            TOP: rng.integers(0, 256, (rows, 3, 20, 40), dtype=np.uint8),
            WRIST: rng.integers(0, 256, (rows, 30, 24, 3), dtype=np.uint8),  # channels last
            "task": [TASKS[row % 2] for row in range(rows)],
        }
        for _ in range(steps)
    ]


def actions(policy: ActionExpertPolicy, steps: int = 2 * STRIDE + 1) -> np.ndarray:
    policy.reset()
    return np.stack([policy.select_action(observation) for observation in observations(steps)])


def moved(module: ActionExpertModule) -> ActionExpertModule:
    """The module after some training: every trained parameter has changed."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.mark.quick("False-added", "True-lora")
@pytest.mark.parametrize("train", ["added", "lora", "expert", "all"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_the_policy_of_a_checkpoint_acts_as_its_module(
    pretrained: bool, train: str, tmp_path: Path
) -> None:
    source: dict[str, Any] = {"config": CONFIG}
    if pretrained:
        save_official(tmp_path)
        source = {"pretrained": str(tmp_path)}
    module = moved(
        make_pi0(
            **source, train=train, adarms=True, shake=False, module={"ttt_state": "carry_episode"}
        )
    )
    expected = actions(ActionExpertPolicy(module, seed=3))
    path = save(module, tmp_path / "a.ckpt")
    policy = ActionExpertPolicy.from_checkpoint(path, seed=3)
    np.testing.assert_array_equal(actions(policy), expected)
    stored = torch.load(path, weights_only=True)["state_dict"]
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    assert frozen
    assert (stored.keys() & frozen == set()) == pretrained
    assert {n for n, p in module.named_parameters() if p.requires_grad} <= stored.keys()


def test_pretrained_weights_may_move(tmp_path: Path) -> None:
    save_official(tmp_path / "old")
    module = moved(make_pi0(pretrained=str(tmp_path / "old"), shake=False))
    path = save(module, tmp_path / "a.ckpt")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ValueError, match="old' has no readable config.json"):
        ActionExpertPolicy.from_checkpoint(path)
    policy = ActionExpertPolicy.from_checkpoint(path, pretrained=str(tmp_path / "new"), seed=3)
    np.testing.assert_array_equal(actions(policy), actions(ActionExpertPolicy(module, seed=3)))
    scratch = save(make_pi0(), tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="the checkpoint has all of its weights"):
        ActionExpertPolicy.from_checkpoint(scratch, pretrained=str(tmp_path / "new"))


def test_a_checkpoint_refuses_other_pretrained_weights(tmp_path: Path) -> None:
    official = save_official(tmp_path)
    path = save(make_pi0(pretrained=str(tmp_path), shake=False), tmp_path / "a.ckpt")
    with torch.no_grad():
        official.model.vlm.multi_modal_projector.linear.weight.add_(0.1)
    official.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on other pretrained weights than those that"):
        ActionExpertPolicy.from_checkpoint(path)


def test_incomplete_weights_are_an_error_and_lerobots_names_are_known(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    official = save_official(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    path = tmp_path / "lerobot"
    path.mkdir()
    for file in (tmp_path / "hf").iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    renamed = {_lerobot_name(name): value for name, value in weights.items()}
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    module = make_pi0(pretrained=str(path), shake=False, with_ttt=False)
    loaded = module.model.pi0.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in official.state_dict().items()
               if "dit.embed_tokens" not in name)  # fmt: skip
    renamed.pop(_lerobot_name("action_out_proj.weight"))
    save_file(renamed, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the model's weights, e.g. action_out_proj"):
        make_pi0(pretrained=str(path))


def _lerobot_name(name: str) -> str:
    """How lerobot's own pi0 checkpoints call a weight."""
    for ours, theirs in (
        ("model.vlm.language_model.embed_tokens", "paligemma_with_expert.paligemma.lm_head"),
        ("model.dit.embed_tokens", "paligemma_with_expert.gemma_expert.lm_head"),
        ("model.vlm", "paligemma_with_expert.paligemma.model"),
        ("model.dit", "paligemma_with_expert.gemma_expert.model"),
        ("embed_action_time.", ""),
    ):
        if name.startswith(ours):
            return f"model.{theirs}{name.removeprefix(ours)}"
    return f"model.{name}"


def test_the_policy_sees_its_cameras_and_reads_its_instruction() -> None:
    module = make_pi0().eval()
    policy = ActionExpertPolicy(module, execute=1)
    [observation] = observations(1)

    def act(changed: dict[str, Any]) -> np.ndarray:
        policy.reset()
        return policy.select_action(changed)

    first = act(observation)
    assert np.array_equal(first, act(observation))
    for change in ({TOP: observation[TOP] // 2}, {"task": TASKS[0]}):
        assert not np.array_equal(first[1], act({**observation, **change})[1])
    without = {key: value for key, value in observation.items() if key != WRIST}
    assert not np.allclose(first, act(without))
    row = {key: value[0] for key, value in observation.items()}
    np.testing.assert_allclose(act(row), first[0], atol=1e-5)  # other noise would differ by 1
    with pytest.raises(ValueError, match=r"shape \(2, 3, 20, 40\): give \[3, H, W\]"):
        policy.reset()
        policy.select_action({**observation, "observation.state": np.zeros(5)})
    with pytest.raises(ValueError, match="no picture: give at least one of"):
        act({"observation.state": observation["observation.state"]})
    with pytest.raises(ValueError, match=r"top has shape \(2, 20, 40\): give \[N, 3, H, W\]"):
        act({**observation, TOP: observation[TOP][:, 0]})
    with pytest.raises(ValueError, match="task has 1 rows, observation.state has 2"):
        act({**observation, "task": [TASKS[0]]})


def make_data(root: Path, **options: Any) -> ActionChunkDataModule:
    write_camera_folder(root)
    return ActionChunkDataModule(
        str(root),
        **{"horizon": 6, "stride": 4, "batch_size": 2, "val_fraction": 0.3, "image_keys": [CAMERA],
           **options},
    )  # fmt: skip


def make_trained(**options: Any) -> ActionExpertModule:
    return ActionExpertModule(
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        backbone="pi0",
        pi0=PI0Options(config=CONFIG, **options),
        ttt=TTTAdapterConfig(layer=TTTConfig(num_heads=2)),
        ttt_layer_positions=[1],
        ttt_state="carry_episode",
        execution_horizon=4,
        denoise_steps=2,
    )


def fit(module: ActionExpertModule, data: Any, folder: Path, **options: Any) -> pl.Trainer:
    callbacks = [FileBoundaryReset(), *options.pop("callbacks", [])]
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        gradient_clip_val=1.0, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return trainer


def test_a_fit_on_pictures_with_carried_state_ema_and_bfloat16(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    module = make_trained(adarms=True, gradient_checkpointing=True)
    data = make_data(tmp_path / "set", tbptt=2)
    trainer = fit(
        module, data, tmp_path, max_steps=4, max_epochs=-1, precision="bf16-mixed",
        val_check_interval=2, check_val_every_n_epoch=None, callbacks=[EMA(0.5)],
    )  # fmt: skip
    assert trainer.global_step == 4 and torch.isfinite(trainer.callback_metrics["train/loss"])
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    policy = ActionExpertPolicy.from_checkpoint(path)
    rebuilt = policy.module.state_dict()
    assert all(torch.equal(rebuilt[name], value) for name, value in module.state_dict().items())
    policy.reset()
    chunk = next(iter(data.val_dataloader()))[0]
    seen = {"observation.state": chunk["observation.state"], CAMERA: chunk[CAMERA]}
    action = policy.select_action({**seen, "task": "Reach the red block."})
    assert action.shape == (2, 2) and torch.isfinite(action).all()
    prediction = trainer.predict(module, data.val_dataloader())
    assert prediction[0]["action"].shape[1:] == (6, 2)


def test_resuming_a_pretrained_model_refills_what_its_checkpoint_left_out(tmp_path: Path) -> None:
    save_official(tmp_path / "base")

    def make() -> ActionExpertModule:
        module = make_trained()
        module.backbone_options = PI0Options(pretrained=str(tmp_path / "base"))
        return module

    def run(folder: str, steps: int, module: ActionExpertModule, **options: Any) -> pl.Trainer:
        pl.seed_everything(0, verbose=False)
        data = ActionChunkDataModule(
            str(tmp_path / "set"), horizon=6, stride=4, mode="shuffled", batch_size=2,
            val_fraction=0.0, image_keys=(CAMERA,),
        )  # fmt: skip
        callbacks = [FileBoundaryReset(), EMA(0.5)]
        trainer = pl.Trainer(
            default_root_dir=tmp_path / folder, accelerator="cpu", callbacks=callbacks,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False, max_steps=steps, max_epochs=-1,
        )  # fmt: skip
        trainer.fit(module, data, **options)
        return trainer

    write_camera_folder(tmp_path / "set")
    first = make()
    first.ttt_state, first.streams.persistent = "reset", False
    trainer = run("a", 2, first)
    path = tmp_path / "two.ckpt"
    trainer.save_checkpoint(path)
    second = make()
    second.ttt_state, second.streams.persistent = "reset", False
    resumed = run("b", 3, second, ckpt_path=str(path))
    assert resumed.global_step == 3
    frozen = [n for n, p in second.named_parameters() if not p.requires_grad]
    assert frozen and all(
        torch.equal(second.state_dict()[name], first.state_dict()[name]) for name in frozen
    )


def test_wrong_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    module, data = make_trained(), make_data(tmp_path / "set", horizon=5)
    with pytest.raises(ValueError, match="chunks of 6 actions .* horizon is 5"):
        fit(module, data, tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run").exists()
