"""Every adapter in every architecture, against the base model, the eager run, the full pass."""

import pytest
from architecture_cases import ADAPTERS, ARCHITECTURES
from capabilities import CAPABILITIES, compile_in_place

EAGER = [name for name in CAPABILITIES if name != "compile"]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("capability", EAGER)
def test_capability_as_its_check_says(capability: str, architecture: str, adapter: str) -> None:
    CAPABILITIES[capability](architecture, ADAPTERS[adapter])


def _compile_rows() -> list[object]:
    fast = ("gemma3", "ttt")
    rows = [(architecture, adapter) for architecture in ARCHITECTURES for adapter in ADAPTERS]
    return [pytest.param(*row, marks=[] if row == fast else pytest.mark.slow) for row in rows]


@pytest.mark.parametrize(("architecture", "adapter"), _compile_rows())
def test_compiled_in_place_equals_eager(architecture: str, adapter: str) -> None:
    compile_in_place(architecture, ADAPTERS[adapter])
