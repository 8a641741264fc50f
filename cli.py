"""Command line: `python cli.py fit|validate|test|predict --config configs/x.yaml`."""

from __future__ import annotations

import difflib
import gc
import os
import sys
from collections.abc import Sequence

COMMANDS = ("fit", "validate", "test", "predict")
COMPLETION = "--print_completion="  # jsonargparse writes it with shtab, see docs/cli.md
HELP = """\
fast-weights: transformers with a memory that learns while it reads, on PyTorch Lightning.

usage: python cli.py COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]

commands:
  fit         train, with validation in between
  validate    loss on the validation files
  test        loss on the test files
  predict     outputs for the test files, written to predictions.parquet

models, the data they read, and a config to begin with (minutes on a CPU):
  ActionExpertModule   a robot's policy that remembers through an episode: test-time training
                       after attention. Simulated or recorded episodes: configs/quickstart.yaml
  LaCTModule           a language model whose memory is rewritten after each large chunk, from
                       scratch or beside a pretrained one's attention. Text: configs/lact_small.yaml
  MemoryBankModule     a language model that looks up a learned bank, in chapters that a router
                       chooses. Text, conversations: configs/memory_small.yaml
  TTTLoRAModule        a language model with adapters that learn from a file while reading it
                       (TTT-as-LoRA, In-Place TTT; LoRA to compare with). Text, conversations,
                       audio codes: configs/ttt_lora_small.yaml

from nothing to a result:
  python cli.py fit --config configs/quickstart.yaml     train; writes runs/quickstart/version_0
  tensorboard --logdir runs                              watch
  python cli.py test --config configs/quickstart.yaml \\
      --ckpt_path runs/quickstart/version_0/checkpoints/last.ckpt

options:
  --trainer.max_steps 50 --data.batch_size 4    any key of a config; later files and options win
  --print_config=comments                       print all keys, explained, and stop
  --model.help NAME, --data.help NAME           the keys of one class, by its short name

Config files are looked up from here, then beside cli.py. More: python cli.py fit --help,
docs/cli.md, docs/config_reference.md (every key), docs/walkthrough_*.md (step by step).
"""


def main(args: list[str] | None = None) -> None:
    """Run a command; wrong input ends in one line on stderr and exit code 1 or 2.

    Args:
        args: command line without the program's name; None takes it from `sys.argv`.
    """
    arguments = sys.argv[1:] if args is None else args
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    completion = arguments[0].startswith(COMPLETION)
    if arguments[0] not in COMMANDS and not completion:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        way_out = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(COMMANDS)}"
        print(f"error: unknown command '{arguments[0]}'; {way_out}", file=sys.stderr)
        sys.exit(2)
    try:
        if completion:
            from jsonargparse import set_parsing_settings

            set_parsing_settings(add_print_completion_argument=True)
        _run(COMMANDS if completion else arguments[:1], args)
        return
    except Exception as error:
        from lightning_modules.user_errors import answer, root_of

        said, root = answer(error), root_of(error)
    if said is None:
        raise root
    print(f"raised at {said.place}", file=sys.stderr)
    print(f"error: {said.message}", file=sys.stderr)
    sys.exit(1)


def _run(commands: Sequence[str], args: list[str] | None) -> None:
    """Build the LightningCLI and run a command (imports take seconds, so they are here)."""
    # Before torch: by default its threads spin for about a millisecond while they wait for each
    # other, also for one whose core does something else; then steps of small models take many times
    # as long. So short a wait costs nothing on a machine of one's own.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    gc.disable()  # a sixth of the imports' time would go into looking for garbage among classes
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningCLI

    import callbacks
    import datamodules
    import lightning_modules
    from callbacks.next_steps import InterruptedFit, next_steps
    from lightning_modules.base import AdapterModule
    from lightning_modules.config_parser import ConfigParser
    from lightning_modules.quiet import (
        leave_out_moved_checkpoints,
        leave_out_noise,
        refuse_untrained_weights,
    )

    for package in (lightning_modules, datamodules):
        for name in package.__all__:
            getattr(package, name)  # classes resolve by short name once imported
    gc.enable()
    leave_out_noise()

    class CommandLine(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            # Making the parser of all options takes longest: none for commands not asked for.
            return {name: LightningCLI.subcommands()[name] for name in commands}

        def before_fit(self) -> None:
            self.trainer.callbacks.append(InterruptedFit())  # type: ignore[attr-defined]

        def after_fit(self) -> None:
            for line in next_steps(self.trainer) if self.trainer.is_global_zero else ():
                print(line)

        def before_validate(self) -> None:
            self._say_whose_weights("validate")

        def before_test(self) -> None:
            self._say_whose_weights("test")

        def before_predict(self) -> None:
            self._say_whose_weights("predict")
            # Predictions go to a file; nobody would see the list that Lightning collects.
            self.config_init["predict"]["return_predictions"] = False
            trainer_callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(c, callbacks.PredictionWriter) for c in trainer_callbacks):
                trainer_callbacks.append(callbacks.PredictionWriter())

        def _say_whose_weights(self, command: str) -> None:
            leave_out_moved_checkpoints()
            refuse_untrained_weights()
            if self.config_init[command].ckpt_path is None and self.trainer.is_global_zero:
                print(
                    f"note: {command} without --ckpt_path uses the model as it is before training; "
                    "for a trained one add --ckpt_path PATH",
                    file=sys.stderr,
                )

    CommandLine(
        AdapterModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={
            # The stream sampler shards files by rank itself.
            "use_distributed_sampler": False,
            "callbacks": [
                callbacks.FileBoundaryReset(),
                callbacks.StreamStateCheckpoint(),
                callbacks.RunSummary(),
            ],
        },
        parser_class=ConfigParser,
        args=args,
    )


if __name__ == "__main__":
    main()
