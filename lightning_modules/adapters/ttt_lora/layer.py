"""A linear layer with TTT-LoRA adapters, and the groups in which siblings compute."""

from __future__ import annotations

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
from lightning_modules.layers.ttt_lora_output import add_product, may_overwrite
from lightning_modules.layers.ttt_lora_packed import Packing
from lightning_modules.layers.ttt_lora_statistics import publish_statistics
from lightning_modules.ops import TTTLoRAState
from lightning_modules.ops.ttt_lora import takes_kernels

Read = tuple[Tensor, Tensor | None]
"""What a cell reads, `[B, T, d]`, and its packed `theta_out`, if it is packed."""


class GroupCall(NamedTuple):
    """What a group has computed in a call of its decoder layer.

    Attributes:
        x: input of the linear layers, `[B, T, in]`; None when all cells were asked.
        left: by the number of the cell, until it is asked.
    """

    x: Tensor | None
    left: dict[int, Read]


class SiblingGroup:
    """Cells of one size whose linear layers get the same input: the first call computes for all.

    Args:
        slot: name of the group in `FastState`.
        cells: one for each linear layer; just one without a context.
        context: of the decoder layer that they are in; None: calls belong to no stream.

    Attributes:
        packing: of the weights of all groups of the adapter in the decoder layer.
        index: of this group there.
    """

    def __init__(self, slot: str, cells: list[TTTLoRACell], context: DeepContext | None) -> None:
        self.slot, self.cells, self.context = slot, cells, context
        self.adapter_name = slot.rpartition(".")[2]
        self.packing, self.index = Packing([cells]), 0

    def read(self, number: int, x: Tensor) -> Read:
        """What the cell with this number reads.

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

    def _compute(self, x: Tensor, context: DeepContext) -> list[Read]:
        """What each cell reads, and the state and the statistics that the tokens leave."""
        handle = context.state_for(self.slot)
        before = None if handle is None else handle.read(self.slot, TTTLoRAState)
        packed = self._packed(x, context)
        inputs = project(self.cells, x, packed)
        read, after = read_and_learn(
            self.cells,
            inputs,
            mask=context.mask,
            document_ids=context.document_ids,
            state=before,
            adapt=handle is None or handle.adapt,
            shared=context.computed.setdefault(f"shared/{self.adapter_name}", {}),
            packed=packed,
        )
        if handle is not None:
            handle.write(self.slot, after)
            where = (context.mask, context.document_ids)
            publish_statistics(self.cells, handle, self.slot, inputs, *where, (before, after))
        # The gradient of unbind is a copy, that of a view is none.
        reads = read.unbind(2) if len(self.cells) > 1 else (read.flatten(2),)
        outputs = [None] * len(reads) if packed is None else packed.outputs
        return list(zip(reads, outputs, strict=True))

    def _packed(self, x: Tensor, context: DeepContext) -> Packed | None:
        """The weights, packed by the first group of the layer; None: without kernels."""
        cell, device = self.cells[0], x.device.type
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
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.ttt_lora_cells:
                if x.dim() != 3:
                    raise ValueError(
                        f"the input must be [B, T, in], but has shape {list(x.shape)}: tokens "
                        "without rows (as MoE experts get them) have no order to learn in; leave "
                        "such layers out of target_modules"
                    )
                group, number = self.ttt_lora_places[name]
                y = self._add(self.ttt_lora_cells[name], y, *group.read(number, x))
        return y

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
