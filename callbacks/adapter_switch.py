"""Which of several adapters is active in which loop of the trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from lightning_modules.adapters.switch import Activation, activation, restore, set_active

UNCHANGED = "(unchanged)"
"""Leaves the adapters as they are; no adapter can have that name."""


class AdapterByStage(Callback):
    """Switch the model's `switch` adapters when a loop of the trainer begins, and back at its end.

    Validation inside a fit has its own setting; afterwards training goes on with its adapter. What
    was active before is restored when a loop ends, also by an exception.

    Args:
        train: member that is active in training; null is attention without adapter, and the
            default leaves the adapters as they are.
        validate: the same in validation.
        test: the same in testing.
        predict: the same in prediction.
    """

    def __init__(
        self,
        train: str | None = UNCHANGED,
        validate: str | None = UNCHANGED,
        test: str | None = UNCHANGED,
        predict: str | None = UNCHANGED,
    ) -> None:
        self.train, self.validate, self.test, self.predict = train, validate, test, predict
        self._before: list[Activation] = []
        """What was active when each of the running loops began, the innermost last."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter(pl_module, self.train)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter(pl_module, self.validate)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter(pl_module, self.test)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave()

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._enter(pl_module, self.predict)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        while self._before:
            self._leave()

    def _enter(self, pl_module: Any, name: str | None) -> None:
        before = [] if name == UNCHANGED else activation(pl_module)
        if name != UNCHANGED:
            set_active(pl_module, name)
        self._before.append(before)

    def _leave(self) -> None:
        restore(self._before.pop())
