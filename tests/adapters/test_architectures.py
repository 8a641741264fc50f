"""Every adapter in every architecture, against the base model, the eager run, the full pass."""

import pytest
import torch
from architecture_cases import ADAPTERS, adapted_model
from capabilities import CAPABILITIES, MODELS, losses_and_gradients, models_of

EAGER = [name for name in CAPABILITIES if name != "compile"]


ROWS = [
    pytest.param(model, name, marks=[] if model == "gemma3" or name == "ttt" else pytest.mark.slow)
    for name, case in ADAPTERS.items()
    for model in models_of(case)
]
"""Every architecture once, every adapter once; the others are left to `make test-all`."""


@pytest.mark.quick(
    "zero gate-*", "*-gemma3-ttt", "*-llama-ttt", "*-pi0-ttt", "*-gemma3-lact", "*-gemma3-routed"
)
@pytest.mark.parametrize(("architecture", "adapter"), ROWS)
@pytest.mark.parametrize("capability", EAGER)
def test_capability_as_its_check_says(capability: str, architecture: str, adapter: str) -> None:
    CAPABILITIES[capability](architecture, ADAPTERS[adapter])


COMPILED = [(architecture, "ttt") for architecture in MODELS]
COMPILED += [("gemma3", adapter) for adapter in ADAPTERS if adapter != "ttt"]
"""Every architecture once, every adapter once: compiling takes seconds (the table has all)."""


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "adapter"), COMPILED)
def test_compiled_in_place_equals_eager(architecture: str, adapter: str) -> None:
    CAPABILITIES["compile"](architecture, ADAPTERS[adapter])


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["ttt", "ttt_mlp"])
def test_gradients_compiled_in_place_equal_eager(adapter: str) -> None:
    eager, compiled = (adapted_model("llama", ADAPTERS[adapter]).train() for _ in range(2))
    torch.compiler.reset()
    compiled.compile(backend="aot_eager")
    torch.testing.assert_close(losses_and_gradients(compiled), losses_and_gradients(eager))
    theirs = dict(eager.named_parameters())
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
