"""A trained module as a folder to keep, share and load without lightning.

    python -m lightning_modules.export runs/lact_small/version_0/checkpoints/last.ckpt lact

The checkpoint says what it is. The folder holds the weights (adapters without their base), what is
needed to rebuild the model (`export.json`), the run's `config.yaml`, and `README.md`, a model card
with the snippet that loads it.
"""

from __future__ import annotations

from pathlib import Path

from lightning_modules.export.card import Card
from lightning_modules.export.module import rebuild
from lightning_modules.export.run import Origin
from lightning_modules.export.weights import save_weights
from lightning_modules.models.checkpoint_file import read_checkpoint
from lightning_modules.models.export_files import write_about
from lightning_modules.models.folders import check_new, new_folder

__all__ = ["export"]


def export(checkpoint: str | Path, folder: str | Path, pretrained: str | None = None) -> Path:
    """Write the export of a checkpoint; the folder appears at once, when all is in it.

    Args:
        checkpoint: file that training wrote.
        folder: new or empty.
        pretrained: where the pretrained weights lie now, if they have moved since training.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: there is no such file.
        FileExistsError: there is something in the folder.
        ValueError: it is not the checkpoint of one of this package's modules, its pretrained
            weights are not there, or nothing of it was trained.
    """
    source, target = Path(checkpoint), Path(folder)
    check_new(target, "the export")
    content = read_checkpoint(source)
    module = rebuild(content, pretrained)
    origin = Origin.of(source, content)
    with new_folder(target, "the export") as part:
        about = {"variant": type(module).__name__, **save_weights(module, part)}
        write_about(part, about)
        tokenizer = origin.copy_into(part)
        card = Card(target.resolve().name, module, about, origin, tokenizer)
        (part / "README.md").write_text(card.text(), encoding="utf-8")
    return target
