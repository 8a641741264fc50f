"""The model card beside an export: what it is, from which data, how good, and how to load it."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_modules.export.run import CONFIG, Origin
from lightning_modules.export.snippets import BYTES, loading, without_us
from lightning_modules.sized import SizedModule

PACKAGES = ("fast-weights", "torch", "transformers", "peft", "safetensors")
KINDS = {
    "ActionExpertModule": "A flow-matching policy: an action expert whose attention layers may be "
    "followed by layers that learn while an episode runs (test-time training).",
    "LaCTModule": "A causal language model with LaCT: a memory that is written once per large "
    "chunk while a text is read, beside attention.",
    "MemoryBankModule": "A causal language model whose layers may read a learned bank of rows, "
    "chapter by chapter.",
    "TTTLoRAModule": "A causal language model, or its adapters: TTT-LoRA or In-Place TTT, which "
    "learn while a text is read, or LoRA.",
}
FILES = {
    "expert": "`model.safetensors` (weights, without frozen pretrained ones), `export.json` "
    "(options, features, normalisation)",
    "model": "`config.json`, `model.safetensors`, `generation_config.json` of `save_pretrained`",
    "attention": "`adapters.safetensors`, `export.json` (which layers have which adapter)",
    "memory": "`memory.safetensors`, `memory.json`; with LoRA also peft's two files",
    "peft": "`adapter_model.safetensors`, `adapter_config.json`: peft's own layout",
    "adapters": "`adapters.json` and a folder for each kind of adapter",
}
"""Layout -> what lies in the folder."""


@dataclass(frozen=True)
class Card:
    """Text of `README.md`.

    Args:
        title: of the card.
        module: with its weights.
        about: content of `export.json`.
        origin: of the weights.
        tokenizer: whether the export holds one.
    """

    title: str
    module: SizedModule
    about: Mapping[str, Any]
    origin: Origin
    tokenizer: bool

    def text(self) -> str:
        """Front matter and sections, as Hugging Face's hub reads them."""
        sections = {
            "What it is": self._what(),
            "Load it": self._load(),
            "Parameters": self._parameters(),
            "Data": self._data(),
            "Metrics": self._metrics(),
            "Training": self._training(),
            "Versions": _table(("package", "version"), self._versions()),
        }
        body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
        return f"{self._front_matter()}\n# {self.title}\n\n{body}\n"

    @property
    def _base_name(self) -> str | None:
        """Name of the pretrained model, whether it is exported along or not."""
        options = self.about.get("options", {})
        if self.about["layout"] == "expert":
            return (options.get("pi0") or {}).get("pretrained")
        return None if self.module.pretrained is None else self.module.pretrained.name

    def _front_matter(self) -> str:
        """YAML; values are written as JSON, which YAML contains."""
        layout = self.about["layout"]
        task = "robotics" if layout == "expert" else "text-generation"
        library = {"model": "transformers", "peft": "peft"}.get(layout, "fast-weights")
        entries: dict[str, Any] = {
            "library_name": library,
            "pipeline_tag": task,
            "tags": ["fast-weights", "test-time-training", self.about["variant"]],
        }
        if (name := self._base_name) is not None and _is_hub_id(name):
            entries["base_model"] = name
            owned = self.about.get("base") is None and layout != "expert"
            entries["base_model_relation"] = "finetune" if owned else "adapter"
        lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]
        return "\n".join(("---", *lines, "---", ""))

    def _what(self) -> str:
        lines = [KINDS[self.about["variant"]], ""]
        rows = {"variant": f"`{self.about['variant']}`"}
        for name in ("method", "arm", "ttt_state"):
            if hasattr(self.module, name):
                rows[name] = f"`{getattr(self.module, name)}`"
        rows["base"] = self._base()
        rows["files"] = FILES[self.about["layout"]]
        rows["checkpoint"] = f"`{self.origin.checkpoint}`, step {_or_unknown(self.origin.step)}"
        return "\n".join([*lines, _table(("", ""), rows.items())])

    def _base(self) -> str:
        name, base = self._base_name, self.about.get("base")
        if name is None:
            return "none: trained from scratch, all weights are here"
        if base is not None:
            return f"`{name}`, not in this folder; fingerprint `{base['fingerprint']}`"
        if self.about["layout"] != "expert":
            return f"`{name}`, all of which was trained: its weights are here"
        if (fingerprint := self.about["fingerprint"]) is None:
            return f"`{name}`; all weights are here"
        return f"`{name}`, whose frozen weights are not here; fingerprint `{fingerprint}`"

    def _load(self) -> str:
        layout = self.about["layout"]
        parts = [
            "With torch, transformers"
            + (" and peft" if self._needs_peft else "")
            + " and the package fast-weights (lightning is not needed), in this folder:",
            f"```python\n{self._loading}```",
        ]
        if (other := without_us(self.about)) is not None:
            by = "peft, which does not check the base" if layout == "peft" else "its own class"
            parts += [f"The same model, by {by}:", f"```python\n{other}```"]
        return "\n\n".join(parts)

    @property
    def _needs_peft(self) -> bool:
        layout = self.about["layout"]
        return layout in ("peft", "adapters") or getattr(self.module, "arm", None) == "both"

    @property
    def _loading(self) -> str:
        return loading(self.about, self.module.features, self.tokenizer)

    def _parameters(self) -> str:
        left_out = self.module.left_out_names()
        total: Counter[str] = Counter()
        here: Counter[str] = Counter()
        for name, parameter in self.module.named_parameters():
            group = self.module.parameter_group(name)
            total[group] += parameter.numel()
            here[group] += parameter.numel() * (name not in left_out)
        rows = [(group, f"{total[group]:,}", f"{here[group]:,}") for group in sorted(total)]
        rows.append(("all", f"{total.total():,}", f"{here.total():,}"))
        return _table(("group", "parameters", "in this folder"), rows)

    def _data(self) -> str:
        rows = {name: f"`{value}`" for name, value in self.origin.data.items()}
        rows.pop("tokenizer_folder", None)  # a path of the machine that trained
        for name, value in self.module.features.items():
            rows.setdefault(name, f"`{value}`")
        note = (
            ""
            if self.origin.data
            else "The checkpoint does not hold its source and size; the options below do.\n\n"
        )
        return f"{note}{_table(('', ''), rows.items())}\n\n{self._tokenizer()}"

    def _tokenizer(self) -> str:
        kind = self.module.features.get("tokenizer")
        if self.about["layout"] == "expert":
            return "States and actions are in the units of the data; normalisation is inside."
        if kind in BYTES:
            return "Tokens are the bytes of UTF-8, then bos 256, eos 257 and pad 258."
        if self.tokenizer:
            return "The tokenizer lies in this folder."
        return f"Tokenizer: `{kind}`; it is not in this folder."

    def _metrics(self) -> str:
        if not self.origin.metrics:
            return "Not recorded: no TensorBoard file lies with the checkpoint."
        rows = [
            (f"`{tag}`", f"{metric.value:.6g}", _or_unknown(metric.step), metric.which)
            for tag, metric in sorted(self.origin.metrics.items())
        ]
        return _table(("metric", "value", "step", "which"), rows)

    def _training(self) -> str:
        config = self.origin.config
        if config is None:
            return f"Not recorded: no `{CONFIG}` lies above the checkpoint."
        text = "\n\n".join(filter(None, (_section(config, name) for name in ("model", "data"))))
        return f"All options are in `{CONFIG}`.\n\n```yaml\n{text}\n```"

    def _versions(self) -> Iterable[tuple[str, str]]:
        yield "python", platform.python_version()
        for name in PACKAGES:
            try:
                yield name, version(name)
            except PackageNotFoundError:
                yield name, "not installed as a package"
        yield "lightning (in training)", self.origin.lightning


def _section(config: str, name: str) -> str | None:
    """Lines of a top-level key of a yaml that LightningCLI wrote."""
    found = re.search(rf"^{name}:.*\n(?:[ \-#].*\n|\n)*", config, re.MULTILINE)
    return None if found is None else found.group().rstrip()


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: str) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _or_unknown(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _is_hub_id(name: str) -> bool:
    """Whether a name is that of a model on the hub, not a folder."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()
