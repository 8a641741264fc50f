"""Who reads a chapter: all (block, choice) pairs sorted by chapter, in groups for Triton programs.

A group is up to `width` pairs of one chapter. One program keeps the chapter's rows and walks
through a group, so groups bound how long a program works, however popular a chapter is. All shapes
follow from the arguments' shapes, and nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 128
"""Slots of a group at least: less does not pay for loading the rows of a chapter."""

PROGRAMS = 4096
"""Programs that fill any GPU several times, so that the last ones do not wait for one."""


class Groups(NamedTuple):
    """N groups of pairs; pair p is choice `p % k` of block `p // k`. All int32.

    Attributes:
        order: pairs sorted by chapter, `[pairs]`.
        chapter: what a group reads, `[N]`.
        first: place in `order` of its first pair, `[N]`.
        size: its pairs, 0 for groups that are not needed, `[N]`.
        start: first group of each chapter, and the end of the last, `[C + 1]`.
    """

    order: Tensor
    chapter: Tensor
    first: Tensor
    size: Tensor
    start: Tensor


def sorted_groups(chapters: Tensor, num_chapters: int, width: int) -> Groups:
    """Groups of at most `width` pairs.

    A chapter that n pairs read has `ceil(n / width)` groups, together at most
    `pairs // width + C`; so many there are, and those not needed are empty.

    Args:
        chapters: of each pair, int64 `[pairs]`.
        num_chapters: C.
        width: pairs in a group.
    """
    pairs, device = chapters.numel(), chapters.device
    # radix sort: a pass for each byte of the keys
    keys = chapters.to(torch.int16) if num_chapters < 2**15 else chapters
    ordered, order = keys.sort(stable=True)
    sizes = torch.arange(num_chapters + 1, device=device, dtype=keys.dtype)
    bounds = torch.searchsorted(ordered, sizes)
    groups = (bounds.diff() + width - 1) // width
    start = torch.nn.functional.pad(groups.cumsum(0), (1, 0))

    group = torch.arange(pairs // width + min(num_chapters, pairs), device=device)
    chapter = torch.searchsorted(start[1:], group, right=True).clamp(max=num_chapters - 1)
    first = bounds[chapter] + (group - start[chapter]) * width
    count = (bounds[chapter + 1] - first).clamp(min=0, max=width)
    return Groups(*(x.to(torch.int32) for x in (order, chapter, first, count, start)))


def group_width(slots: int, num_chapters: int, heads: int) -> int:
    """Slots of a group, a power of two: twice what a chapter has on average, or less if there are
    few chapters.

    Every group leaves a sum of gradients of its rows: there are no more than one and a half times
    as many as there are chapters, or as fill a GPU.

    Args:
        slots: tokens of all pairs.
        num_chapters: C.
        heads: programs of a group.
    """
    most = max(SMALLEST, min(2 * slots // num_chapters, slots * heads // PROGRAMS))
    return 1 << (most.bit_length() - 1)
