"""Rules about gates: is what the memory adds let through, and can the gate still learn?"""

from __future__ import annotations

from collections.abc import Iterator

from callbacks.diagnose.finding import Finding, rule
from callbacks.diagnose.run import Curve, Run

SHUT = 0.01
"""A gate of which no entry was ever larger lets through less than 1 % of the branch: the model is
its base. A gate that starts at 0 is beyond that after ten steps of Adam with a rate of 1e-3."""

SATURATED = 0.5
"""Share of entries with |gate| > 0.99. There the slope of tanh is below 0.02, so that more than
half of the gate has stopped to learn."""

NO_MEMORY = ("attn", "alpha")
"""Gates that are not a memory's: attention's own, and the parameter behind a static gate."""

KNOB = "(model.init_args.ttt.alpha_init, or alpha_init of the line in model.init_args.adapters)"


@rule
def never_opened(run: Run) -> Iterator[Finding]:
    """No layer's gate was ever open."""
    for gate, layers in _by_gate(run, "max").items():
        lowest = _by_gate(run, "min").get(gate, {})
        largest = max(
            float(abs(curve.values).max()) for curve in (*layers.values(), *lowest.values())
        )
        if largest <= SHUT:
            yield Finding(
                "gate shut",
                f"The gate '{gate}' never opened: the memory adds nothing in any layer.",
                f"largest |gate/{gate}| of {len(layers)} layers up to step "
                f"{run.last_step} is {largest:.2g} (threshold {SHUT})",
                "model.init_args.groups.gate: frozen false, and a larger lr_scale; or start it "
                f"further open {KNOB}",
            )


@rule
def saturated(run: Run) -> Iterator[Finding]:
    """Most of a gate is at its limit."""
    for gate, layers in _by_gate(run, "saturation").items():
        full = {layer: curve.late() for layer, curve in layers.items() if curve.late() > SATURATED}
        if full:
            worst = max(full, key=lambda layer: full[layer])
            yield Finding(
                "gate saturated",
                f"The gate '{gate}' is at its limit in {len(full)} of {len(layers)} layers and "
                "hardly learns any more.",
                f"gate/{gate}/saturation/{worst} is {full[worst]:.2f} at step "
                f"{int(layers[worst].steps[-1])} (threshold {SATURATED})",
                f"a smaller model.init_args.groups.gate.lr_scale, or a smaller start {KNOB}",
            )


def _by_gate(run: Run, quantity: str) -> dict[str, dict[str, Curve]]:
    """Gate -> layer -> curve, of the gates of memories."""
    gates: dict[str, dict[str, Curve]] = {}
    for (gate, layer), curve in run.curves(rf"gate/([^/]+)/{quantity}/(.+)").items():
        if gate not in NO_MEMORY and not gate.startswith("ratio_"):
            gates.setdefault(gate, {})[layer] = curve
    return gates
