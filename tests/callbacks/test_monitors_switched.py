"""Monitors of a fit in which adapters are switched: every layer's numbers while it published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_cases import member
from expert_cases import FEATURES, make_chunk, make_module
from toy_streams import ToyModule, fit, read_tensorboard, scalar, toy_batches

from callbacks import FastWeightMonitor, GateMonitor
from callbacks.monitor import NonFiniteError
from lightning_modules.adapters import AdapterSpec, set_active
from lightning_modules.base import AdapterModule

CHUNKS = 2
LAYERS = [f"layers.{index}.self_attn" for index in range(3)]
PUBLISHING = [LAYERS[:2], LAYERS[:2], LAYERS[1:], LAYERS[1:], LAYERS[1:], [], [], LAYERS[:1]]
"""By step; the windows end where the layers change, and at steps 4 and 8."""


class Switched(ToyModule):
    """Publishes from the layers of `PUBLISHING`."""

    def _publish(self, slot: str, *values: Any) -> None:
        if slot in PUBLISHING[len(self.history) // CHUNKS]:
            super()._publish(slot, *values)


def mean(module: ToyModule, slot: str, steps: range, topic: str, name: str) -> float:
    chunks = module.history[steps.start * CHUNKS : steps.stop * CHUNKS]
    values = [chunk["published"][topic][slot][name].double().numpy() for chunk in chunks]
    return float(np.mean(values))


def test_scalars_of_every_layer_are_those_of_the_steps_in_which_it_published(
    tmp_path: Path,
) -> None:
    module = Switched()
    monitors = [cls(4, observe_every_n_steps=1) for cls in (GateMonitor, FastWeightMonitor)]
    fit(module, toy_batches(8), tmp_path, monitors)
    events = read_tensorboard(tmp_path)
    # layer -> step at which it was written -> steps (from 0) of the window
    expected = {
        0: {2: range(2), 8: range(7, 8)},
        1: {2: range(2), 4: range(2, 4), 7: range(4, 5)},
        2: {4: range(2, 4), 7: range(4, 5)},
    }
    for layer, windows in expected.items():
        for tag, topic, name in (
            ("gate/ttt/mean", "gate", "gate_ttt"),
            ("fast_weight/state_norm", "fast_weight", "state_norm"),
        ):
            written = scalar(events, f"{tag}/layer_{layer:02d}")
            assert set(written) == set(windows), tag
            for step, steps in windows.items():
                wanted = mean(module, LAYERS[layer], steps, topic, name)
                assert written[step] == pytest.approx(wanted, rel=1e-5), (tag, layer, step)
    figures = {e.step for e in events.Images("gate/ttt/by_time")}
    assert figures == {2, 7, 8}, "one per set of layers"


def test_a_state_that_was_nan_before_the_switch_still_stops_the_run(tmp_path: Path) -> None:
    module = Switched()
    module.poison = (3, LAYERS[0], 1)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn \(layer_00\), row 1"):
        fit(module, toy_batches(8), tmp_path, [FastWeightMonitor(100, observe_every_n_steps=1)])


TTT = member("ttt", layer={"num_heads": 2})
SWITCH = member("switch", active="a", members={"a": TTT, "b": TTT, "low": member("lora")})


def test_an_action_expert_is_switched_in_the_middle_of_a_fit(tmp_path: Path) -> None:
    plan = [AdapterSpec(0, **SWITCH), AdapterSpec(1, **TTT)]
    module = make_module(with_ttt=False, adapters=plan)
    module.check(FEATURES)
    names = ["a", "a", "b", "low", None, "a"]
    step = AdapterModule.training_step

    def training_step(batch: list[dict], batch_idx: int) -> Any:
        set_active(module, names[batch_idx])
        return step(module, batch, batch_idx)

    module.training_step = training_step  # type: ignore[method-assign]
    batches = [[make_chunk(0)] for _ in names]
    fit(module, batches, tmp_path, [GateMonitor(3, 1), FastWeightMonitor(3, 1)], max_steps=6)
    events = read_tensorboard(tmp_path)
    for tag in ("gate/ratio_ttt/mean", "fast_weight/relative_change"):
        written = {layer: set(scalar(events, f"{tag}/layer_{layer:02d}")) for layer in (0, 1)}
        assert written == {0: {2, 3, 6}, 1: {2, 3, 5, 6}}, tag
