"""Training that is stopped and resumed over pretrained weights that its checkpoints leave out."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from camera_folder import CAMERA, write_camera_folder
from lightning.pytorch.callbacks import ModelCheckpoint
from pi0_cases import save_official

from callbacks import EMA, FileBoundaryReset, StreamStateCheckpoint
from datamodules.action_chunks import ActionChunkDataModule
from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.base import Schedule
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.policy import ActionExpertPolicy


class Modes(pl.Callback):
    """Whether the vision-language model and the expert are in training mode, step by step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        vlm = any(part.training for part in module.model.pi0.model.vlm.modules())
        self.seen.append((vlm, module.model.decoder.training))


def run(
    root: Path, name: str, steps: int, train: str, ckpt: Path | None = None
) -> tuple[ActionExpertModule, Modes, EMA, Path]:
    """Train with EMA on a state carried over two chunks, a checkpoint after every step."""
    pl.seed_everything(0, verbose=False)
    module = ActionExpertModule(
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        backbone="pi0",
        pi0=PI0Options(pretrained=str(root / "base"), train=train, adarms=True),
        ttt=TTTAdapterConfig(layer=TTTConfig(num_heads=2)),
        ttt_state="carry_episode",
        execution_horizon=4,
        denoise_steps=2,
        schedule=Schedule(decay="constant"),  # the runs have different ends
    )
    data = ActionChunkDataModule(
        str(root / "set"), horizon=6, stride=4, tbptt=2, batch_size=2, val_fraction=0.3,
        image_keys=[CAMERA],
    )  # fmt: skip
    modes, ema = Modes(), EMA(0.5)
    saved = ModelCheckpoint(
        root / name, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    trainer = pl.Trainer(
        default_root_dir=root / name, accelerator="cpu", devices=1, logger=False, max_steps=steps,
        callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), modes, ema, saved],
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        max_epochs=-1, val_check_interval=1, check_val_every_n_epoch=None, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=False)
    return module, modes, ema, root / name


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "expert"])
def test_resuming_equals_never_having_stopped_and_averages_act(tmp_path: Path, train: str) -> None:
    base = save_official(tmp_path / "base").state_dict()
    write_camera_folder(tmp_path / "set")
    whole, modes, ema, _ = run(tmp_path, "whole", 4, train)
    assert modes.seen == [(False, True)] * 4, "also after validation"
    _, _, _, folder = run(tmp_path, "first", 3, train)
    resumed, _, other, _ = run(tmp_path, "second", 4, train, folder / "step=2.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert all(
        torch.equal(other._averages.values[name], value)
        for name, value in ema._averages.values.items()
    )
    stored = torch.load(folder / "step=2.ckpt", weights_only=True)
    trained = {n for n, p in whole.named_parameters() if p.requires_grad}
    assert {n for n, _ in whole.named_parameters() if n in stored["state_dict"]} == trained
    averages, current = stored["averaging_state"]["values"], stored["current_model_state"]
    assert any(not torch.equal(averages[name], current[name]) for name in trained)
    policy = ActionExpertPolicy.from_checkpoint(folder / "step=2.ckpt").module.state_dict()
    assert all(torch.equal(policy[name], averages[name]) for name in trained)
    frozen = "model.vlm.multi_modal_projector.linear.weight"
    assert torch.equal(policy[f"model.pi0.{frozen}"], base[frozen])


@pytest.mark.slow
def test_a_checkpoint_of_another_plan_or_base_is_refused_on_resuming(tmp_path: Path) -> None:
    base = save_official(tmp_path / "base")
    write_camera_folder(tmp_path / "set")
    *_, folder = run(tmp_path, "first", 2, "lora")
    with pytest.raises(ValueError, match="with another pi0.train: use the same as in training"):
        run(tmp_path, "second", 3, "expert", folder / "step=1.ckpt")
    with torch.no_grad():
        base.model.vlm.multi_modal_projector.linear.weight.add_(0.1)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="trained on other pretrained weights"):
        run(tmp_path, "third", 3, "lora", folder / "step=1.ckpt")
