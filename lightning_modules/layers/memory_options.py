"""Options of a memory bank, of what reads it, and of the router in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BankKind = Literal["standard", "factorized", "reduced"]
Strategy = Literal["token", "block", "rolling", "prompt", "sequence"]
Mixing = Literal["joint", "mixture"]
SharedMode = Literal["together", "per_chapter"]


@dataclass(frozen=True)
class BankConfig:
    """A learned bank of rows.

    Args:
        num_rows: rows of the bank, N; with a router it must be divisible by its chapters.
        kind: `standard` stores `[N, width]`; `factorized` the product `A B^T` of `[N, rank]` and
            `[width, rank]`; `reduced` stores `[N, rank]`, and attention works in `rank` channels.
        width: channels of a row; None takes the hidden size of the model.
        rank: channels of the small matrices of `factorized` and `reduced`.
        bits: 8 or 4 rounds the rows as a quantised bank would (straight-through gradients), so
            that the model learns to live with it; None keeps full precision.
    """

    num_rows: int = 4096
    kind: BankKind = "standard"
    width: int | None = None
    rank: int | None = None
    bits: Literal[4, 8] | None = None

    def __post_init__(self) -> None:
        _at_least_one("bank.num_rows", self.num_rows)
        _one_of("bank.kind", self.kind, BankKind)
        for name in ("width", "rank"):
            if getattr(self, name) is not None:
                _at_least_one(f"bank.{name}", getattr(self, name))
        if (self.rank is None) != (self.kind == "standard"):
            raise ValueError(
                f"bank.kind={self.kind} with bank.rank={self.rank}: factorized and reduced banks "
                "need a rank, standard ones have none"
            )
        if self.kind == "reduced" and self.width is not None:
            raise ValueError("a reduced bank has rows of bank.rank channels: leave out bank.width")
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bank.bits={self.bits}: choose 8, 4, or null for full precision")


@dataclass(frozen=True)
class MemoryAttentionConfig:
    """Cross-attention from tokens to rows of a bank, without positions.

    Args:
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values, each read by `num_heads / num_kv_heads` heads of
            the queries; None is `num_heads`.
        rank: every projection becomes `up(down(x))` through so many channels; None keeps it dense.
        dropout: probability with which an attention weight is zeroed in training.
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    rank: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _at_least_one("attention.num_heads", self.num_heads)
        if self.rank is not None:
            _at_least_one("attention.rank", self.rank)
        if self.num_kv_heads is not None:
            _at_least_one("attention.num_kv_heads", self.num_kv_heads)
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"attention.num_heads={self.num_heads} must be divisible by "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"attention.dropout={self.dropout} must be at least 0 and less than 1")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclass(frozen=True)
class RouterConfig:
    """Which chapters of the bank a token reads.

    A chapter is a run of consecutive rows. The first `shared` chapters are read by every token and
    known to no router; of the others, the router gives every decision its `top_k` best.

    Args:
        num_chapters: parts of the bank among which is chosen, C, shared ones included.
        top_k: chapters that a decision chooses, shared ones not counted.
        strategy: what a decision is made on. `token`: the token itself. `block`: one decision per
            block of tokens, on the mean of all earlier blocks of the document. `rolling`: the mean
            of the last `window` tokens, the token included. `prompt`: the mean of the prompt so
            far, so that an answer is routed as a whole. `sequence`: the mean of the whole
            sequence, which is not causal.
        block_size: tokens of a block.
        window: tokens of `rolling`.
        shared: chapters that every token reads, S.
        shared_mode: with `mixing: mixture`, `together` reads the shared chapters in one softmax,
            `per_chapter` in one softmax each.
        mixing: `joint` is one softmax over all rows that a token reads, where the logarithm of a
            chapter's weight is added to its logits; `mixture` is one softmax per chapter, and the
            weighted sum of what they read.
        renormalize: weights of the chosen chapters sum to 1; otherwise they are their
            probabilities, as in the Switch Transformer.
        routed_scaling: factor of the weights of chosen chapters, besides the shared ones.
        balance_coefficient: weight of the load balancing loss, e.g. 0.01; 0 is off.
        load_coefficient: weight of the squared relative deviation of the chapters' load; 0 is off.
        z_coefficient: weight of the loss that keeps the logits small, e.g. 0.001; 0 is off.
        allow_non_causal: needed for `sequence`, which lets a language model read its own targets.
    """

    num_chapters: int = 64
    top_k: int = 4
    strategy: Strategy = "block"
    block_size: int = 128
    window: int = 128
    shared: int = 0
    shared_mode: SharedMode = "together"
    mixing: Mixing = "joint"
    renormalize: bool = True
    routed_scaling: float = 1.0
    balance_coefficient: float = 0.01
    load_coefficient: float = 0.0
    z_coefficient: float = 0.0
    allow_non_causal: bool = False

    def __post_init__(self) -> None:
        for name in ("num_chapters", "top_k", "block_size", "window"):
            _at_least_one(f"router.{name}", getattr(self, name))
        _one_of("router.strategy", self.strategy, Strategy)
        _one_of("router.mixing", self.mixing, Mixing)
        _one_of("router.shared_mode", self.shared_mode, SharedMode)
        if not 0 <= self.shared < self.num_chapters:
            raise ValueError(
                f"router.shared={self.shared} of num_chapters={self.num_chapters}: leave at least "
                "one chapter to the router"
            )
        if self.top_k > self.routed:
            raise ValueError(
                f"router.top_k={self.top_k}, but {self.routed} chapters are routed "
                f"(num_chapters={self.num_chapters} less shared={self.shared}): choose a smaller "
                "top_k or more chapters"
            )
        if self.renormalize and self.top_k == 1:
            raise ValueError(
                "router.top_k=1 with renormalize=true: the weight of the only chapter would "
                "always be 1, so that the language model's loss gives the router no gradient; set "
                "renormalize to false, or top_k to at least 2"
            )
        if self.routed_scaling <= 0:
            raise ValueError(f"router.routed_scaling={self.routed_scaling} must be positive")
        for name in ("balance_coefficient", "load_coefficient", "z_coefficient"):
            if getattr(self, name) < 0:
                raise ValueError(f"router.{name} must not be negative; 0 is off")
        if self.strategy == "sequence" and not self.allow_non_causal:
            raise ValueError(
                "router.strategy=sequence routes every token by the mean of the whole sequence, so "
                "that a language model reads its own targets: use block, or set "
                "router.allow_non_causal=true for an encoder or a baseline"
            )

    @property
    def routed(self) -> int:
        """Chapters among which the router chooses."""
        return self.num_chapters - self.shared


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def _one_of(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(get_args(choices))}")
