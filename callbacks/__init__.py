"""Callbacks: stream state, memory files, monitors, closed loop, averaged weights, predictions."""

from callbacks.adapter_switch import AdapterByStage
from callbacks.closed_loop import ClosedLoopEvaluation
from callbacks.context_parallel import ContextParallel
from callbacks.ema import EMA
from callbacks.fast_weights import FastWeightMonitor
from callbacks.file_boundary import FileBoundaryReset
from callbacks.gates import GateMonitor
from callbacks.position_loss import PositionLossMonitor
from callbacks.prediction_writer import PredictionWriter
from callbacks.router import RouterMonitor
from callbacks.run_summary import RunSummary
from callbacks.stream_checkpoint import StreamStateCheckpoint
from callbacks.stream_memory import StreamMemoryFiles
from callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "AdapterByStage",
    "ClosedLoopEvaluation",
    "ContextParallel",
    "FastWeightMonitor",
    "FileBoundaryReset",
    "GateMonitor",
    "PositionLossMonitor",
    "PredictionWriter",
    "RouterMonitor",
    "RunSummary",
    "StreamMemoryFiles",
    "StreamStateCheckpoint",
    "Throughput",
]
