"""Lines of libraries that help nobody who runs something, and one that must stop a run."""

from __future__ import annotations

import logging
import warnings


def leave_out_noise() -> None:
    """Keep two kinds of lines out of a run's output; everything else is printed as before.

    Lightning flattens checkpoints by a class that torch 2.13 deprecates, and has no option to do
    otherwise. It also recommends packages of a service ("💡 Tip: ..."), without a switch.
    """
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.*deprecated", module=r"lightning\.pytorch\.utilities\._pytree"
    )
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if _is_no_tip not in logger.filters:
        logger.addFilter(_is_no_tip)


def leave_out_moved_checkpoints() -> None:
    """Lightning warns an evaluation that it tracks no best checkpoint, which only a fit does."""
    warnings.filterwarnings("ignore", message="The dirpath has changed from")


def refuse_untrained_weights() -> None:
    """Where `--ckpt_path last` finds none, Lightning warns and evaluates what was never trained."""
    warnings.filterwarnings("error", message=".*but there is no last checkpoint available")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip:")
