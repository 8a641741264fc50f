"""What pi0's vision-language model reads: cameras and instructions as pixels and tokens.

Pictures are resized here, on the device of the model, and not in the DataModule: the DataModule
stays free of models, worker processes hand on the pictures as they were recorded (one byte per
value), and training, prediction and a policy in the loop share this one path. Instructions are
tokenised once each; a step only looks them up.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, ByT5Tokenizer, PI0Config, PI0Processor
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    PILImageResampling,
)

if TYPE_CHECKING:
    from lightning_modules.models.pi0_options import PI0Options

PROMPT_LENGTH = 48
"""Tokens of an instruction, padded, as pi0 was trained."""


class PillowImageProcessor(PilBackend):
    """transformers' `PI0ImageProcessor` on its Pillow backend, for where torchvision is missing."""

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_pad = True


class PrefixInputs(NamedTuple):
    """Keywords of transformers' `PI0Model.embed_prefix`.

    Attributes:
        input_ids: one placeholder per image token, then the instruction, then padding, `[B, L]`.
        attention_mask: 1 where it is not padding, `[B, L]`.
        pixel_values: `[B, cameras, 3, side, side]`.
        pixel_attention_mask: cameras that are there, bool `[B, cameras]`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    pixel_attention_mask: Tensor


class PI0Inputs(nn.Module):
    """Observations to `PrefixInputs`, with the official image processor and tokenizer.

    Args:
        processor: transformers' processor of the model.
        vocab_size: of the vision-language model.
        image_keys: cameras, in the order in which the model sees them.
        tasks: task index -> instruction.

    Raises:
        ValueError: an instruction is too long, or has tokens that the model does not know.
    """

    def __init__(
        self,
        processor: PI0Processor,
        vocab_size: int,
        image_keys: Sequence[str],
        tasks: Mapping[int, str],
    ) -> None:
        super().__init__()
        self.processor, self.vocab_size = processor, vocab_size
        self.image_keys, self.tasks = tuple(image_keys), dict(tasks)
        self.side = int(processor.image_processor.pad_size["height"])
        table = torch.zeros(max(tasks) + 1, PROMPT_LENGTH, dtype=torch.long)
        lengths = torch.zeros(max(tasks) + 1, dtype=torch.long)
        for index, text in tasks.items():
            tokens = self.tokens(text)
            table[index, : len(tokens)] = torch.tensor(tokens)
            lengths[index] = len(tokens)
        self.register_buffer("prompts", table, persistent=False)
        self.register_buffer("lengths", lengths, persistent=False)

    def tokens(self, text: str) -> list[int]:
        """Ids of `<bos>instruction\\n`, as they stand behind image tokens."""
        tokenizer = self.processor.tokenizer
        prompt = f"{self.processor.image_token}{tokenizer.bos_token}{text}\n"
        first, *ids = tokenizer(prompt)["input_ids"]
        if first != self.processor.image_token_id:
            raise ValueError(
                f"the tokenizer puts token {first} before the pictures, pi0 reads nothing there: "
                "switch off what adds it (add_bos_token), or name the model's own tokenizer as "
                "pi0.processor"
            )
        if len(ids) > PROMPT_LENGTH:
            raise ValueError(
                f"the instruction {text!r} has {len(ids)} tokens, pi0 reads {PROMPT_LENGTH}: "
                "shorten it in meta/tasks.parquet"
            )
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"the instruction {text!r} has token {max(ids)}, but the model knows "
                f"{self.vocab_size}: use the tokenizer of this model (pi0.processor)"
            )
        return ids

    def forward(self, observation: Mapping[str, Any], rows: int) -> PrefixInputs:
        """Inputs of the vision-language model.

        Args:
            observation: pictures `[B, 3, H, W]` by camera, uint8 or floating in [0, 1]; a camera
                that is absent, or where `<camera>_is_pad [B]` is true, is not seen. `task` is the
                task index `[B]`, one text, or a list of B texts.
            rows: B.

        Raises:
            ValueError: no camera at all, a picture of another shape, or no instruction.
        """
        pixel_values, present = self._pictures(observation, rows)
        prompts, lengths = self._instructions(observation.get("task"), rows)
        tokens_per_image = self.processor.image_seq_length
        total = len(self.image_keys) * tokens_per_image + PROMPT_LENGTH
        # Position in the instruction; negative while image tokens come.
        offset = torch.arange(total, device=prompts.device) - (
            present.sum(1, keepdim=True) * tokens_per_image
        )
        text = prompts.gather(1, offset.clamp(0, PROMPT_LENGTH - 1))
        seen = offset < lengths[:, None]
        text = torch.where(seen, text, self.processor.tokenizer.pad_token_id)
        input_ids = torch.where(offset < 0, self.processor.image_token_id, text)
        return PrefixInputs(input_ids, seen.long(), pixel_values, present)

    def _pictures(self, observation: Mapping[str, Any], rows: int) -> tuple[Tensor, Tensor]:
        """Pixels `[B, cameras, 3, side, side]` and which cameras are there `[B, cameras]`."""
        device = self.prompts.device
        if not any(key in observation for key in self.image_keys):
            raise ValueError(
                "the observation has no picture: give at least one of "
                f"{', '.join(self.image_keys)}, [3, height, width]"
            )
        pixels, present = [], []
        for key in self.image_keys:
            if key in observation:
                pixels.append(self._pixels(key, observation[key], rows).to(device))
                missing = observation.get(f"{key}_is_pad")
                there = torch.ones(rows, dtype=torch.bool, device=device)
                present.append(there if missing is None else ~missing.to(device))
            else:
                pixels.append(torch.zeros(rows, 3, self.side, self.side, device=device))
                present.append(torch.zeros(rows, dtype=torch.bool, device=device))
        return torch.stack(pixels, dim=1), torch.stack(present, dim=1)

    def _pixels(self, key: str, pictures: Tensor, rows: int) -> Tensor:
        """Resized, padded and normalised pictures of one camera, `[B, 3, side, side]`."""
        if pictures.dim() != 4 or pictures.shape[:2] != (rows, 3):
            raise ValueError(
                f"{key} has shape {tuple(pictures.shape)}; expected [{rows}, 3, height, width]"
            )
        if pictures.is_floating_point():
            pictures = (pictures * 255).round().clamp(0, 255).to(torch.uint8)
        processor = self.processor.image_processor
        on_host = processor.backend == "pil"
        pictures = pictures.cpu() if on_host else pictures.to(self.prompts.device)
        return processor(list(pictures), return_tensors="pt")["pixel_values"]

    def _instructions(self, task: Any, rows: int) -> tuple[Tensor, Tensor]:
        """Tokens `[B, 48]` and their number `[B]`."""
        if isinstance(task, Tensor):
            return self.prompts[task], self.lengths[task]
        if task is None:
            if len(self.tasks) != 1:
                raise ValueError(
                    f"the observation has no 'task', but the policy knows {len(self.tasks)}: give "
                    f"one in words, e.g. {next(iter(self.tasks.values()))!r}"
                )
            task = next(iter(self.tasks.values()))
        texts = [task] * rows if isinstance(task, str) else list(task)
        if len(texts) != rows:
            raise ValueError(f"{len(texts)} instructions for {rows} observations: give one each")
        tokens = [self.tokens(text) for text in texts]
        padded = [ids + [0] * (PROMPT_LENGTH - len(ids)) for ids in tokens]
        lengths = torch.tensor([len(ids) for ids in tokens])
        return torch.tensor(padded).to(self.prompts.device), lengths.to(self.prompts.device)


def load_processor(options: PI0Options, config: PI0Config) -> PI0Processor:
    """transformers' processor for a model.

    Pictures are scaled to the size of the model's vision tower. A model with random weights reads
    bytes; its `image_token_id` is set to the byte tokenizer's.

    Raises:
        ValueError: there is no tokenizer, or it is not the model's.
    """
    source = options.processor or options.pretrained
    vlm = config.vlm_config
    processor = PI0Processor(_image_processor(vlm.vision_config), _tokenizer(source))
    if source is None:
        vlm.image_token_id = processor.image_token_id
    if processor.image_token_id != vlm.image_token_id:
        raise ValueError(
            f"the tokenizer of {source!r} gives <image> the id {processor.image_token_id}, the "
            f"model expects {vlm.image_token_id}: name the model's own tokenizer as pi0.processor"
        )
    return processor


def _image_processor(vision: Any) -> Any:
    settings = {
        "size": {"max_height": vision.image_size, "max_width": vision.image_size},
        "pad_size": {"height": vision.image_size, "width": vision.image_size},
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
    }
    try:
        from transformers import PI0ImageProcessor

        return PI0ImageProcessor(**settings)
    except ImportError:  # no torchvision
        if torch.cuda.is_available():
            warnings.warn(
                "torchvision is not installed, so pictures are resized on the CPU, which is slow: "
                "pip install '.[pi0]'",
                stacklevel=2,
            )
        return PillowImageProcessor(**settings)


def _tokenizer(source: str | None) -> Any:
    if source is None:
        return ByT5Tokenizer(extra_ids=0, bos_token="<bos>")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # missing files raise half a dozen types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no tokenizer in {source!r} ({reason}): name a folder or hub id that has one as "
            "pi0.processor, e.g. google/paligemma-3b-pt-224"
        ) from error
    if tokenizer.bos_token is None or tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {source!r} has no begin-of-sentence or no padding token: name the "
            "model's own tokenizer as pi0.processor"
        )
    return tokenizer
