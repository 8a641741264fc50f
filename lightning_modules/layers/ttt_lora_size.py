"""How many parameters a TTT-LoRA adapter has, and which inner size has as many as a LoRA.

An adapter of a linear layer with inner size d holds the projections to keys, queries and values
(3 in d), the one back (out d), the learned fast weight and bias (d^2 + d), a LayerNorm (2 d) and
the gate of the step size (1). A step size per token takes `in` more, no norm 2 d less.
"""

from collections.abc import Sequence
from math import isqrt


def parameter_count(
    in_features: int,
    out_features: int,
    inner_dim: int,
    *,
    rate_per_token: bool = False,
    output_norm: bool = True,
) -> int:
    """`d (3 in + out) + d^2 + 3 d + 1` trainable parameters, `in` more and `2 d` less by option.

    Args:
        in_features: in, inputs of the linear layer.
        out_features: out, its outputs.
        inner_dim: d.
        rate_per_token: as in `TTTLoRAOptions`.
        output_norm: likewise.
    """
    vectors = 3 if output_norm else 1
    fixed = 1 + (in_features if rate_per_token else 0)
    return inner_dim * (3 * in_features + out_features + inner_dim + vectors) + fixed


def match_lora(rank: int, in_features: int, out_features: int, **options: bool) -> int:
    """The largest inner size with at most the `r (in + out)` parameters of a LoRA of that rank.

    Args:
        rank: r of the LoRA.
        in_features: inputs of the linear layer.
        out_features: its outputs.
        **options: of `parameter_count`.

    Raises:
        ValueError: if not even 1 is small enough.
    """
    return match_lora_siblings(rank, [(in_features, out_features)], **options)


def match_lora_siblings(rank: int, sizes: Sequence[tuple[int, int]], **options: bool) -> int:
    """The largest common inner size with which n adapters have at most as many parameters as LoRAs.

    Adapters of one size (the projections of an attention layer, say) run as one group. With
    `p = sum(3 in + out + 3)` and `L = r sum(in + out)` it is the largest d with
    `n d^2 + p d + n <= L` (other options: other p, and more than n).

    Args:
        rank: r of the LoRAs.
        sizes: (in, out) of each linear layer.
        **options: of `parameter_count`.

    Raises:
        ValueError: if there is no layer, or not even 1 is small enough.
    """
    if not sizes:
        raise ValueError("match_lora_siblings needs the (in, out) of at least one linear layer")
    count, budget = len(sizes), rank * sum(i + o for i, o in sizes)
    fixed = sum(parameter_count(i, o, 0, **options) for i, o in sizes)
    linear = sum(parameter_count(i, o, 1, **options) for i, o in sizes) - fixed - count
    # Integers: floor((sqrt(x) - p) / 2n) is the same for the floor of the root.
    root = isqrt(max(linear**2 + 4 * count * (budget - fixed), 0))
    inner_dim = (root - linear) // (2 * count)
    if inner_dim < 1:
        least = sum(parameter_count(i, o, 1, **options) for i, o in sizes)
        raise ValueError(
            f"a LoRA of rank {rank} has {budget} parameters here, TTT-LoRA at least {least}: "
            "choose a higher rank to match, or give inner_dim as a number"
        )
    return inner_dim
