"""The yaml files of pi0: the tiny one and its overlays are run, the large one is built on meta."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from camera_folder import write_camera_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.models.pi0_options import PI0Options
from lightning_modules.policy import ActionExpertPolicy

CONFIGS = Path(__file__).parents[1] / "configs"
LARGE, TINY = CONFIGS / "pi0_ttt.yaml", CONFIGS / "pi0_ttt_tiny.yaml"
OVERLAYS = [*sorted((CONFIGS / "pi0").glob("*.yaml")), CONFIGS / "adapters" / "mixed.yaml"]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=lambda p: p.stem if p else "alone")
def test_the_tiny_pi0_fits_saves_and_logs(overlay: Path | None, run_cli, tmp_path: Path) -> None:
    config = read(TINY)
    write_camera_folder(tmp_path / config["data"]["init_args"]["root"], frames=20)
    overlays = [] if overlay is None else ["--config", str(overlay)]
    result = run_cli("fit", "--config", str(TINY), *overlays)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "pi0_ttt_tiny" / "version_0"
    events = EventAccumulator(str(run)).Reload()
    written = set(events.Tags()["scalars"])
    assert {
        "train/loss",
        "val/loss",
        "gate/ttt/mean/layer_01",
        "gate/ratio_ttt/mean/layer_01",
        "fast_weight/relative_change/layer_01",
    } <= written
    assert ("gate/attn/mean/layer_01" in written) == (overlay == CONFIGS / "pi0/carry_episode.yaml")
    assert all(math.isfinite(e.value) for tag in written for e in events.Scalars(tag))
    policy = ActionExpertPolicy.from_checkpoint(run / "checkpoints" / "last.ckpt")
    policy.reset()
    observation = {
        "observation.state": torch.zeros(3),
        "observation.images.top": torch.zeros(3, 32, 40, dtype=torch.uint8),
        "task": "Reach the red block.",
    }
    assert policy.select_action(observation).shape == (2,)


def test_wrong_data_ends_in_one_line_and_writes_nothing(run_cli, tmp_path: Path) -> None:
    root = tmp_path / read(TINY)["data"]["init_args"]["root"]
    write_camera_folder(root)
    for options, message in (
        (["--data.horizon", "7"], "chunks of 8 actions (chunk_size), but the data's horizon is 7"),
        (["--data.image_keys", "[]"], "the data has none: set image_keys of the DataModule"),
        (["--model.pi0.pretrained", "no/folder", "--model.pi0.config", "null"], "no/folder"),
    ):
        result = run_cli("fit", "--config", str(TINY), *options)
        assert result.code == 1 and message in result.last_line, result.err
        assert not (tmp_path / "runs").exists()


def build_on_meta(config: dict[str, Any]) -> ActionExpertModule:
    """The model of a yaml, without weights: the architecture of the hub's model is the default."""
    options, data = config["model"]["init_args"], config["data"]["init_args"]
    pi0 = {**options["pi0"], "pretrained": None, "processor": None, "config": {}}
    ttt = {**options["ttt"], "layer": TTTConfig(**options["ttt"]["layer"])}
    with torch.device("meta"):
        module = ActionExpertModule(
            torch.optim.AdamW,
            backbone=options["backbone"],
            pi0=PI0Options(**pi0),
            ttt=TTTAdapterConfig(**ttt),
            ttt_layer_positions=options["ttt_layer_positions"],
            execution_horizon=options["execution_horizon"],
        )
        module.build(
            {"state_dim": 14, "action_dim": 14, "tasks": {0: "Fold."}, "delta_actions": []}
            | {key: data[key] for key in ("horizon", "stride", "image_keys")}
        )
    return module


def test_the_large_pi0_has_the_published_sizes() -> None:
    module = build_on_meta(read(LARGE))
    parameters = dict(module.named_parameters())
    ttt = [p.numel() for name, p in parameters.items() if ".layers.9.self_attn.ttt" in name]
    assert sum(ttt) == 4_339_720
    expert = [p.numel() for n, p in parameters.items() if ".dit." in n and ".ttt" not in n]
    assert sum(expert) == 311_464_960
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert not [name for name in trained if ".vlm." in name]
    vlm = [p for name, p in parameters.items() if ".vlm." in name]
    assert {p.dtype for p in vlm} == {torch.bfloat16}
    assert {parameters[name].dtype for name in trained} == {torch.float32}
