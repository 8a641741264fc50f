"""Sizes of the tiles of Triton kernels."""


def padded(size: int) -> int:
    """The power of two that holds a size, at least what a product of tiles needs, 16."""
    return max(16, 1 << (size - 1).bit_length())
