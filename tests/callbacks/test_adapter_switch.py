"""AdapterByStage: which adapter is active in which loop of a real trainer."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from adapter_cases import LORA, member, plan, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks import AdapterByStage
from lightning_modules.adapters import SwitchAdapter, inject_adapters, set_active

SWITCH = member("switch", members={"a": LORA, "b": LORA}, active="a")


class Module(pl.LightningModule):
    """Notes which adapter is active at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        inject_adapters(self.model, plan(SWITCH))
        self.seen: list[tuple[str, str | None]] = []
        self.fail: str | None = None

    @property
    def active(self) -> str | None:
        (name,) = {m.active for m in self.modules() if isinstance(m, SwitchAdapter)}
        return name

    def _step(self, stage: str) -> Tensor:
        self.seen.append((stage, self.active))
        if self.fail == stage:
            raise RuntimeError(f"in {stage}")
        return self.model(torch.ones(1, 3, dtype=torch.int64)).logits.square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step("validate")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("predict")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def _loader() -> DataLoader:
    return DataLoader(range(2))


def _trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


def test_every_loop_has_its_adapter_and_what_was_active_comes_back(tmp_path: Path) -> None:
    module = Module()
    callback = AdapterByStage(train="b", validate=None, test="b", predict=None)
    trainer = _trainer(tmp_path, callback, val_check_interval=1)
    trainer.fit(module, _loader(), _loader())
    checks = [("validate", None)] * 2
    assert module.seen == [*checks, ("train", "b"), *checks, ("train", "b"), *checks]
    assert module.active == "a"
    for loop, expected in (("validate", None), ("test", "b"), ("predict", None)):
        module.seen.clear()
        getattr(trainer, loop)(module, _loader())
        assert module.seen == [(loop, expected)] * 2
        assert module.active == "a"


def test_loops_without_a_name_keep_what_is_active(tmp_path: Path) -> None:
    module = Module()
    _trainer(tmp_path, AdapterByStage(validate="b")).fit(module, _loader(), _loader())
    assert set(module.seen) == {("train", "a"), ("validate", "b")}
    set_active(module, None)
    _trainer(tmp_path, AdapterByStage(test="b")).validate(module, _loader(), verbose=False)
    assert module.seen[-1] == ("validate", None)


def test_only_the_adapter_of_training_is_trained(tmp_path: Path) -> None:
    module = Module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    _trainer(tmp_path, AdapterByStage(train="b", validate="a")).fit(module, _loader(), _loader())
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert any(".members.b." in name for name in changed)
    assert not any(".members.a." in name for name in changed)


@pytest.mark.parametrize("stage", ["train", "validate"])
def test_an_exception_restores_what_was_active(stage: str, tmp_path: Path) -> None:
    module = Module()
    module.fail = stage
    trainer = _trainer(tmp_path, AdapterByStage(train="b", validate=None), num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match=f"in {stage}"):
        trainer.fit(module, _loader(), _loader())
    assert module.seen[-1] == (stage, {"train": "b", "validate": None}[stage])
    assert module.active == "a"
    module.fail = None
    trainer = _trainer(tmp_path, *trainer.callbacks)
    trainer.validate(module, _loader(), verbose=False)
    assert module.seen[-1] == ("validate", None) and module.active == "a"


def test_an_unknown_name_stops_the_run_and_lists_the_known_ones(tmp_path: Path) -> None:
    module = Module()
    with pytest.raises(ValueError, match="has no adapter 'c'; there are a, b, and None"):
        _trainer(tmp_path, AdapterByStage(validate="c")).fit(module, _loader(), _loader())
    assert module.active == "a"
