"""A module whose model is built for the data: sizes come from the DataModule's `features`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from lightning_modules.base import AdapterModule
from lightning_modules.distributed.sharding import is_sharded, shard
from lightning_modules.distributed.strategy import FSDP2Strategy


class SizedModule(AdapterModule):
    """Checks options against the data before anything is written, and builds the model for it.

    Attributes:
        model: None until it is built: in `configure_model`, or from a checkpoint.
        features: of the data for which the model was built.
    """

    DATA_MODULES: ClassVar[tuple[str, ...]] = ()
    """Names of the DataModules that have such features, for messages."""
    NEEDS: ClassVar[str] = ""
    """One of these features, by which such data is known."""

    model: Any
    features: dict[str, Any]

    @abstractmethod
    def check(self, features: Mapping[str, Any]) -> Any:
        """Raise a ValueError if options and data do not fit together."""

    @abstractmethod
    def build_for(self, datamodule: Any) -> None:
        """Create the model for the DataModule's features."""

    def prepare_data(self) -> None:
        """Compare the options with the data before anything is written."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if hasattr(datamodule, "features"):
            if self.NEEDS and self.NEEDS not in datamodule.features:
                self._refuse(datamodule)
            self.check(datamodule.features)

    def configure_model(self) -> None:
        """Build the model for the DataModule's features, unless a checkpoint does so; shard it."""
        if self._trainer is None:  # in `load_from_checkpoint`
            return
        if self.model is None:
            self._build()
        if self.device_mesh is not None and not is_sharded(self.model):
            self.shard_model()

    def shard_model(self) -> None:
        """Share the model out among the processes of the strategy; see `distributed.sharding`."""
        if not isinstance(self.trainer.strategy, FSDP2Strategy):
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} brings a device mesh, which this module "
                "cannot follow: use strategy: fsdp2, which shards over all processes"
            )
        if getattr(self, "compile_model", False):
            raise ValueError(
                "compile_model=true does not go together with sharded parameters: set it to "
                "false, or use strategy: ddp"
            )
        shard(self.model, self.device_mesh["data_parallel"])

    def _build(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "features"):
            self._refuse(datamodule)
        self.build_for(datamodule)

    def _refuse(self, datamodule: Any) -> NoReturn:
        raise ValueError(
            f"{type(self).__name__} takes its sizes from the data, and {type(datamodule).__name__} "
            f"does not have them: use {' or '.join(self.DATA_MODULES)} (data.class_path)"
        )
