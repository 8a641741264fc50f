"""The tuner: puts TTT-LoRA into a model, as peft's `get_peft_model` asks for it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, ClassVar

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn

from lightning_modules.adapters.base_weights import adapter_parts
from lightning_modules.adapters.deep_context import connect, disconnect
from lightning_modules.adapters.ttt_lora.base import check_base
from lightning_modules.adapters.ttt_lora.config import TTTLoraConfig
from lightning_modules.adapters.ttt_lora.layer import (
    Layers,
    SiblingGroup,
    TTTLoraLayer,
    TTTLoraLinear,
    pack_together,
    refuse_merge,
)
from lightning_modules.adapters.ttt_lora.siblings import families, matched_sizes, plain_path
from lightning_modules.layers.in_place_mlp import InPlaceMLP

CELLS = TTTLoraLayer.adapter_layer_names[0]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOSHI = [f"{name}_proj.linear" for name in "qkvo"] + ["mlp.fc1", "mlp.fc2"]
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
IN_DECODER = rf"(.*\.)?language_model\.(.*\.)?({'|'.join(PROJECTIONS)})"
"""Gemma3 for images and text: the tower that looks at images has layers of the same names."""


class TTTLoraModel(BaseTuner):
    """A model with TTT-LoRA in chosen linear layers. With new adapters it computes what it did.

    State comes with `fast_state=` or a `FastStateCache`; without either, every call is a stream of
    its own. Everything else is peft's.
    """

    prefix: str = "ttt_lora_"
    tuner_layer_cls = TTTLoraLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(DECODERS, PROJECTIONS),
        "gemma3": IN_DECODER,
        "moshi": MOSHI,
    }

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter in, and let siblings compute together."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._regroup(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away."""
        super().delete_adapter(adapter_name)
        self._regroup(self.model)

    def _prepare_model(self, peft_config: TTTLoraConfig, model: nn.Module) -> None:
        """Check all that is targeted before the first layer is replaced, and choose the sizes."""
        _maybe_include_all_linear_layers(peft_config, model)
        self._adapter_parts = adapter_parts(model)
        layers = _targets(peft_config, model, self._adapter_parts)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        for path, layer in layers.items():
            _check_target(path, layer, layer is head)
        _check_in_place(model, layers)
        self._sizes = _sizes(peft_config, layers)
        check_base(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: TTTLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        if current_key.startswith(self._adapter_parts):
            return  # other adapters have linear layers of the same names
        new = self._sizes[current_key], peft_config.options(), peft_config.group_siblings
        if isinstance(target, TTTLoraLinear):
            target.add(adapter_name, *new)
            return
        layer = TTTLoraLinear(target)
        layer.add(adapter_name, *new)
        if adapter_name in self.active_adapters:
            layer.set_adapter(self.active_adapters)
        else:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _regroup(self, model: nn.Module) -> None:
        """Give every adapter of every layer its place in a group."""
        modules = model.named_modules()
        layers = {path: m for path, m in modules if isinstance(m, TTTLoraLinear)}
        contexts = connect(model, list(layers))
        for layer in layers.values():
            layer.ttt_lora_places = {}
        beside: dict[tuple[int, str], list[SiblingGroup]] = {}
        # Not by peft_config: another method's adapter may have taken the name there since.
        for name in dict.fromkeys(n for layer in layers.values() for n in layer.ttt_lora_cells):
            members = [path for path, layer in layers.items() if name in layer.ttt_lora_cells]
            together = all(layers[path].ttt_lora_together[name] for path in members)
            for paths in families(members) if together else [[path] for path in members]:
                alike: dict[tuple[int, int], list[str]] = {}
                for path in paths:
                    cell = layers[path].ttt_lora_cells[name]
                    size = (layers[path].in_features, cell.inner_dim)
                    key = size if contexts[path] else (*size, path)
                    alike.setdefault(key, []).append(path)
                for group in alike.values():
                    context = contexts[group[0]]
                    placed = _place(name, group, layers, context)
                    if context is not None:
                        beside.setdefault((id(context), name), []).append(placed)
        for groups in beside.values():
            pack_together(groups)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Impossible; see `refuse_merge`. Refused before another method's layer is merged."""
        refuse_merge()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Name of a weight in files, which can be loaded under another adapter name.

        peft's own looks for the adapter name just before a weight, where a cell has modules.
        """
        before, cells, inside = key.rpartition(f".{CELLS}.")
        return f"{before}{cells}{inside.removeprefix(f'{adapter_name}.')}"

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            refuse_merge()
        model = super()._unload_and_optionally_merge(False, *args, **kwargs)
        disconnect(model)
        return model


def _place(
    name: str, paths: list[str], layers: dict[str, TTTLoraLinear], context: Any
) -> SiblingGroup:
    """Make a group of an adapter's cells in these layers."""
    plain = [plain_path(path) for path in paths]
    parent = plain[0].rpartition(".")[0]
    slot = ".".join([parent, "+".join(path.rpartition(".")[2] for path in plain), name])
    group = SiblingGroup(slot, [layers[path].ttt_lora_cells[name] for path in paths], context)
    group.layers = Layers([layers[path] for path in paths])
    for number, path in enumerate(paths):
        layers[path].ttt_lora_places[name] = (group, number)
    return group


def _targets(
    config: TTTLoraConfig, model: nn.Module, inside: tuple[str, ...]
) -> dict[str, nn.Module]:
    """Path -> base layer of all that is targeted, but for what is inside other adapters.

    Raises:
        ValueError: nothing is; the message names what is near.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        tuner = isinstance(module, BaseTunerLayer)
        inside += (f"{path}.",) if tuner else ()
        if path and check_target_module_exists(config, path):
            found[path] = module.get_base_layer() if tuner else module
    if not found:
        raise ValueError(_nothing_matches(config, model))
    return found


def _nothing_matches(config: TTTLoraConfig, model: nn.Module) -> str:
    """What to say where no layer is targeted: the names that are near."""
    modules = model.named_modules()
    linear = {path.rpartition(".")[2] for path, module in modules if type(module) is nn.Linear}
    wanted = config.target_modules
    names = [wanted] if isinstance(wanted, str) else sorted(wanted or ())
    near = {n for name in names for n in difflib.get_close_matches(name, linear, 3, 0.5)}
    layers = config.layers_to_transform
    where = "" if layers is None else f" in layers_to_transform={layers}"
    return (
        f"target_modules={names} match no layer of {type(model).__name__}{where}: it has linear "
        f"layers named {', '.join(sorted(near or linear))}"
    )


def _check_target(path: str, layer: nn.Module, is_head: bool) -> None:
    """Raise ValueError unless a layer can get an adapter."""
    if is_head:
        raise ValueError(
            f"target_modules match {path}, the output embedding: TTT-LoRA goes into the layers; "
            "leave it out (exclude_modules)"
        )
    weight = getattr(layer, "weight", None)
    plain = type(layer) is nn.Linear and type(weight) is nn.Parameter
    if not plain or not weight.is_floating_point():
        what = type(layer).__name__
        dtype = "" if weight is None else f" with a {type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"{path} is a {what}{dtype}, not a plain nn.Linear with floating-point weights: "
            "TTT-LoRA does not go into quantised or other layers; load the model unquantised, or "
            "leave the layer out of target_modules"
        )


def _check_in_place(model: nn.Module, targets: Iterable[str]) -> None:
    """Raise ValueError if a target is a weight that In-Place TTT reads, not calling the layer."""
    for path, module in model.named_modules():
        down = f"{path}.down_proj"
        if isinstance(module, InPlaceMLP) and down in targets:
            raise ValueError(
                f"{down} is the fast weight of In-Place TTT: leave it out of target_modules, or "
                "put TTT-LoRA into other layers (layers_to_transform)"
            )


def _sizes(config: TTTLoraConfig, layers: dict[str, Any]) -> dict[str, int]:
    """Inner size of every adapter: by pattern, by number, or matched to a LoRA."""
    sizes: dict[str, int] = {}
    for pattern, size in config.inner_dim_pattern.items():
        matching = [path for path in layers if re.fullmatch(rf"(.*\.)?({pattern})", path)]
        if not matching:
            raise ValueError(
                f"inner_dim_pattern {pattern!r} matches none of the layers that get an adapter: "
                f"{', '.join(sorted({path.rpartition('.')[2] for path in layers}))}"
            )
        sizes |= dict.fromkeys(matching, size)
    rest = {path: layer for path, layer in layers.items() if path not in sizes}
    if config.inner_dim is not None:
        return sizes | dict.fromkeys(rest, config.inner_dim)
    options = {"rate_per_token": config.rate_per_token, "output_norm": config.output_norm}
    return sizes | matched_sizes(config.match_rank, config.match_per, rest, **options)
