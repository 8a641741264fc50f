"""Options of a LaCT layer, under the names of the published configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

MuonDtype = Literal["bfloat16", "float32", "float64"]
Branches = Literal["both", "attention", "memory"]


@dataclass(frozen=True)
class LaCTAttentionConfig:
    """The attention of a LaCT layer.

    Args:
        num_attn_heads: heads of attention; `hidden_size / num_attn_heads` must be even.
        window_size: Wn, tokens that a token attends to, itself included. None: all before it.
        rope_theta: base of the frequencies of the rotary positions.
        qkv_bias: give the projection to queries, keys and values a bias.
        attn_qk_norm: normalise (RMSNorm over the hidden size) queries and keys of both paths.
    """

    num_attn_heads: int = 32
    window_size: int | None = 2048
    rope_theta: float = 10_000.0
    qkv_bias: bool = False
    attn_qk_norm: bool = False

    def __post_init__(self) -> None:
        _check_count("num_attn_heads", self.num_attn_heads)
        if self.window_size is not None:
            _check_count("window_size", self.window_size, "; null attends to all tokens before")
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta={self.rope_theta} must be positive, e.g. 10000")


@dataclass(frozen=True)
class LaCTMemoryConfig:
    """The fast networks: per head a stack of r SwiGLU networks.

    Args:
        num_lact_heads: heads of the memory; each has `hidden_size / num_lact_heads` = D channels.
        inter_multi: width inside a network over D.
        r: networks in the stack.
        residual_ttt: skip connections around all of them but the last. Without, a fresh network
            makes a signal of length s one of s^2 / (2 sqrt(D)), which soon is nothing.
        w0_w2_low_rank: rank k of the initial W0 and W2, which then are `A B + 0.5 I`; -1: no such
            limit.
        fw_init_gain: scale of A and B when they are drawn.
    """

    num_lact_heads: int = 4
    inter_multi: float = 1
    r: int = 1
    residual_ttt: bool = False
    w0_w2_low_rank: int = -1
    fw_init_gain: float = 0.5

    def __post_init__(self) -> None:
        _check_count("num_lact_heads", self.num_lact_heads)
        _check_count("r", self.r, ": it counts the networks of the stack, and 1 is plain LaCT")
        if self.w0_w2_low_rank < -1:
            raise ValueError(
                f"w0_w2_low_rank={self.w0_w2_low_rank} is no rank: use at least 1, or -1 for dense "
                "W0 and W2"
            )

    @property
    def rank(self) -> int | None:
        """k, or None for dense W0 and W2."""
        return self.w0_w2_low_rank if self.w0_w2_low_rank > 0 else None


@dataclass(frozen=True)
class LaCTFeatureConfig:
    """What the memory is given, and what becomes of its output.

    Args:
        qkv_silu: SiLU on its queries, keys and values.
        no_v_silu: leave the values out of that.
        ttt_nope: no rotary positions in its queries and keys.
        learnable_ttt_scale: multiply the output by `silu` of a projection, per token and head.
    """

    qkv_silu: bool = True
    no_v_silu: bool = False
    ttt_nope: bool = False
    learnable_ttt_scale: bool = True


@dataclass(frozen=True)
class LaCTUpdateConfig:
    """How the memory learns.

    Args:
        lact_chunk_size: C, tokens of one update.
        lr_dim: learning rates per token, head and weight: 1, or D for one per channel.
        base_lr: inner learning rate where its projection gives 0, which it does at first. The
            published 0.001 is for Muon, whose updates have one size; without, it is so small
            against the initial weights that a fresh memory holds next to nothing. Where all is
            recall, take about 1; on text that only added noise, and 0.001 did better.
        use_momentum: add the momentum of earlier updates, by a coefficient that the tokens give.
        use_muon: orthogonalise every update by Newton-Schulz steps.
        muon_dtype: precision of these steps; `bfloat16` is as published, `float32` has better
            gradients.
        ttt_prenorm: collect updates in a copy whose rows are never rescaled.
        greedy: a wrong baseline: every network of the stack learns as if it stood alone.
        recompute: keep no activation of the memory for the backward pass: compute them again.
    """

    lact_chunk_size: int = 2048
    lr_dim: int = 1
    base_lr: float = 1e-3
    use_momentum: bool = True
    use_muon: bool = False
    muon_dtype: MuonDtype = "bfloat16"
    ttt_prenorm: bool = False
    greedy: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        _check_count("lact_chunk_size", self.lact_chunk_size)
        _check_count("lr_dim", self.lr_dim)
        if self.base_lr <= 0:
            raise ValueError(f"base_lr={self.base_lr} must be positive, e.g. 0.001")
        choices = get_args(MuonDtype)
        if self.muon_dtype not in choices:
            raise ValueError(
                f"muon_dtype={self.muon_dtype!r} is unknown: choose one of {', '.join(choices)}"
            )


@dataclass(frozen=True)
class LaCTLayerConfig:
    """What a LaCT layer computes; options checked against each other.

    Args:
        hidden_size: d.
        attention: options of attention.
        memory: options of the fast networks.
        features: options of what they are given.
        update: options of how they learn.
        branches: `both`, or only one of them.
    """

    hidden_size: int
    attention: LaCTAttentionConfig
    memory: LaCTMemoryConfig
    features: LaCTFeatureConfig
    update: LaCTUpdateConfig
    branches: Branches = "both"

    def __post_init__(self) -> None:
        if self.branches not in get_args(Branches):
            raise ValueError(
                f"branches={self.branches!r} is unknown: choose one of "
                f"{', '.join(get_args(Branches))}"
            )
        _check_count("hidden_size", self.hidden_size)
        _check_divides(self.hidden_size, "num_attn_heads", self.attention.num_attn_heads)
        _check_divides(self.hidden_size, "num_lact_heads", self.memory.num_lact_heads)
        head, size, inner = self.attention_head, self.head, self.inner
        if head % 2:
            raise ValueError(
                f"attention heads of {head} channels cannot be rotated in pairs: choose "
                f"num_attn_heads so that {self.hidden_size} / num_attn_heads is even"
            )
        if size % head and not self.features.ttt_nope:
            raise ValueError(
                f"heads of the memory have {size} channels, no multiple of the {head} of an "
                "attention head, so that its rotation would cross them: make num_attn_heads a "
                f"multiple of num_lact_heads={self.memory.num_lact_heads}, or set ttt_nope=True"
            )
        if inner < 1:
            raise ValueError(
                f"inter_multi={self.memory.inter_multi} leaves no channel inside a fast network: "
                f"int({size} * inter_multi) must be at least 1, so use {1 / size:.3g} or more"
            )
        rank = self.memory.rank
        if rank is not None and rank > min(inner, size):
            raise ValueError(
                f"w0_w2_low_rank={rank} is more than W0 and W2 ({inner} x {size}) can have: use 1 "
                f"to {min(inner, size)}, or -1 for dense ones"
            )
        if self.update.lr_dim not in {1, size} or (self.update.lr_dim > 1 and inner != size):
            raise ValueError(
                f"lr_dim={self.update.lr_dim} must be 1, or {size} (one rate per channel of a "
                f"head) with inter_multi=1, but the networks have {inner} channels inside"
            )

    @property
    def attends(self) -> bool:
        """Whether there is attention."""
        return self.branches != "memory"

    @property
    def remembers(self) -> bool:
        """Whether there is a memory."""
        return self.branches != "attention"

    @property
    def attention_head(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.attention.num_attn_heads

    @property
    def head(self) -> int:
        """D, channels of a head of the memory."""
        return self.hidden_size // self.memory.num_lact_heads

    @property
    def inner(self) -> int:
        """Channels inside a fast network."""
        return int(self.head * self.memory.inter_multi)

    def doubts(self) -> list[str]:
        """What is allowed, but most likely not meant."""
        if not self.remembers:
            return []
        found, chunk = [], self.update.lact_chunk_size
        window = self.attention.window_size
        if self.attends and window is not None and window < chunk:
            found.append(
                f"window_size={window} is less than lact_chunk_size={chunk}: a token then sees "
                "nothing of the older part of its own chunk, neither by attention nor in the "
                f"memory; use window_size={chunk} or more"
            )
        rank = min(self.inner, self.head)
        if self.update.use_muon and chunk < rank:
            found.append(
                f"use_muon with lact_chunk_size={chunk} below {rank}: an update of so few tokens "
                "has no full rank, and orthogonalising it blows up what is noise; use chunks of "
                f"at least {rank} tokens, or use_muon=False"
            )
        if self.memory.r > 1 and not self.memory.residual_ttt:
            found.append(
                f"r={self.memory.r} without residual_ttt: every fresh network makes a signal of "
                "length s one of about s^2 / (2 sqrt(D)), so that little of it leaves the stack; "
                "set residual_ttt=True"
            )
        return found


def _check_count(name: str, value: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1{hint}")


def _check_divides(hidden_size: int, name: str, heads: int) -> None:
    if hidden_size % heads:
        fits = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
        near = sorted(fits, key=lambda n: abs(n - heads))[:2]
        raise ValueError(
            f"hidden_size={hidden_size} is not divisible by {name}={heads}: set {name} to "
            f"{' or '.join(map(str, sorted(near)))}"
        )
