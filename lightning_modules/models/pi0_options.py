"""Options of the `pi0` backbone, and what they say about configuration files and data."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from lightning_modules.models.projection_lora import ProjectionLoRA

if TYPE_CHECKING:
    from transformers import PI0Config

    from lightning_modules.models.pi0 import PI0Expert

Trained = Literal["added", "lora", "expert", "all"]


@dataclass(frozen=True)
class PI0Options:
    """Which pi0 model, and what of it is trained.

    Args:
        pretrained: hub id or folder with a pi0 model, as transformers or lerobot stores it.
        config: instead of `pretrained`, entries of transformers' `PI0Config` for a model with
            random weights ({} is the size of pi0_base). Text is then read as bytes.
        processor: hub id or folder with the tokenizer and the image processor; None takes
            `pretrained`.
        train: `added` trains what is added alone (TTT, and the modulation of `adarms`), `lora`
            also low-rank updates of the expert, `expert` also the expert, `all` also the
            vision-language model.
        adarms: add pi0.5's timestep modulation to every norm of the expert. It starts as the
            norms of the pretrained model, so nothing changes before the first step.
        lora: size and place of the LoRA of `train: lora`.
        gradient_checkpointing: recompute layers in backward instead of keeping them.
        vlm_dtype: precision in which a frozen vision-language model is kept.

    Raises:
        ValueError: not exactly one of `pretrained` and `config`, or options that exclude another.
    """

    pretrained: str | None = None
    config: dict[str, Any] | None = None
    processor: str | None = None
    train: Trained = "expert"
    adarms: bool = False
    lora: ProjectionLoRA = field(default_factory=ProjectionLoRA)
    gradient_checkpointing: bool = False
    vlm_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError(
                "backbone pi0 needs either pi0.pretrained (a hub id or a folder, e.g. "
                "lerobot/pi0_base) or pi0.config (random weights)"
            )
        if self.train not in get_args(Trained):
            raise ValueError(f"pi0.train={self.train!r}: choose one of {get_args(Trained)}")
        if self.vlm_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"pi0.vlm_dtype={self.vlm_dtype!r}: choose float32 or bfloat16")
        if self.train == "all" and self.vlm_dtype != "float32":
            raise ValueError(
                "pi0.train=all trains the vision-language model, whose updates are lost in "
                f"{self.vlm_dtype}: set pi0.vlm_dtype to float32"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the action expert."""
        return int(self.read_config().dit_config.num_hidden_layers)

    def read_config(self) -> PI0Config:
        """transformers' configuration of the model.

        Raises:
            ValueError: `pretrained` cannot be read or is no pi0 model, or the expert's layers
                cannot attend to those of the vision-language model.
        """
        from transformers import PI0Config

        if self.pretrained is None:
            config = PI0Config(**deepcopy(self.config or {}))
        else:
            config = _pretrained_config(self.pretrained)
        vlm, dit = config.vlm_config.text_config, config.dit_config
        for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
            if getattr(vlm, name) != getattr(dit, name):
                raise ValueError(
                    f"the expert attends to the keys of the vision-language model layer by layer, "
                    f"so {name} must agree: {getattr(dit, name)} in dit_config, "
                    f"{getattr(vlm, name)} in vlm_config.text_config"
                )
        return config

    def check(self, features: Mapping[str, Any]) -> None:
        """Compare the data with the model, and make sure that there are tokenizer and cameras.

        Raises:
            ValueError: the data does not fit, or `processor` lacks something.
        """
        try:
            from lightning_modules.models.pi0_inputs import load_processor
        except (
            RuntimeError
        ) as error:  # transformers imports torchvision, which asks for its kernels
            raise ValueError(
                f"transformers cannot be imported ({_first_line(error)}); if that is torchvision, "
                "it was built for another torch: install the build that fits, or uninstall it"
            ) from error
        config = self.read_config()
        _check_sizes(config, features)
        if not features["image_keys"]:
            raise ValueError(
                "backbone pi0 looks through cameras, but the data has none: set image_keys of the "
                "DataModule, e.g. [observation.images.top], or use backbone: state"
            )
        if not features.get("tasks"):
            raise ValueError(
                "backbone pi0 reads the instruction of every episode, but the data has none: "
                "record it with meta/tasks.parquet"
            )
        load_processor(self, config)

    def build(self, features: Mapping[str, Any]) -> PI0Expert:
        """The model for the data's cameras and instructions."""
        from lightning_modules.models.pi0 import PI0Expert

        return PI0Expert(self, features)

    @classmethod
    def restore(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`."""
        lora = {**stored["lora"], "targets": tuple(stored["lora"]["targets"])}
        return cls(**{**stored, "lora": ProjectionLoRA(**lora)})


def _pretrained_config(pretrained: str) -> PI0Config:
    from transformers import PI0Config

    try:
        stored, _ = PI0Config.get_config_dict(pretrained)
        if not stored:
            raise OSError("the folder has none")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pi0.pretrained={pretrained!r} has no readable config.json ({_first_line(error)}): "
            "give a hub id such as lerobot/pi0_base, or a folder that save_pretrained wrote"
        ) from error
    kind = stored.get("model_type", stored.get("type"))  # transformers', or lerobot's own file
    if kind != "pi0":
        raise ValueError(
            f"pi0.pretrained={pretrained!r} is a {kind!r} model, not 'pi0': give a pi0 model such "
            "as lerobot/pi0_base"
        )
    known = {option.name for option in fields(PI0Config)}
    return PI0Config(**{name: value for name, value in stored.items() if name in known})


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_sizes(config: PI0Config, features: Mapping[str, Any]) -> None:
    if features["horizon"] != config.chunk_size:
        raise ValueError(
            f"pi0 predicts chunks of {config.chunk_size} actions (chunk_size), but the data's "
            f"horizon is {features['horizon']}: set the DataModule's horizon to {config.chunk_size}"
        )
    for name, limit in (
        ("state_dim", config.max_state_dim),
        ("action_dim", config.max_action_dim),
    ):
        if features[name] > limit:
            raise ValueError(
                f"the data has {name}={features[name]}, but this pi0 takes at most {limit} "
                f"(max_{name}): choose fewer dimensions, or a model with a larger max_{name}"
            )
