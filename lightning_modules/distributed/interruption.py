"""SIGTERM in several processes, without waiting for the device before every batch."""

from __future__ import annotations

from types import FrameType

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException


class AgreedInterruption:
    """The processes of a run end together, at a batch on which they agree.

    Lightning 2.6 copies a flag to the device, broadcasts it and reads it back before every batch
    (`_TrainingEpochLoop._broadcast_sigterm_tensor`): the host waits until the device is idle, every
    time. Its signal handler broadcasts, too, wherever the process may be, and only the first
    process is heard. Here the handler notes the signal, and every `log_every_n_steps` batches, when
    logging waits for the device anyway, the processes ask each other whether one was noted.

    Args:
        trainer: of several processes.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.every = max(1, int(trainer.log_every_n_steps))  # type: ignore[attr-defined]
        self.noted = False
        self._batches = 0

    def install(self) -> None:
        """Take the place of what Lightning does in its signal handler and before a batch."""
        connector = self.trainer._signal_connector
        connector._sigterm_notifier_fn = self.note  # type: ignore[method-assign,assignment]
        loop = self.trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = self.ask  # type: ignore[method-assign]

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Remember a signal, and hand it to the processes that this one has started."""
        launcher = self.trainer.strategy.launcher
        if not self.noted and launcher is not None:
            launcher.kill(signum)
        self.noted = True

    def ask(self) -> None:
        """Before a batch: end the run in all processes if one has noted a signal.

        Raises:
            SIGTERMException: in all processes.
        """
        self._batches += 1
        if self._batches % self.every:
            return
        if self.trainer.strategy.reduce_boolean_decision(self.noted, all=False):
            self.trainer._signal_connector.received_sigterm = True
            raise SIGTERMException
