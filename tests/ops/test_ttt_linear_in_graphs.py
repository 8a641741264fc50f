"""The kernels of `ops.ttt_linear` in the graphs of `torch.compile`: one node, the same numbers.

They run in Triton's interpreter; with a GPU see `test_ttt_linear_kernels_gpu.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_interpreter as triton_interpreter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from ttt_cases import Case, carried_state, differentiate, make_case, outputs, random_flags

from lightning_modules.ops import TTTLinearState
from lightning_modules.ops.ttt_linear import in_graphs

FORMS = {"causal": (True, 4), "scan": (False, 4), "call": (False, None)}
every_form = pytest.mark.parametrize("form", FORMS)
every_feature = pytest.mark.parametrize(
    "features", ["", "state", "mask", "mask write_mask per_row state"]
)


def case_of(form: str, time: int = 9, features: str = "") -> Case:
    causal, size = FORMS[form]
    names = features.split()
    case = make_case(
        "linear", time=time, causal=causal, mini_batch_size=size, batch=2, heads=2, size=5,
        per_row="per_row" in names,
    )  # fmt: skip
    flags = [name for name in names if "mask" in name]
    case = random_flags(case, 1, *flags) if flags else case
    return carried_state(case, 2) if "state" in names else case


def compiled(case: Case, compiler: Any) -> Callable[..., tuple[Tensor, TTTLinearState]]:
    """A call by the kernels in one graph, as `differentiate` wants it."""
    names = list(case.tensors)
    fields = () if case.state is None else case.state

    def run(values: list[Tensor], state: list[Tensor]) -> tuple[Tensor, ...]:
        call = case.with_tensors(**dict(zip(names, values, strict=True)))
        o, after = call.with_state(TTTLinearState(*state) if fields else None).run("triton")
        return o, *after

    torch._dynamo.reset()
    whole = torch.compile(run, backend=compiler, fullgraph=True)

    def call(given: Case, **options: Any) -> tuple[Tensor, TTTLinearState]:
        state = [] if given.state is None else list(given.state)
        o, *after = whole(list(given.tensors.values()), state)
        return o, TTTLinearState(*after)

    return call


def results(case: Case, compiler: Any = None) -> dict[str, Tensor]:
    """Outputs and gradients of the kernels, as they are or compiled."""
    run = "triton" if compiler is None else compiled(case, compiler)
    found, gradients = differentiate(case, run)
    return found | {f"d{name}": x for name, x in gradients.items()}


@pytest.mark.quick("state-causal", "mask write_mask per_row state-call")
@every_form
@every_feature
def test_compiled_is_one_graph_and_the_same_bit_for_bit(features: str, form: str) -> None:
    case = case_of(form, features=features)
    expected, actual = results(case), results(case, "aot_eager")
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


@pytest.mark.slow
def test_the_default_compiler_computes_the_same() -> None:
    case = case_of("causal", features="mask state")
    torch.testing.assert_close(results(case, "inductor"), results(case), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@every_form
def test_lengths_share_a_graph_and_are_the_same_bit_for_bit(form: str) -> None:
    """The second length makes one for all that leave no mini-batch open with a single token."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def run(*values: Tensor) -> Tensor:
        return (
            cases[0]
            .with_tensors(**dict(zip(cases[0].tensors, values, strict=True)))
            .run("triton")[0]
        )

    cases = [case_of(form, time) for time in (9, 14, 31)]
    whole = torch.compile(run, backend=counter, fullgraph=True)
    for case in cases:
        values = list(case.tensors.values())
        assert torch.equal(whole(*values), run(*values))
    assert counter.frame_count == 2


@pytest.mark.parametrize("time", [9, 60])
def test_a_graph_has_one_node_for_the_kernels(time: int) -> None:
    found: list[str] = []

    def keep(graph: GraphModule, example: list[Tensor]) -> GraphModule:
        found.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    case = case_of("causal", time)
    with torch.no_grad():
        o, state = compiled(case, keep)(case)
    expected = outputs(*case.run("triton"))
    assert all(torch.equal(x, expected[name]) for name, x in outputs(o, state).items())
    assert sum("fast_weights.ttt_linear" in name for name in found) == 1
    assert len(found) < 60  # casts, views and the open mini-batch around it


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("features", ["", "mask state", "per_row state"])
def test_operations_keep_the_rules_of_the_library(
    features: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, shapes, gradients and tracing, as torch checks them."""
    given: list[Any] = []
    original, original_backward = in_graphs._forward, in_graphs._backward
    keep = lambda *arguments: given.append(arguments) or original(*arguments)  # noqa: E731
    monkeypatch.setattr(in_graphs, "_forward", keep)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = case_of(form, features=features)
    leaves = {name: x.requires_grad_() for name, x in case.tensors.items()}
    case.with_tensors(**leaves).run("triton")
    monkeypatch.undo()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(original, given[0], test_utils=checks)
    found = original(*given[0])
    upper = [torch.randn_like(x) for x in found[:3]]
    arguments = (*given[0], found[3:], *upper)
    torch.library.opcheck(original_backward, arguments, test_utils=("test_schema", checks[2]))
