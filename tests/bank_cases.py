"""Banks and memory attention for tests: oracles as modules, routing by hand, a spy on sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_modules.layers.memory_attention import MemoryAttention
from lightning_modules.layers.memory_bank import StandardBank
from lightning_modules.layers.memory_options import MemoryAttentionConfig, RouterConfig

PUBLISHED = {"q": "query", "k": "key", "v": "value", "o": "output"}


class Chosen(NamedTuple):
    """What memory attention reads of a router's `Routing`."""

    chapters: Tensor
    log_weights: Tensor
    block_size: int = 1


def standard_bank(rows: Tensor) -> StandardBank:
    """A bank that holds `[N, width]`."""
    bank = StandardBank(*rows.shape).to(rows.dtype)
    bank.load_state_dict({"weight": rows})
    return bank


def our_name(published: str) -> str:
    """`q_proj.weight` -> `query.weight`, `q_down.weight` -> `query.down.weight`."""
    letter, rest = published.split("_")
    return f"{PUBLISHED[letter]}.{rest.removeprefix('proj.')}"


def oracle_attention(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> MemoryAttention:
    """The layer of an oracle file, in float64."""
    config = MemoryAttentionConfig(
        num_heads=metadata["num_heads"],
        num_kv_heads=metadata["num_kv_heads"],
        rank=metadata.get("projection_rank") or None,
    )
    inner = metadata["reduced_dim"] or metadata["hidden_dim"]
    width = tensors["memory"].shape[-1]
    layer = MemoryAttention(metadata["hidden_dim"], width, inner, config).double()
    names = [name for name in tensors if name.endswith(".weight") and "/" not in name]
    layer.load_state_dict({our_name(name): tensors[name] for name in names})
    return layer


def drawn_attention(
    hidden: int = 16, width: int = 12, inner: int | None = None, **options: Any
) -> MemoryAttention:
    """A layer in float64 whose output projection is not zero."""
    torch.manual_seed(0)
    config = MemoryAttentionConfig(**{"num_heads": 4, **options})
    layer = MemoryAttention(hidden, width, inner or hidden, config).double()
    for parameter in layer.output.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def chosen(
    router: RouterConfig, batch: int = 2, length: int = 8, block_size: int = 1, seed: int = 1
) -> Chosen:
    """Random chapters and weights, among the first `shared + 2 top_k` routed chapters only."""
    generator = torch.Generator().manual_seed(seed)
    decisions, few = -(-length // block_size), 2 * router.top_k
    order = torch.rand(batch, decisions, few, generator=generator).argsort(-1)
    weights = torch.rand(batch, decisions, router.top_k, generator=generator, dtype=torch.float64)
    chapters = router.shared + order[..., : router.top_k]
    return Chosen(chapters, (0.2 + weights).log(), block_size)


def normal(*shape: int, seed: int = 2) -> Tensor:
    """Float64 normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class SizeSpy(TorchDispatchMode):
    """Context manager that notes the floating elements of everything an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, elements)
        return out
