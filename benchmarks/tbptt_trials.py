"""The named trials of `tbptt.py`: a task, and through how many chunks gradients flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training_runs import Trial

MODEL = "model.init_args.config."
PROBE = "data.init_args.probe."

RECALL = {
    # Pairs stand in the first of four chunks, questions in the other three. One layer of window 16
    # sees 15 tokens back: it never sees a pair.
    "data.init_args.chunk_length": 32,
    f"{PROBE}sequence_length": 128,
    f"{PROBE}min_distance": 32,
    f"{PROBE}num_pairs": 8,
    f"{PROBE}num_queries": 8,
    f"{PROBE}vocab_size": 184,
    "data.init_args.train_sequences": 20_000,
    "data.init_args.val_sequences": 256,
    "data.init_args.batch_size": 32,
    f"{MODEL}hidden_size": 64,
    f"{MODEL}num_hidden_layers": 1,
    f"{MODEL}num_attn_heads": 4,
    f"{MODEL}num_lact_heads": 4,
    f"{MODEL}window_size": 16,
    f"{MODEL}lact_chunk_size": 16,
    f"{MODEL}r": 1,
    f"{MODEL}residual_ttt": False,
    "model.init_args.optimizer.init_args.lr": 3.0e-3,
}
"""The recall probe, small enough for one core."""


@dataclass(frozen=True)
class WindowTrial(Trial):
    """A trial that reads `chunks` chunks of every row, `k` in a step.

    Args:
        k: chunks of a step, through which gradients flow.
        chunks: read of every row in training, the same number for every k of a task.
    """

    k: int = 1
    chunks: int = 0

    def schedule(self, chunks: int | None = None) -> dict[str, Any]:
        """Dotted keys by which the run reads that many chunks; None takes the trial's.

        Raises:
            ValueError: they are not four validations of whole steps.
        """
        chunks = self.chunks if chunks is None else chunks
        if chunks < 4 * self.k or chunks % (4 * self.k):
            raise ValueError(f"chunks={chunks} must be a multiple of {4 * self.k} with k={self.k}")
        steps = chunks // self.k
        return {
            "data.init_args.tbptt": self.k,
            "trainer.max_steps": steps,
            "trainer.val_check_interval": steps // 4,
            "trainer.check_val_every_n_epoch": None,
            "model.init_args.schedule.warmup_steps": steps // 10,
        }


TRIALS: dict[str, WindowTrial] = {
    **{
        f"recall/k{k}": WindowTrial("lact_recall", f"recall, k = {k}", RECALL, k=k, chunks=1600)
        for k in (1, 2, 4)
    },
    **{
        f"maze/k{k}": WindowTrial("action_expert_maze_memory", f"maze, k = {k}", k=k, chunks=40_000)
        for k in (1, 2, 4, 8)
    },
}
