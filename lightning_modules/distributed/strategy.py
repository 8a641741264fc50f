"""FSDP2 as a strategy of the Trainer: `--trainer.strategy fsdp2`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME as REST
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lightning_modules.distributed.checkpoint_folder import (
    begin,
    check_complete,
    part_of,
    publish,
    recover,
)


class FSDP2Strategy(ModelParallelStrategy):
    """Every process holds a part of the parameters, gradients and optimizer state (FSDP2).

    Lightning's ModelParallelStrategy over all processes, with checkpoints that are there whole or
    not at all, and that may leave out frozen pretrained weights.

    Args:
        save_distributed_checkpoint: a checkpoint is a folder to which every process writes its
            part; False puts it together in the first process, an ordinary file.
        process_group_backend: e.g. `nccl` or `gloo`; None takes that of the device.
    """

    def __init__(
        self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; what was at its place is there until the new one is complete."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        if self.is_global_zero:
            begin(path)
        self.barrier()
        part = part_of(path)
        super().save_checkpoint(checkpoint, part, storage_options)
        self.barrier()
        if self.is_global_zero:
            publish(path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load weights and optimizers of a folder, or of an ordinary file, into their shards.

        Returns:
            The rest of the checkpoint, with an empty `state_dict` for the hooks of modules.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it was not written to its end, or lacks weights of the model.
        """
        path = Path(self.broadcast(checkpoint_path))
        if self.is_global_zero:
            recover(path)
        self.barrier()
        check_complete(path)
        read = self._load_folder if path.is_dir() else self._load_file
        return {**read(path, weights_only), "state_dict": {}}

    @property
    def _sharded(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _load_folder(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
        model = self._sharded
        names = {name.removeprefix("state_dict.") for name in stored}
        weights = get_model_state_dict(model)
        self._check(weights, names)
        weights = {name: value for name, value in weights.items() if name in names}
        load({"state_dict": weights}, checkpoint_id=path)
        set_model_state_dict(model, weights, options=StateDictOptions(strict=False))
        for number, optimizer in enumerate(self.optimizers):
            key, state = f"optimizer_{number}", get_optimizer_state_dict(model, optimizer)
            load({key: state}, checkpoint_id=path)
            set_optimizer_state_dict(model, optimizer, state)
        return torch.load(path / REST, map_location="cpu", weights_only=weights_only)

    def _load_file(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        model, weights = self._sharded, checkpoint.pop("state_dict")
        self._check(get_model_state_dict(model), weights)
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, weights, options=whole)
        for optimizer, state in zip(
            self.optimizers, checkpoint.pop("optimizer_states", []), strict=False
        ):
            named = self._named(optimizer, state)
            set_optimizer_state_dict(model, optimizer, named, options=whole)
        return checkpoint

    def _check(self, model: Mapping[str, Any], stored: Any) -> None:
        """Raise unless all weights are stored that building the model does not bring back."""
        module: Any = self.lightning_module
        missing = set(model) - set(stored) - module.left_out_names()
        if missing:
            raise ValueError(
                f"the checkpoint lacks {min(missing)}, and {len(missing) - 1} more weights of the "
                "model: use the options with which it was trained"
            )

    def _named(self, optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """State of an optimizer by the names of its parameters instead of their numbers."""
        name_of = {id(p): name for name, p in self._sharded.named_parameters()}
        names: dict[int, str] = {}
        groups = []
        for stored, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
            here = [name_of[id(parameter)] for parameter in group["params"]]
            names |= dict(zip(stored["params"], here, strict=True))
            groups.append({**stored, "params": here})
        return {
            "state": {names[number]: values for number, values in state["state"].items()},
            "param_groups": groups,
        }


StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Parameters sharded over all processes by FSDP2"
)
