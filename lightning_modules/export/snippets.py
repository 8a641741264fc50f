"""How an export is loaded, as code that runs as it stands beside the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

BYTES, CODES = ("bytes",), ("audio_codes", "mqar", "fused", "needle")
"""Tokenizers that are none of transformers': text by its bytes, and tokens that are no text."""

MODULE = "lightning_modules"


def loading(about: Mapping[str, Any], features: Mapping[str, Any], tokenizer: bool) -> str:
    """Python that loads the export in the current folder and uses it.

    Args:
        about: content of `export.json`.
        features: of the data.
        tokenizer: whether the export holds one.
    """
    if about["layout"] == "expert":
        return _policy(features)
    text = _text(features, tokenizer)
    return f"""\
import torch
{text.imports}from {MODULE}.generation import FastStateCache
from {MODULE}.models.exported import load_language_model

model = load_language_model(".")  # the folder of this file
{text.setup}tokens = {text.prompt}
cache = FastStateCache(model.config)  # what the model learns while it reads lives here
out = model.generate(torch.tensor([tokens]), past_key_values=cache, max_new_tokens=40)
print({text.shown})
"""


def without_us(about: Mapping[str, Any]) -> str | None:
    """Python that loads the same weights with the library whose layout they have, if any."""
    base = about.get("base")
    if about["layout"] == "model" and about["variant"] != "LaCTModule":
        return (
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")\n'
        )
    if about["layout"] == "model":
        return (
            f"from {MODULE}.models.lact import LaCTForCausalLM\n\n"
            'model = LaCTForCausalLM.from_pretrained(".")\n'
        )
    if about["layout"] != "peft":
        return None
    method = "" if about["adapter"] == "default" else f"\nimport {MODULE}.adapters.ttt_lora\n"
    files = "" if base["gguf_file"] is None else f', gguf_file="{base["gguf_file"]}"'
    return f"""\
from peft import PeftModel
from transformers import AutoModelForCausalLM
{method}
base = AutoModelForCausalLM.from_pretrained("{base["name"]}", dtype="{base["dtype"]}"{files})
model = PeftModel.from_pretrained(base, ".").eval()
"""


class _Text(NamedTuple):
    """Parts of a snippet: lines, the tokens of a prompt, and what is printed of the answer."""

    prompt: str
    shown: str
    imports: str = ""
    setup: str = ""


def _text(features: Mapping[str, Any], tokenizer: bool) -> _Text:
    kind, begin = features.get("tokenizer"), features.get("bos_id")
    first = "" if begin is None else f"{begin}, "
    if kind in BYTES:
        shown = 'bytes(i for i in out[0].tolist() if i < 256).decode(errors="replace")'
        return _Text(f'[{first}*"The ".encode()]', shown)
    if kind is None or kind in CODES or (kind == "bpe" and not tokenizer):
        return _Text(f"[{first}1, 2, 3]", "out")
    where = "." if tokenizer else kind
    prompt = f'[{first}*tokenizer.encode("The ", add_special_tokens=False)]'
    if features["mode"] == "chat":
        turns = '[{"role": "user", "content": "Hello!"}]'
        call = f"tokenizer.apply_chat_template({turns}, add_generation_prompt=True)"
        prompt = f'{call}["input_ids"]'
    return _Text(
        prompt,
        "tokenizer.decode(out[0])",
        "from transformers import AutoTokenizer\n\n",
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")\n',
    )


def _policy(features: Mapping[str, Any]) -> str:
    size = features["state_dim"]
    observation = f"torch.zeros({size})"
    if features["image_keys"]:
        entries = [f'"observation.state": torch.zeros({size})']
        entries += [f'"{key}": torch.zeros(3, 224, 224)' for key in features["image_keys"]]
        entries += [f'"task": {next(iter(features["tasks"].values()))!r}']
        observation = "{" + ", ".join(entries) + "}"
    return f"""\
import torch
from {MODULE}.policy import ActionExpertPolicy

policy = ActionExpertPolicy.from_export(".")  # the folder of this file
policy.reset()  # and whenever an episode begins
observation = {observation}  # in the units of the training data
print(policy.select_action(observation))
"""
