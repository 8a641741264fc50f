"""Command line: `python cli.py fit|validate|test|predict --config configs/x.yaml`."""

from __future__ import annotations

import difflib
import sys
import traceback
from pathlib import Path

COMMANDS = ("fit", "validate", "test", "predict")
HELP = """\
fast-weights: transformers with a memory that learns while it reads, on PyTorch Lightning.

usage: python cli.py COMMAND --config FILE [--config FILE ...] [--KEY VALUE ...]

commands:
  fit         train, with validation in between
  validate    loss on the validation files
  test        loss on the test files
  predict     outputs for the test files, written to predictions.parquet

models (--model NAME):
  ActionExpertModule    flow-matching action expert whose attention layers are followed by
                        test-time-training layers behind dual gates
  LaCTModule            language model whose memory learns in large chunks, from scratch or
                        beside the attention of a pretrained one
  MemoryBankModule      language model that reads a learned bank, whose chapters a causal router
                        chooses, from scratch or inside a pretrained one (beside LoRA)
  TTTLoRAModule         frozen language model with adapters that learn while they read a file:
                        TTT-as-LoRA, In-Place TTT, or plain LoRA to compare with

examples:
  python cli.py fit --config configs/quickstart.yaml
  python cli.py fit --config configs/quickstart.yaml --trainer.max_steps 50 --data.batch_size 4
  python cli.py fit --config configs/lact_small.yaml  (or memory_small, ttt_lora_small)
  python cli.py fit --config configs/quickstart.yaml --print_config
  python cli.py fit --model.help ActionExpertModule
  python cli.py fit --help

Every key of a config file is an option; options and later files win. Config files are looked up
from the current directory, then beside cli.py. Classes go by their short name.
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
    if arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        way_out = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(COMMANDS)}"
        print(f"error: unknown command '{arguments[0]}'; {way_out}", file=sys.stderr)
        sys.exit(2)
    try:
        _run(arguments[0], args)
        return
    except Exception as error:
        caught = _root_of(error)
    if not _is_on_purpose(caught):
        raise caught
    message = caught.args[0] if isinstance(caught, KeyError) else caught
    line = traceback.extract_tb(caught.__traceback__)[-1].lineno
    print(f"raised at {_place(caught)}:{line}", file=sys.stderr)
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(1)


def _run(command: str, args: list[str] | None) -> None:
    """Build the LightningCLI and run a command (imports take seconds, so they are here)."""
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.utilities import rank_zero_warn

    import callbacks
    import datamodules
    import lightning_modules
    from lightning_modules.base import AdapterModule
    from lightning_modules.config_parser import ConfigParser

    for package in (lightning_modules, datamodules):
        for name in package.__all__:
            getattr(package, name)  # classes resolve by short name once imported

    class CommandLine(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            # Making the parser of all options takes longest: none for commands not asked for.
            return {command: LightningCLI.subcommands()[command]}

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
            if self.config_init[command].ckpt_path is None:
                rank_zero_warn(
                    f"{command} without --ckpt_path uses the model as it is before training; "
                    "for a trained one add --ckpt_path PATH"
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


def _root_of(error: Exception) -> BaseException:
    """What a constructor raised; the parser wraps it once per member of a union."""
    import jsonargparse

    parser = Path(jsonargparse.__file__).parent
    root: BaseException = error
    while root.__cause__ is not None and _place(root).is_relative_to(parser):
        root = root.__cause__
    return error if _place(root).is_relative_to(parser) else root


def _is_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` of this project or of Lightning's trainer rejects the user's input.

    Such messages name the cause and the fix; a traceback would only bury them.
    """
    import lightning.pytorch.trainer as trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    here = Path(__file__).parent
    folders = [here / name for name in ("lightning_modules", "datamodules", "callbacks")]
    folders.append(Path(trainer.__file__).parent)
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return isinstance(error, MisconfigurationException | FileNotFoundError) or (
        line.startswith("raise ") and any(_place(error).is_relative_to(f) for f in folders)
    )


def _place(error: BaseException) -> Path:
    """File whose statement raised an error."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


if __name__ == "__main__":
    main()
