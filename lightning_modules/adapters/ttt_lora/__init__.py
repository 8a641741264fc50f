"""TTT-as-LoRA as a method of peft: importing this registers it.

`get_peft_model(model, TTTLoraConfig(...))`, `PeftModel.from_pretrained`, `save_pretrained`, named
adapters, `disable_adapter` and the rest of peft's interface work as for LoRA.
"""

from lightning_modules.adapters.ttt_lora.config import TTTLoraConfig
from lightning_modules.adapters.ttt_lora.layer import TTTLoraLayer, TTTLoraLinear
from lightning_modules.adapters.ttt_lora.model import TTTLoraModel
from lightning_modules.adapters.ttt_lora.register import register

register()

__all__ = ["TTTLoraConfig", "TTTLoraLayer", "TTTLoraLinear", "TTTLoraModel"]
