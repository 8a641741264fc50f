"""Every yaml is run: shortened by its overlay, from the command line, to checkpoint and events."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.policy import ActionExpertPolicy

CONFIGS = Path(__file__).parents[1] / "configs"
LANGUAGE = ("lact", "memory", "ttt_lora", "lora", "in_place", "compare")
ELSEWHERE = (*LANGUAGE, "pi0", "action_expert_lerobot")
EXPERIMENTS = sorted(CONFIGS.glob("*.yaml"))
SIMULATED = [p for p in EXPERIMENTS if not p.stem.startswith(ELSEWHERE)]
"""The others have test files of their own; a recording of the reader's, test_walkthroughs.py."""
OVERLAYS = sorted(CONFIGS.glob("*/*.yaml"))
TINY = CONFIGS / "tiny" / "action_expert.yaml"

TAGS = {
    "train/loss",
    "val/loss",
    "streams/resets",
    "closed_loop/success",
    "closed_loop/success_low",
    "closed_loop/success_high",
    "throughput/samples_per_sec",
}


def layer_tags(layer: int, gated: bool) -> set[str]:
    """What the monitors write of a layer with TTT."""
    name = f"layer_{layer:02d}"
    gate = {f"gate/ttt/mean/{name}"} if gated else set()
    return gate | {
        f"gate/attn/mean/{name}",
        f"gate/ratio_ttt/mean/{name}",
        f"fast_weight/inner_loss_before/{name}",
        f"fast_weight/inner_loss_after/{name}",
        f"fast_weight/relative_change/{name}",
    }


def ttt_layers(config: dict) -> list[int]:
    options = config["model"]["init_args"]
    if options["ttt"] is None:
        return []
    positions = options["ttt_layer_positions"]
    return list(range(options["expert"]["num_layers"])) if positions == "all" else positions


def slow_unless_quickstart(path: Path) -> object:
    marks = () if path.stem == "quickstart" else pytest.mark.slow
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [slow_unless_quickstart(path) for path in SIMULATED])
def test_config_fits_saves_and_logs_what_its_monitors_promise(
    path: Path, run_cli, tmp_path
) -> None:
    result = run_cli("fit", "--config", str(path), "--config", str(TINY))
    assert result.code == 0, result.err
    config = yaml.safe_load(path.read_text())
    run = tmp_path / "runs" / config["trainer"]["logger"]["init_args"]["name"] / "version_0"
    events = EventAccumulator(str(run)).Reload()
    written = set(events.Tags()["scalars"])
    ttt = config["model"]["init_args"]["ttt"]
    gated = ttt is not None and ttt["ttt_gate"] != "none"
    expected = TAGS.union(*(layer_tags(layer, gated) for layer in ttt_layers(config)))
    assert expected <= written, f"missing: {sorted(expected - written)}"
    assert all(math.isfinite(e.value) for tag in written for e in events.Scalars(tag))
    assert {"closed_loop/paths", "closed_loop/episodes"} <= set(events.Tags()["images"])
    assert "closed-loop success:" in result.out + result.err
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert (run / "config.yaml").exists()


@pytest.mark.slow
def test_a_run_is_validated_tested_and_resumed_from_its_checkpoint(run_cli, tmp_path) -> None:
    options = ["--config", str(CONFIGS / "action_expert_maze_memory.yaml"), "--config", str(TINY)]
    assert run_cli("fit", *options).code == 0
    run = tmp_path / "runs" / "action_expert_maze_memory" / "version_0"
    saved = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    for command in ("validate", "test"):
        assert run_cli(command, *options, *saved).code == 0
    resumed = run_cli("fit", *options, *saved, "--trainer.max_steps", "8")
    assert resumed.code == 0, resumed.err
    again = tmp_path / "runs" / "action_expert_maze_memory"
    steps = [
        torch.load(path, weights_only=True)["global_step"]
        for path in again.glob("*/checkpoints/last.ckpt")
    ]
    assert sorted(steps) == [6, 8]


