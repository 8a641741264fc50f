"""A run's options and final metrics as TensorBoard's HPARAMS tab reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.metadata import (
    PLUGIN_DATA_VERSION,
    PLUGIN_NAME,
    SESSION_END_INFO_TAG,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

from callbacks.run_settings import Value

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class FinalRun:
    """Writes into a folder of its own, whose scalars are the metrics of the HPARAMS tab.

    In the run's folder every curve would be one. No list of columns is written: of several runs
    TensorBoard would take the first one's list, without it the union.

    Args:
        folder: where the events go.
        options: names and values of the hyperparameters.
    """

    def __init__(self, folder: str, options: Mapping[str, Value]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._writer: SummaryWriter = SummaryWriter(folder)
        # The second of three: the first would be the list of columns, the third the end.
        _, start, _ = hparams({name: _plain(value) for name, value in options.items()}, {})
        self._writer._get_file_writer().add_summary(start)
        self._writer.flush()

    def end(self, metrics: Mapping[str, float], step: int, succeeded: bool) -> None:
        """Write the metrics (by tag) and how the run ended.

        Args:
            metrics: final values.
            step: last optimizer step.
            succeeded: False for a run that was interrupted or failed.
        """
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, step)
        self._writer._get_file_writer().add_summary(_end(succeeded))
        self._writer.close()


def _plain(value: Value) -> Value:
    """Words for booleans, which torch would write as numbers."""
    return str(value).lower() if isinstance(value, bool) else value


def _end(succeeded: bool) -> Summary:
    """How the run ended, as torch's `hparams` writes it, which knows success alone."""
    status = Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
    content = HParamsPluginData(
        session_end_info=SessionEndInfo(status=status), version=PLUGIN_DATA_VERSION
    )
    plugin = SummaryMetadata.PluginData(
        plugin_name=PLUGIN_NAME, content=content.SerializeToString()
    )
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=SESSION_END_INFO_TAG, metadata=metadata)])
