"""A rule about the loss by position: does reading more of a file help?"""

from __future__ import annotations

from collections.abc import Iterator

from callbacks.diagnose.finding import Finding, rule
from callbacks.diagnose.run import Run

LEAST_GAIN = 0.01
"""Part of the loss that is saved beyond the reach of attention, at least. Less than 1 % is about
what the bins of one validation differ by chance; a memory that works saves several."""


@rule
def memory_unused(run: Run) -> Iterator[Finding]:
    """Tokens far behind what attention sees are predicted no better than those at its end."""
    reach = attention_reach(run)
    if reach is None or not run.curves(r"fast_weight/.+") or _is_forgetful(run):
        return
    curves = {
        int(start): curve for (start,), curve in run.curves(r"position_loss/from_(\d+)").items()
    }
    within = [start for start in curves if start < reach]
    beyond = [start for start in curves if start >= reach]
    if not within or not beyond or min(len(curve.steps) for curve in curves.values()) < 2:
        return
    near = curves[max(within)].last
    best = min(beyond, key=lambda start: curves[start].last)
    gain = (near - curves[best].last) / near
    if gain < LEAST_GAIN:
        yield Finding(
            "memory unused",
            "Reading more of a file does not help beyond the reach of attention.",
            f"validation loss is {near:.4g} from token {max(within)} on, within the reach of "
            f"{reach} tokens, and at best {curves[best].last:.4g} beyond (from token {best} on), "
            f"at step {int(curves[best].steps[-1])}: {gain:.1%} less (threshold {LEAST_GAIN:.0%})",
            "train longer; open the gate; a larger tbptt (data.init_args.tbptt), so that what is "
            "written is trained by what reads it. Files that get harder look the same: compare "
            "with --model.init_args.fast_state reset",
        )


def attention_reach(run: Run) -> int | None:
    """Tokens that attention sees: LaCT's window, which is carried, or the chunk; None: unknown."""
    reach = run.options.get("model.config.window_size", run.options.get("data.chunk_length"))
    return None if reach is None else int(reach)


def _is_forgetful(run: Run) -> bool:
    return run.options.get("model.fast_state") == "reset"
