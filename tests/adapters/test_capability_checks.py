"""The checks of `capabilities.py` have power: adapters with one mistake each must fail them."""

from typing import Any

import pytest
import torch
from architecture_cases import ADAPTERS, AdapterCase
from capabilities import CAPABILITIES
from torch import Tensor, nn

from lightning_modules.adapters import (
    TTTAdapterConfig,
    TTTAttentionAdapter,
    register_attention_adapter,
)
from lightning_modules.streams import FastState

MISTAKES: dict[str, type[TTTAttentionAdapter]] = {}


def _mistake(adapter_class: type[TTTAttentionAdapter]) -> type[TTTAttentionAdapter]:
    MISTAKES[adapter_class.__name__] = adapter_class
    return register_attention_adapter(f"wrong:{adapter_class.__name__}", TTTAdapterConfig)(
        adapter_class
    )


@_mistake
class AlmostZero(TTTAttentionAdapter):
    """Adds a little where it should add nothing."""

    def delta(self, *args: Any, **context: Any) -> Tensor:
        return super().delta(*args, **context) + 1e-3


@_mistake
class Idle(TTTAttentionAdapter):
    """Has a parameter that nothing uses."""

    def __init__(self, base_attention: nn.Module, config: TTTAdapterConfig) -> None:
        super().__init__(base_attention, config)
        self.idle = nn.Parameter(torch.zeros(1))


@_mistake
class Forgetful(TTTAttentionAdapter):
    """Starts every call afresh."""

    def _learn(self, x: Tensor, fast_state: Any, tokens: dict[str, Any]) -> Tensor:
        out, state = self.ttt(x, **tokens)
        if fast_state is not None:
            fast_state.write(self.slot, state)
        return out


@_mistake
class CurrentState(TTTAttentionAdapter):
    """Keeps the state of the last chunk on the module instead of in the handle."""

    current: Any = None

    def _learn(self, x: Tensor, fast_state: FastState | None, tokens: dict[str, Any]) -> Tensor:
        out, self.current = self.ttt(x, state=self.current, **tokens)
        return out


@_mistake
class Waits(TTTAttentionAdapter):
    """Reads a number from the device."""

    def delta(self, *args: Any, **context: Any) -> Tensor:
        added = super().delta(*args, **context)
        return added * 1.0 if added.sum().item() > 0 else added


@_mistake
class TouchesTheBase(TTTAttentionAdapter):
    """Changes a weight that is not its own."""

    def __init__(self, base_attention: nn.Module, config: TTTAdapterConfig) -> None:
        super().__init__(base_attention, config)
        with torch.no_grad():
            base_attention.q_proj.weight.mul_(1.01)


@_mistake
class TrainedOnly(TTTAttentionAdapter):
    """Does less where no gradient is wanted, so that sampling is not what was trained."""

    def delta(self, *args: Any, **context: Any) -> Tensor:
        added = super().delta(*args, **context)
        return added if torch.is_grad_enabled() else 0.9 * added


COMPILES = pytest.param("Waits", "compile", marks=pytest.mark.slow)
WRONG: dict[str, list[Any]] = {
    "llama": [
        ("AlmostZero", "zero gate"),
        ("AlmostZero", "bf16"),
        ("AlmostZero", "sdpa and eager"),
        ("Idle", "train"),
        ("Forgetful", "generate"),
        ("CurrentState", "checkpointing"),
        COMPILES,
        ("TouchesTheBase", "save base"),
    ],
}
WRONG["pi0"] = [
    ("TrainedOnly", "generate") if case == ("Forgetful", "generate") else case
    for case in WRONG["llama"]  # every call of the sampler is fresh: nothing to forget
]


def rows(architecture: str) -> list[tuple[str, str]]:
    return [tuple(getattr(case, "values", case)) for case in WRONG[architecture]]


def check_fails(architecture: str, mistake: str, capability: str) -> None:
    case: AdapterCase = ADAPTERS["ttt"]._replace(adapter_type=f"wrong:{mistake}")
    with pytest.raises((AssertionError, RuntimeError)):
        CAPABILITIES[capability](architecture, case)


@pytest.mark.parametrize(("mistake", "capability"), WRONG["llama"])
def test_wrong_variant_fails_the_check(mistake: str, capability: str) -> None:
    check_fails("llama", mistake, capability)


@pytest.mark.parametrize(("mistake", "capability"), WRONG["pi0"])
def test_wrong_variant_fails_the_check_of_pi0(mistake: str, capability: str) -> None:
    check_fails("pi0", mistake, capability)


def test_every_check_has_a_wrong_variant() -> None:
    for architecture in WRONG:
        assert {capability for _, capability in rows(architecture)} == set(CAPABILITIES)
    assert {mistake for name in WRONG for mistake, _ in rows(name)} == set(MISTAKES)
