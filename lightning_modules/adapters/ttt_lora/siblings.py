"""Which linear layers read the same input, and how large adapters of equal parameters are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_modules.layers.ttt_lora_size import match_lora_siblings

SIBLINGS = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))
"""Names of linear layers that a decoder calls with one and the same tensor."""

WRAPPED = ("linear", "base_layer")
"""Names of linear layers inside a module that passes its input on to them."""


def plain_path(path: str) -> str:
    """Path of a linear layer without wrappers around it: where its input comes in."""
    parts = path.split(".")
    while len(parts) > 1 and parts[-1] in WRAPPED:
        parts.pop()
    return ".".join(parts)


def families(paths: Iterable[str]) -> list[list[str]]:
    """The paths, those of siblings together, in order."""
    found: dict[tuple[str, int], list[str]] = {}
    for number, path in enumerate(paths):
        parent, _, name = plain_path(path).rpartition(".")
        kind = next((i for i, names in enumerate(SIBLINGS) if name in names), None)
        key = (path, -1 - number) if kind is None else (parent, kind)
        found.setdefault(key, []).append(path)
    return list(found.values())


def matched_sizes(
    rank: int, per: str, layers: Mapping[str, nn.Linear], **options: bool
) -> dict[str, int]:
    """Inner size of every layer with at most as many parameters as a LoRA.

    Args:
        rank: of the LoRA.
        per: `linear`, or `parent` for one size for siblings.
        layers: path -> linear layer.
        **options: of `parameter_count`.

    Raises:
        ValueError: a LoRA of this rank is too small for any; the message names the layer.
    """
    sizes: dict[str, int] = {}
    for family in families(layers) if per == "parent" else [[path] for path in layers]:
        shapes = [(layers[path].in_features, layers[path].out_features) for path in family]
        sizes |= dict.fromkeys(family, _matched(rank, shapes, family, options))
    return sizes


def _matched(
    rank: int,
    shapes: Sequence[tuple[int, int]],
    family: Sequence[str],
    options: Mapping[str, bool],
) -> int:
    try:
        return match_lora_siblings(rank, shapes, **options)
    except ValueError as error:
        raise ValueError(f"{', '.join(family)}: {error}") from error
