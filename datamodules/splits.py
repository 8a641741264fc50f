"""Which items belong to validation: a hash of each one's key decides, whatever else there is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def unit_hash(key: str | bytes) -> float:
    """A number in [0, 1) that depends on the key alone."""
    content = key if isinstance(key, bytes) else key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def split_by_hash(
    hashes: Sequence[float] | np.ndarray, val_fraction: float, items: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the training and of the validation items, int64 and in order.

    An item belongs to validation if its hash falls below `val_fraction`, so items that are added
    later move no other one. The item with the smallest hash is always taken: a wanted validation
    set is never empty.

    Args:
        hashes: `unit_hash` of every item's key.
        val_fraction: share of the items; 0 takes none.
        items: what they are, for the messages.

    Raises:
        ValueError: the fraction is not in [0, 1), or no training item is left.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1")
    hashes = np.asarray(hashes, dtype=np.float64)
    threshold = max(val_fraction, hashes.min()) if val_fraction > 0 else -1.0
    validation = hashes <= threshold
    if validation.all():
        raise ValueError(
            f"val_fraction={val_fraction} leaves none of the {len(hashes)} {items} for training; "
            f"use more {items} or set val_fraction to 0"
        )
    return np.flatnonzero(~validation), np.flatnonzero(validation)
