"""Rules about fast weights: does the inner update help, and does the state stay bounded?"""

from __future__ import annotations

from collections.abc import Iterator

from callbacks.diagnose.finding import Finding, rule
from callbacks.diagnose.run import Run

LEAST_GAIN = 1e-4
"""Part of the inner loss that a call's updates remove, at least. Fresh TTT layers remove a few
1e-4 of it, trained ones from a hundredth to more than half."""

EXPLODED = 1000.0
"""|dW| / |W|. A fresh TTT layer has weights of 0.02 and comes to some hundreds within a file; a
thousand times the learned weights, these no longer matter."""

GROWN = 30.0
"""Factor by which the state grew in the run; from there on it follows no longer the data, which
has stayed the same."""

RATES = {
    "ActionExpertModule": "model.init_args.ttt.layer.base_lr",
    "LaCTModule": "model.init_args.config.base_lr (of adapters: update.base_lr)",
    "TTTLoRAModule": "model.init_args.ttt_lora.learner.lr_gate_init (In-Place: in_place.layer)",
}
"""Where the inner learning rate is set, by the model's class."""


@rule
def update_does_not_help(run: Run) -> Iterator[Finding]:
    """The inner loss is not lower after the update than before, in half of the layers."""
    before = run.curves(r"fast_weight/inner_loss_before/(.+)")
    after = run.curves(r"fast_weight/inner_loss_after/(.+)")
    gains = {
        layer: (before[layer].late() - after[layer].late()) / max(abs(before[layer].late()), 1e-12)
        for layer in before.keys() & after.keys()
    }
    useless = [layer for layer, gain in gains.items() if gain < LEAST_GAIN]
    if not useless or 2 * len(useless) < len(gains):
        return
    worst = min(useless, key=lambda layer: gains[layer])
    raises = gains[worst] < -LEAST_GAIN
    if not raises and any(state_explodes(run)):
        return  # beside a huge state no step counts: a larger one would be the wrong advice
    yield Finding(
        "inner loss",
        f"The update {'raises' if raises else 'does not change'} the inner loss in {len(useless)} "
        f"of {len(gains)} layers: the memory does not learn what it reads.",
        f"in {worst[0]} it is {before[worst].late():.4g} before and {after[worst].late():.4g} "
        f"after the update, in the last flushes up to step {int(after[worst].steps[-1])}",
        f"the inner learning rate, {'smaller' if raises else 'larger'}: {_rate(run)}",
    )


@rule
def state_explodes(run: Run) -> Iterator[Finding]:
    """The state is far larger than the learned weights, or than it was when the run began."""
    for (layer,), curve in run.curves(r"fast_weight/relative_change_max/(.+)").items():
        first, last = float(curve.values[0]), curve.late()
        if last > EXPLODED or (last > 1 and last > GROWN * first):
            yield Finding(
                "state explodes",
                f"What is learned from a file outgrows the learned weights ({layer}).",
                f"largest |dW| / |W| is {first:.3g} at step {int(curve.steps[0])} and {last:.3g} "
                f"in the last flushes up to step {int(curve.steps[-1])} (thresholds: "
                f"{EXPLODED:g}, or {GROWN:g} times the first)",
                f"a smaller inner learning rate: {_rate(run)}; or shorter files",
            )
            return


def _rate(run: Run) -> str:
    return RATES.get(str(run.options.get("model"))) or ", ".join(RATES.values())
