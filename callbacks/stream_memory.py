"""Memories of streams as files: saved when a file has been read, attached before any is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lightning_modules.models.identity import Weights
from lightning_modules.stream_memory import StreamMemory
from lightning_modules.streams import Slots

MemoryStage = Literal["train", "validate", "test", "predict"]


class StreamMemoryFiles(Callback):
    """Save what was learned of every file, and let every file begin with what was learned of one.

    A memory is written when its file ends in a row, and for files that are being read when the
    loop ends. It belongs to the exact weights of the run: a run of other weights that attaches it
    is refused before it reads anything. Validation inside a fit is left alone, as its weights are
    on their way; memories of `train` belong to the weights at the moment when they are written,
    and one that is attached in training is checked when training begins.

    Args:
        save: folder for `stream_<id>.safetensors`, one for every file that is read (the number is
            the file's in its DataModule); null saves nothing.
        attach: memory with which every file begins, instead of nothing; null attaches none. With
            `fast_state: reset` every chunk begins with it.
        stages: commands, or loops, in which to do so.
        overwrite: replace the memories that are in the folder; without it they are an error.
        name: any text that goes into the files, e.g. of the data set.

    Raises:
        ValueError: a memory of another model, streams that carry nothing to save, or packed rows.
        FileExistsError: the folder holds memories already.
        FileNotFoundError: there is no memory to attach.
    """

    def __init__(
        self,
        save: str | None = None,
        attach: str | None = None,
        stages: tuple[MemoryStage, ...] = ("validate", "test", "predict"),
        overwrite: bool = False,
        name: str = "",
    ) -> None:
        if save is None and attach is None:
            raise ValueError("StreamMemoryFiles does nothing: give save (a folder) or attach")
        if unknown := set(stages) - set(get_args(MemoryStage)):
            known = ", ".join(get_args(MemoryStage))
            raise ValueError(f"unknown stage {min(unknown)!r}; choose of {known}")
        self.save, self.attach, self.stages = save, attach, tuple(stages)
        self.overwrite, self.name = overwrite, name
        self._memory: StreamMemory | None = None
        self._running: _Loop | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self.attach is not None:
            self._memory = StreamMemory.load(self.attach)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._enter(trainer, pl_module, "train")

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._leave("train")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._enter(trainer, pl_module, "validate")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._leave("validate")

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._enter(trainer, pl_module, "test")

    def on_test_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._leave("test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._enter(trainer, pl_module, "predict")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._leave("predict")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _enter(self, trainer: pl.Trainer, pl_module: Any, stage: MemoryStage) -> None:
        if stage not in self.stages:
            return
        if self._memory is not None:
            self._memory.check(pl_module)
        loop = _Loop(self, trainer, pl_module, stage)
        if self.save is not None:
            loop.check()
            # Another process may not find the first memories of this one in the folder.
            trainer.strategy.barrier()
            pl_module.streams.finished.append(loop.write)
        if self._memory is not None:
            pl_module.streams.attach(self._memory.slots, stage)
        self._running = loop

    def _leave(self, stage: MemoryStage) -> None:
        loop = self._running
        if loop is None or loop.stage != stage:
            return
        loop.module.streams.finish(stage)
        self._stop()
        if self.save is not None:
            loop.module.print(f"memories: {len(loop.written)} streams in {self.save}")

    def _stop(self) -> None:
        loop, self._running = self._running, None
        if loop is None:
            return
        if loop.write in loop.module.streams.finished:
            loop.module.streams.finished.remove(loop.write)
        if self._memory is not None:
            loop.module.streams.attach(None, loop.stage)


class _Loop:
    """A loop of the trainer that is running, and the memories that it has written."""

    def __init__(
        self, files: StreamMemoryFiles, trainer: pl.Trainer, module: Any, stage: MemoryStage
    ) -> None:
        self.files, self.trainer, self.module, self.stage = files, trainer, module, stage
        self.written: set[Path] = set()
        self._weights: tuple[int, Weights] | None = None

    def check(self) -> None:
        """Raise if nothing could be saved, before anything is read."""
        if not self.module.streams.persistent:
            raise ValueError(
                "there will be no memory to save, as every chunk starts afresh (fast_state: "
                "reset): let the streams carry it, or leave save out"
            )
        folder = Path(str(self.files.save))
        found = sorted(folder.glob("stream_*.safetensors")) if not self.files.overwrite else []
        if found:
            raise FileExistsError(
                f"{found[0]} and perhaps more memories exist: save into another folder, or say "
                "overwrite: true"
            )

    def write(self, stream_id: int, chunk_index: int, slots: Slots) -> None:
        """Save what a row has learned; a listener of `StreamState.finished`."""
        if self.stage == "train" and not self.trainer.training:
            return  # of a validation in between
        path = Path(str(self.files.save)) / f"stream_{stream_id}.safetensors"
        memory = StreamMemory(slots, stream_id, chunk_index, self._weights_now(), self.files.name)
        # In training a file comes again in every epoch.
        again = self.stage == "train" and path in self.written
        self.written.add(memory.save(path, overwrite=self.files.overwrite or again))

    def _weights_now(self) -> Weights:
        step = self.trainer.global_step
        if self._weights is None or self._weights[0] != step:
            self._weights = (step, Weights.of(self.module))
        return self._weights[1]
