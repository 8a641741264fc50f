"""A linear layer with TTT-LoRA adapters, and the groups in which siblings compute."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_modules.layers.deep_context import DeepContext, InDeepContext
from lightning_modules.layers.ttt_lora import (
    Packed,
    TTTLoRACell,
    TTTLoRAOptions,
    project,
    read_and_learn,
)
from lightning_modules.layers.ttt_lora_output import add_product, is_plain, may_overwrite
from lightning_modules.layers.ttt_lora_packed import Packing
from lightning_modules.layers.ttt_lora_statistics import publish_statistics
from lightning_modules.ops import TTTLoRAState
from lightning_modules.ops.ttt_eager import autocast_device
from lightning_modules.ops.ttt_lora import Linears, takes_kernels

Read = tuple[Tensor, Tensor | None]
"""What a cell reads, `[B, T, d]`, and its packed `theta_out`, if it is packed."""

Found = Read | Tensor
"""What a cell reads, or all that its linear layer puts out with it, `[B, T, out]`."""


class GroupCall(NamedTuple):
    """What a group has computed in a call of its decoder layer.

    Attributes:
        x: input of the linear layers, `[B, T, in]`; None when all cells were asked.
        left: by the number of the cell, until it is asked.
    """

    x: Tensor | None
    left: dict[int, Found]


class Layers:
    """Layers of a group, which they keep alive, not it them: no model waits to be collected.

    Args:
        layers: in the order of the cells.
    """

    def __init__(self, layers: Sequence[TTTLoraLinear] = ()) -> None:
        self.references = [weakref.ref(layer) for layer in layers]

    def alive(self) -> list[TTTLoraLinear]:
        """All of them; none if one is gone."""
        layers = [layer for x in self.references if (layer := x()) is not None]
        return layers if len(layers) == len(self.references) else []

    def __reduce__(self) -> tuple[type[Layers], tuple[list[TTTLoraLinear]]]:
        """Copied and pickled models have their own."""
        return Layers, (self.alive(),)


class SiblingGroup:
    """Cells of one size whose linear layers get the same input: the first call computes for all.

    Where nothing but this adapter has a part in what the linear layers put out, these are computed
    in the same call.

    Args:
        slot: name of the group in `FastState`.
        cells: one for each linear layer; just one without a context.
        context: of the decoder layer that they are in; None: calls belong to no stream.

    Attributes:
        packing: of the weights of all groups of the adapter in the decoder layer.
        index: of this group there.
        layers: that have the cells; none: the linear layers are computed elsewhere.
    """

    def __init__(self, slot: str, cells: list[TTTLoRACell], context: DeepContext | None) -> None:
        self.slot, self.cells, self.context = slot, cells, context
        self.adapter_name = slot.rpartition(".")[2]
        self.packing, self.index = Packing([cells]), 0
        self.layers = Layers()

    def read(self, number: int, x: Tensor) -> Found:
        """What the cell with this number reads, or what its linear layer puts out with it.

        Args:
            number: of the cell.
            x: input of its linear layer, `[B, T, in]`.

        Raises:
            ValueError: siblings are called with different inputs, or one twice.
        """
        context = self.context or DeepContext()
        call: GroupCall | None = context.computed.get(self.slot)
        if call is None:
            call = GroupCall(x, dict(enumerate(self._compute(x, context))))
        elif number not in call.left:
            raise ValueError(
                f"a linear layer of {self.slot} is called more than once in a call of its decoder "
                "layer, so that the order of its tokens is not known: leave it out of "
                "target_modules"
            )
        elif call.x is not x:
            raise ValueError(
                f"the linear layers of {self.slot} are called with different inputs: set "
                "group_siblings=False, or leave them out of target_modules"
            )
        read = call.left.pop(number)
        context.computed[self.slot] = call if call.left else GroupCall(None, {})
        return read

    def _compute(self, x: Tensor, context: DeepContext) -> Sequence[Found]:
        """What `read` returns of each cell; leaves the state and the statistics of the tokens."""
        handle = context.state_for(self.slot)
        before = None if handle is None else handle.read(self.slot, TTTLoRAState)
        packed = self._packed(x, context)
        inputs, linears = project(self.cells, x, packed), self._linears(x, packed)
        read, after = read_and_learn(
            self.cells,
            inputs,
            mask=context.mask,
            document_ids=context.document_ids,
            state=before,
            adapt=handle is None or handle.adapt,
            shared=context.computed.setdefault(f"shared/{self.adapter_name}", {}),
            packed=packed,
            linears=linears,
        )
        if handle is not None:
            handle.write(self.slot, after)
            where = (context.mask, context.document_ids)
            publish_statistics(self.cells, handle, self.slot, inputs, *where, (before, after))
        if linears is not None:
            outputs: tuple[Tensor, ...] = read
            return outputs
        # The gradient of unbind is a copy, that of a view is none.
        reads = read.unbind(2) if len(self.cells) > 1 else (read.flatten(2),)
        thetas = [None] * len(reads) if packed is None else packed.outputs
        return list(zip(reads, thetas, strict=True))

    def _linears(self, x: Tensor, packed: Packed | None) -> Linears | None:
        """The linear layers, if they may be computed here."""
        layers = self.layers.alive() if packed is not None else []
        if packed is None or not layers or packed.weights.dtype != x.dtype:
            return None
        weights, biases, names = [], [], [self.adapter_name]
        for layer in layers:
            base = layer.base_layer
            if layer.names != names or not is_plain(base, x.dtype):
                return None
            weights.append(base._parameters["weight"])
            biases.append(base._parameters["bias"])
        scaling = self.cells[0].options.scaling
        return Linears(x, packed.weights, weights, biases, packed.outputs, scaling)

    def _packed(self, x: Tensor, context: DeepContext) -> Packed | None:
        """The weights, packed by the first group of the layer; None: without kernels."""
        cell, device = self.cells[0], autocast_device(x.device)
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if not takes_kernels(x, dtype, cell.inner_dim, cell.options.mini_batch_size):
            return None
        key = f"packed/{self.adapter_name}/{dtype}"
        if key not in context.computed:
            context.computed[key] = self.packing.pack(dtype)
        found: list[Packed] | None = context.computed[key]
        return None if found is None else found[self.index]


def pack_together(groups: list[SiblingGroup]) -> None:
    """Let the first of the groups of an adapter in a decoder layer pack the weights of all."""
    packing = Packing([group.cells for group in groups])
    for index, group in enumerate(groups):
        group.packing, group.index = packing, index


class TTTLoraLayer(BaseTunerLayer):
    """What peft must know of a layer with TTT-LoRA: all weights are in `ttt_lora_cells`."""

    adapter_layer_names = ("ttt_lora_cells",)


class TTTLoraLinear(nn.Module, TTTLoraLayer, InDeepContext):
    """A frozen linear layer, and for each active adapter what it has learned while reading.

    `y = base(x) + sum_a scaling_a theta_out_a(h_a)`, see `TTTLoRACell`. Input `[B, T, in]`.

    Attributes:
        ttt_lora_cells: adapter name -> all of its weights here.
        ttt_lora_places: adapter name -> the group in which it computes, and its number there.
        ttt_lora_together: adapter name -> whether siblings may be in its group.

    Args:
        base_layer: an `nn.Linear`, or another method's layer around one.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = self.get_base_layer()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.ttt_lora_cells = nn.ModuleDict()
        self.ttt_lora_places: dict[str, tuple[SiblingGroup, int]] = {}
        self.ttt_lora_together: dict[str, bool] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def add(
        self, adapter_name: str, inner_dim: int, options: TTTLoRAOptions, together: bool = True
    ) -> None:
        """Add an adapter with new weights, like the base in device and dtype."""
        self.ttt_lora_together[adapter_name] = together
        cell = TTTLoRACell(self.in_features, self.out_features, inner_dim, options)
        self.ttt_lora_cells[adapter_name] = cell
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base with what the active adapters add, `[B, T, out]`.

        Raises:
            ValueError: x is not a batch of rows of tokens.
        """
        names, y = self.names, None
        if names and x.dim() != 3:
            raise ValueError(
                f"the input must be [B, T, in], but has shape {list(x.shape)}: tokens without rows "
                "(as MoE experts get them) have no order to learn in; leave such layers out of "
                "target_modules"
            )
        for name in names:
            group, number = self.ttt_lora_places[name]
            found = group.read(number, x)
            if isinstance(found, Tensor):
                return found
            y = self.base_layer(x, *args, **kwargs) if y is None else y
            y = self._add(self.ttt_lora_cells[name], y, *found)
        return self.base_layer(x, *args, **kwargs) if y is None else y

    @property
    def names(self) -> list[str]:
        """Adapters that have a part in the output."""
        if self._disable_adapters:
            return []
        cells = self.ttt_lora_cells  # a module's own look-up takes long
        return [name for name in self.active_adapters if name in cells]

    def _add(self, cell: TTTLoRACell, y: Tensor, read: Tensor, weight: Tensor | None) -> Tensor:
        """y with what an adapter adds."""
        if weight is None or not y.dtype == read.dtype == weight.dtype:
            return cell.output(y, read)
        if read.shape[-1] < weight.shape[-1]:  # from a backend without columns behind d
            weight = weight[:, : read.shape[-1]]
        overwrite = may_overwrite(self.base_layer, y)
        return add_product(y, read, weight, cell.options.scaling, overwrite)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Impossible; see `refuse_merge`."""
        refuse_merge()

    def unmerge(self) -> None:
        """Nothing was merged."""


def refuse_merge() -> None:
    """Raise ValueError: TTT-LoRA is no linear map."""
    raise ValueError(
        "TTT-LoRA cannot be merged into a linear layer: what it adds depends on what was read "
        "before, and on the input by way of norms. Keep the adapter, or unload() it; peft's LoRA "
        "can be merged"
    )
