"""The kernels of `ops.ttt_lora` in the graphs of `torch.compile`: one node each, the same numbers.

They run in Triton's interpreter; with a GPU see `test_ttt_lora_kernels_gpu.py`.
"""

from collections.abc import Callable, Iterable

import pytest
import torch
import triton_interpreter as triton_interpreter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from ttt_cases import random_flags
from ttt_lora_cases import LoRACase, carried_state, case_of

from lightning_modules.ops import triton_backend, ttt_lora, ttt_lora_cell
from lightning_modules.ops.ttt_lora import in_graphs
from lightning_modules.ops.ttt_lora.call import Call
from lightning_modules.ops.ttt_lora.plan import make_plan

every_form = pytest.mark.parametrize("form", ["A_plain", "B_ln"])
every_feature = pytest.mark.parametrize(
    "features", ["", "state", "mask", "mask state", "mask document_ids state"]
)


def featured(case: LoRACase, features: str) -> LoRACase:
    flags = [name for name in features.split() if name != "state"]
    case = random_flags(case, 1, *flags) if flags else case
    return carried_state(case, 2) if "state" in features else case


def results(
    tensors: Iterable[Tensor], function: Callable[..., tuple[Tensor, ...]]
) -> list[Tensor | None]:
    """Outputs of a function of tensors, and the gradients of all of them."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = function(*leaves)
    sum(x.square().sum() for x in found).backward()
    return [*found, *(x.grad for x in leaves)]


def runner(case: LoRACase) -> Callable[..., tuple[Tensor, ...]]:
    """Outputs and what the next call needs, as a function of the case's tensors."""

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        o, state = case.with_tensors(**dict(zip(case.tensors, values, strict=True))).run("triton")
        return o, state.dw, state.db, state.pending_k, state.pending_eta

    return run


def assert_equal(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert x is y is None or torch.equal(x, y)


@pytest.mark.quick("mask document_ids state-B_ln")
@every_form
@every_feature
def test_compiled_is_one_graph_and_the_same_bit_for_bit(form: str, features: str) -> None:
    run = runner(featured(case := case_of(form, 9, group=2), features))
    torch._dynamo.reset()
    whole = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_equal(results(case.tensors.values(), whole), results(case.tensors.values(), run))


@pytest.mark.slow
def test_the_default_compiler_computes_the_same() -> None:
    run = runner(featured(case := case_of("B_ln", 9, group=2), "mask state"))
    torch._dynamo.reset()
    for x, y in zip(
        results(case.tensors.values(), torch.compile(run)),
        results(case.tensors.values(), run),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_lengths_share_a_graph_and_are_the_same_bit_for_bit() -> None:
    """The second length makes the last one, for any."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        o, state = ttt_lora(*values, mini_batch_size=4, backend="triton")
        return o, state.dw

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for time in (9, 13, 30):
        case = case_of("A_plain", time, group=2)
        assert_equal(results(case.tensors.values(), compiled), results(case.tensors.values(), run))
    assert counter.frame_count == 2


def test_a_graph_has_one_node_for_a_call_whatever_its_length() -> None:
    sizes = []

    def count(graph: GraphModule, example: list[Tensor]) -> GraphModule:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        sizes.append(len(nodes))
        names = [str(node.target) for node in nodes]
        assert sum("fast_weights.ttt_lora" in name for name in names) == 1
        return graph

    for time in (9, 90):
        case = case_of("A_plain", time, group=2)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(runner(case), backend=count, fullgraph=True)(*case.tensors.values())
    assert sizes[0] == sizes[1]


@pytest.mark.slow
@every_form
def test_cell_compiled_is_the_same_bit_for_bit(form: str) -> None:
    mode, _, loss = form.partition("_")
    torch.manual_seed(0)
    base, norm, eta = torch.randn(2, 5, 4), torch.randn(2, 2, 4), torch.rand(2)
    leaves = [torch.randn(3, 9, 26), eta, base, norm]
    options = {"mini_batch_size": 4, "mode": mode, "loss": loss, "q_residual": True}

    def run(projected: Tensor, eta: Tensor, base: Tensor, norm: Tensor) -> tuple[Tensor, ...]:
        shared: dict = {}
        first, state = ttt_lora_cell(
            projected, eta, base, norm=norm, shared=shared, backend="triton", **options
        )
        second, last = ttt_lora_cell(
            projected, eta, base, norm=norm, state=state, backend="triton", **options
        )
        return first, second, last.dw, last.pending_v

    torch._dynamo.reset()
    whole = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_equal(results(leaves, whole), results(leaves, run))


@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "mask state"])
def test_operations_keep_the_rules_of_the_library(
    features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema, shapes, gradients and tracing, as torch checks them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 2, 3, requires_grad=True) for _ in "qkv")
    eta, base = torch.rand(2, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    norm = torch.randn(2, 2, 3, requires_grad=True)
    mask = torch.rand(2, 9) > 0.3 if features else None
    call = Call(4, True, make_plan(9, 4, mask, None, None), 8, 1e-5)
    start, held = None, [None] * 3
    before = [None] * 3
    if features:
        start = torch.randn(2, 2, 4, 3, requires_grad=True)
        held = [torch.randn(2, 4, 2, 3, requires_grad=True) for _ in "kv"]
        held.append(torch.rand(2, 4, 2, requires_grad=True))
        before = [torch.tensor([1, 3]), torch.tensor([5, 3]), torch.tensor([0, 0])]
    given: list = []
    original = in_graphs._forward
    keep = lambda *arguments: given.extend(arguments) or original(*arguments)  # noqa: E731
    monkeypatch.setattr(in_graphs, "_forward", keep)
    in_graphs.in_graph(call, before, eta, base, start, [*held, norm, None, q, k, v])
    # rows behind the blocks that there are stay unwritten: outputs are compared by the tests above
    torch.library.opcheck(
        original, tuple(given), test_utils=("test_schema", "test_autograd_registration",
                                            "test_faketensor"),
    )  # fmt: skip


def test_only_an_op_with_nodes_of_its_own_takes_kernels_into_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert triton_backend.unable("cuda", torch.float32) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert triton_backend.unable("cuda", torch.float32, in_graphs=True) is None
    assert "torch.compile" in triton_backend.unable("cuda", torch.float32)
    assert "cpu" in triton_backend.unable("cpu", torch.float32, in_graphs=True)
