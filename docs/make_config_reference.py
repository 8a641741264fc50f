"""Write docs/config_reference.md: every key that a config file of this repository can have.

    python docs/make_config_reference.py

The text is the docstrings, which `--help` shows, too; after changing one, run this again.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jsonargparse
from jsonargparse._parameter_resolvers import get_signature_parameters

import callbacks
import datamodules
import lightning_modules
from lightning_modules.adapters.registry import registered_adapters
from lightning_modules.config_parser import describe_type
from lightning_modules.layers.lact_options import (
    LaCTAttentionConfig,
    LaCTFeatureConfig,
    LaCTMemoryConfig,
    LaCTUpdateConfig,
)
from lightning_modules.models.lact_config import LaCTConfig

TARGET = Path(__file__).with_name("config_reference.md")
HEAD = """\
# Every key of a config file

Written by `python docs/make_config_reference.py` from the docstrings; do not edit it. What the
command line says of a class: `python cli.py fit --model.help NAME` (also `--data.help`,
`--trainer.callbacks.help`). Keys of the trainer, of Lightning's own callbacks and of the optimizer:
`python cli.py fit --help` and `python cli.py fit --model.optimizer.help AdamW`.
"""
LACT = (LaCTConfig, LaCTAttentionConfig, LaCTMemoryConfig, LaCTFeatureConfig, LaCTUpdateConfig)
LACT_NOTE = (
    "Keys of `model.init_args.config` of `LaCTModule`: those of `LaCTConfig` and of the four "
    "classes behind it, side by side."
)
ADAPTER_NOTE = (
    "Under `adapters:` a line names an `adapter_type`; its `adapter_config` has the keys of: "
)


class Section(NamedTuple):
    """A heading, what is said below it, and its classes."""

    title: str
    note: str
    classes: list[type]


def sections() -> list[Section]:
    """What a config can name, then the options inside them; every class once."""
    models = _public(lightning_modules)
    data = [c for c in _public(datamodules) if c is not datamodules.StreamDataModule]
    adapters = {
        name: entry.config_class
        for name, entry in registered_adapters().items()
        if entry.adapter_class.__module__.startswith("lightning_modules.")  # not one of others
    }
    named = ", ".join(f"`{name}` {_link(adapters[name])}" for name in sorted(adapters))
    first = [*models, *data, *_public(callbacks), *LACT, *adapters.values()]
    inside = [c for c in _reachable(first) if c not in first]
    return [
        Section("Models", "`model: {class_path: NAME, init_args: {...}}`", models),
        Section("Options inside them", "Mappings, below the key that names the class.", inside),
        Section("Adapters", ADAPTER_NOTE + named + ".", sorted({*adapters.values()}, key=_name)),
        Section("LaCT", LACT_NOTE, list(LACT)),
        Section("Data", "`data: {class_path: NAME, init_args: {...}}`", data),
        Section("Callbacks", "Lines of `trainer.callbacks`.", _public(callbacks)),
    ]


def reference() -> str:
    """The whole file."""
    parts = [HEAD]
    for title, note, classes in sections():
        parts.append(f"## {title}\n\n{note}\n")
        parts.extend(table(c) for c in classes)
    return "\n".join(parts)


def table(config_class: type) -> str:
    """A class: what it is, and a line per key, required ones first."""
    lines = [f"### {config_class.__name__}\n", f"{_first_sentence(config_class)}\n"]
    rows = sorted(_keys(config_class), key=lambda p: (p.default is not inspect._empty, p.name))
    if not rows:
        return "\n".join([*lines, "No keys.\n"])
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.name}`", _type(row.annotation), _default(row.default), _text(row.doc))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _public(package: Any) -> list[type]:
    return sorted((getattr(package, name) for name in package.__all__), key=_name)


def _name(config_class: type) -> str:
    return config_class.__name__


def _keys(config_class: type) -> list[Any]:
    """Parameters with type, default and text; of transformers' base class none."""
    rows = get_signature_parameters(config_class)
    if config_class is LaCTConfig:
        rows = [row for row in rows if row.doc and row.name in config_class.__doc__]
    return rows


def _reachable(classes: Iterable[type]) -> list[type]:
    """Dataclasses in the types of their keys, in the keys of those, and so on, by name."""
    found: set[type] = set()
    queue = list(classes)
    while queue:
        for row in _keys(queue.pop()):
            new = {t for t in _leaves(row.annotation) if dataclasses.is_dataclass(t)} - found
            found |= new
            queue.extend(new)
    return sorted(found, key=_name)


def _leaves(hint: Any) -> list[Any]:
    inner = [leaf for part in get_args(hint) for leaf in _leaves(part)]
    return inner or [hint]


def _type(hint: Any) -> str:
    """The type, where classes of this file are links to their tables."""
    text = describe_type(hint).replace("NoneType", "null").replace("None", "null")
    if "Optimizer" in text:
        return "an optimizer's class"
    classes = [t for t in _leaves(hint) if dataclasses.is_dataclass(t)]
    text = f"`{text}`"
    for c in classes:
        text = text.replace(c.__name__, f"`{_link(c)}`")
    return text.replace("``", "")


def _link(config_class: type) -> str:
    return f"[{config_class.__name__}](#{config_class.__name__.lower()})"


def _default(value: Any) -> str:
    if value is inspect._empty:
        return "**required**"
    if value is None:
        return "`null`"
    if dataclasses.is_dataclass(value) or isinstance(value, jsonargparse.Namespace):
        return "its defaults"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`"


def _text(doc: str | None) -> str:
    return " ".join((doc or "").split())


def _first_sentence(config_class: type) -> str:
    return _text((config_class.__doc__ or "").split("\n\n")[0])


def main() -> None:
    """Replace the file."""
    partial = TARGET.with_suffix(".partial")
    partial.write_text(reference())
    partial.replace(TARGET)


if __name__ == "__main__":
    main()
