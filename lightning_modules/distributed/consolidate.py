"""A checkpoint folder as one ordinary file.

    python -m lightning_modules.distributed.consolidate last.ckpt last_file.ckpt

`--ckpt_path`, `load_from_checkpoint` and `TTTLoRAModule.save_adapters` read the file, in any
number of processes. (`lightning.pytorch.utilities.consolidate_checkpoint` of Lightning 2.6.6 reads
the folders of its older FSDPStrategy only: it looks for the weights under another name.)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from lightning_modules.distributed.checkpoint_folder import check_complete


def consolidate(folder: str | Path, file: str | Path) -> Path:
    """Write one file with all that a checkpoint folder holds; it appears at once.

    Args:
        folder: that a run with `strategy: fsdp2` saved. It must fit into memory.
        file: new, or to be replaced.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it was not written to its end, or is a file already.
    """
    source, target = Path(folder), Path(file)
    check_complete(source)
    if source.is_file():
        raise ValueError(f"{source} is one file already: use it as it is")
    checkpoint = _load_distributed_checkpoint(source)
    states: list[dict[str, Any]] = []
    while (key := f"optimizer_{len(states)}") in checkpoint:
        states.append(_numbered(checkpoint.pop(key)))
    checkpoint["optimizer_states"] = states
    part = target.with_name(f".{target.name}.part")
    torch.save(checkpoint, part)
    os.replace(part, target)
    return target


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """State of an optimizer by the numbers of its parameters, as torch's optimizers have it."""
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        numbers |= {name: len(numbers) + place for place, name in enumerate(group["params"])}
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    values = {numbers[name]: entry for name, entry in state["state"].items()}
    return {"state": dict(sorted(values.items())), "param_groups": groups}


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    print(consolidate(options.folder, options.file))


if __name__ == "__main__":
    main()