@pytest.mark.quick("quickstart", "*_small", "*_tiny", "action_expert_maze_memory")
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_config_is_complete_and_its_keys_are_known(path: Path, run_cli) -> None:
    result = run_cli("fit", "--config", str(path), "--print_config")
    assert result.code == 0, result.err
    assert "seed_everything: 0" in result.out


ADAPTERS = CONFIGS / "adapters"
ADAPTER_TAGS = {
    "mixed": {"gate/ttt/mean/layer_01"},
    "routed": {f"fast_weight/relative_change/layer_{n:02d}" for n in range(4)}
    | {"train/router_balance", "train/router_z"},
    "switch": {f"gate/ttt/mean/layer_{n:02d}" for n in range(4)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTER_TAGS)
def test_adapter_overlay_fits_tests_and_acts_from_its_checkpoint(
    name: str, run_cli, tmp_path
) -> None:
    files = [CONFIGS / "quickstart.yaml", TINY, ADAPTERS / f"{name}.yaml"]
    options = [part for path in files for part in ("--config", str(path))]
    result = run_cli("fit", *options)
    assert result.code == 0, result.err
    run = tmp_path / "runs" / "quickstart" / "version_0"
    events = EventAccumulator(str(run)).Reload()
    written = set(events.Tags()["scalars"])
    assert TAGS | ADAPTER_TAGS[name] <= written, sorted((TAGS | ADAPTER_TAGS[name]) - written)
    assert ("gate/ttt/mean/layer_00" in written) == (name != "mixed")
    checkpoint = run / "checkpoints" / "last.ckpt"
    groups = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["name"].split("/")[0] for group in groups} == {"base", "adapter", "gate", "fast"}
    assert run_cli("test", *options, "--ckpt_path", str(checkpoint)).code == 0
    policy = ActionExpertPolicy.from_checkpoint(checkpoint)
    plan = yaml.safe_load((ADAPTERS / f"{name}.yaml").read_text())["model"]["init_args"]["adapters"]
    assert [spec.adapter_type for spec in policy.module.adapters] == [
        line["adapter_type"] for line in plan
    ]
    policy.reset()
    action = policy.select_action(torch.zeros(policy.module.features["state_dim"]))
    assert torch.isfinite(action).all()


def test_every_overlay_is_used_by_a_test() -> None:
    tiny = [CONFIGS / "tiny" / f"{name}.yaml" for name in ("text", "memory")]
    elsewhere = [*(CONFIGS / "pi0").glob("*.yaml"), *tiny]
    assert set(OVERLAYS) == {TINY, *elsewhere, *(ADAPTERS / f"{n}.yaml" for n in ADAPTER_TAGS)}


def test_control_of_fetch_pick_place_has_as_many_parameters_and_steps() -> None:
    from lightning_modules.action_expert import ActionExpertModule
    from lightning_modules.adapters import TTTAdapterConfig
    from lightning_modules.layers.ttt import TTTConfig
    from lightning_modules.models.action_expert import ExpertConfig

    features = {"state_dim": 28, "action_dim": 4, "horizon": 16, "stride": None}
    sizes, steps = [], []
    for name in ("action_expert_fetch_pick_place", "action_expert_fetch_pick_place_control"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        options = config["model"]["init_args"]
        ttt = options["ttt"]
        module = ActionExpertModule(
            torch.optim.AdamW,
            expert=ExpertConfig(**options["expert"]),
            ttt=ttt and TTTAdapterConfig(**{**ttt, "layer": TTTConfig(**ttt["layer"])}),
        )
        module.build({**features, "image_keys": [], "delta_actions": []})
        sizes.append(sum(parameter.numel() for parameter in module.parameters()))
        steps.append(config["trainer"]["max_steps"])
    assert sizes[0] == 1_521_556
    assert abs(sizes[1] - sizes[0]) <= 0.002 * sizes[0]
    assert steps[0] == steps[1]
