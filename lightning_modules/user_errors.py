"""Which errors are answers to wrong input, and what they say: a line that names cause and fix."""

from __future__ import annotations

import pickle
import re
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_ELSEWHERE: list[tuple[type[BaseException], str, str]] = [
    (
        Exception,
        r"No supported gpu backend found",
        "trainer.accelerator=gpu, but torch finds no GPU here: use --trainer.accelerator auto "
        "(or cpu), or install a torch that fits the driver",
    ),
    (
        pickle.UnpicklingError,
        r"(?:Weights only load failed|invalid load key|pickle data was truncated)",
        "the file that --ckpt_path names is no checkpoint, damaged, or has more in it than "
        "tensors and plain values: use one that `python cli.py fit` wrote",
    ),
    (
        RuntimeError,
        r"PytorchStreamReader failed",
        "the checkpoint that --ckpt_path names is damaged or not complete: use another one",
    ),
    (
        RuntimeError,
        r"Error\(s\) in loading state_dict for \w+:\s*"
        r"(?P<first>\w+ key\(s\) in state_dict: \"[^\"]*\"|[^\n]*?(?=[:.]*(?: copying|\n|$)))",
        "the checkpoint does not fit the model ({first}): give the config.yaml of the run that "
        "wrote it (--config RUN/config.yaml), or train anew",
    ),
    (
        ValueError,
        r"(?P<seed>-?\d+) is not in bounds, numpy accepts from 0 to (?P<most>\d+)",
        "seed_everything={seed} must lie between 0 and {most}",
    ),
    (
        UserWarning,
        r"\.(?P<command>\w+)\(ckpt_path=\"last\"\) is set, but there is no last checkpoint",
        "--ckpt_path last finds no checkpoint, since {command} has a run folder of its own: give "
        "the file, e.g. --ckpt_path runs/NAME/version_0/checkpoints/last.ckpt",
    ),
    (
        IsADirectoryError,
        r".*: '?(?P<name>[^']*)'?$",
        "{name} is a folder: name the file, e.g. {name}/last.ckpt",
    ),
]
"""Errors of libraries that say no fix: type, pattern of the message, what is said instead."""


class Answer(NamedTuple):
    """What to print, and the line that raised it."""

    message: str
    place: str


def answer(error: Exception) -> Answer | None:
    """The answer to wrong input; None for a bug, whose traceback is needed."""
    caught = root_of(error)
    for kind, pattern, text in _ELSEWHERE:
        found = re.search(pattern, str(caught)) if isinstance(caught, kind) else None
        if found is not None:
            return Answer(text.format(found[0], **found.groupdict()), _line(caught))
    if not _is_on_purpose(caught):
        return None
    message = caught.args[0] if isinstance(caught, KeyError) else caught
    return Answer(" ".join(str(message).split()), _line(caught))


def root_of(error: Exception) -> BaseException:
    """What a constructor raised; the parser wraps it once per member of a union."""
    import jsonargparse

    parser = Path(jsonargparse.__file__).parent
    root: BaseException = error
    while root.__cause__ is not None and _place(root).is_relative_to(parser):
        root = root.__cause__
    return error if _place(root).is_relative_to(parser) else root


def _is_on_purpose(error: BaseException) -> bool:
    """Whether a `raise` of this project, Lightning's trainer or an optimizer rejects input.

    Such messages name the cause and the fix; a traceback would only bury them.
    """
    import lightning.pytorch.trainer as trainer
    import torch.optim as optim
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    folders = [ROOT / name for name in ("lightning_modules", "datamodules", "callbacks")]
    folders += [Path(str(package.__file__)).parent for package in (trainer, optim)]
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return isinstance(error, MisconfigurationException | FileNotFoundError) or (
        line.startswith("raise ") and any(_place(error).is_relative_to(f) for f in folders)
    )


def _place(error: BaseException) -> Path:
    """File whose statement raised an error."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


def _line(error: BaseException) -> str:
    return f"{_place(error)}:{traceback.extract_tb(error.__traceback__)[-1].lineno}"
