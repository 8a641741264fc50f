"""Chapter attention's kernels in the graphs of `torch.compile`: one node, the same numbers.

They run in Triton's interpreter; with a GPU see `test_chapter_attention_kernels_gpu.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton_interpreter as triton_interpreter
from chapter_cases import Case, differentiate, make_case
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule

from lightning_modules.ops import chapter_attention
from lightning_modules.ops.chapter_attention import in_graphs
from lightning_modules.ops.chapter_attention.launch import Call

SMALL = {"batch": 2, "heads": 2, "kv_heads": 1, "num_chapters": 5}
WAYS: dict[str, dict[str, Any]] = {
    "by_chapter": {"time": 11, "top_k": 2, "shared": 1},
    "by_block": {"time": 37, "top_k": 2, "block_size": 32},
    "mixture": {"time": 5, "top_k": 2, "shared": 2, "mixing": "mixture"},
}
every_way = pytest.mark.parametrize("way", WAYS)


def results(case: Case, compiler: Any = None) -> dict[str, Tensor]:
    """Outputs and gradients of the kernels, as they are or compiled."""
    names = list(case.tensors)

    def run(*values: Tensor) -> dict[str, Tensor]:
        return case.with_tensors(**dict(zip(names, values, strict=True))).outputs("triton")

    torch._dynamo.reset()
    function: Callable[..., Any] = run
    if compiler is not None:
        function = torch.compile(run, backend=compiler, fullgraph=True)
    return differentiate(case, lambda call: function(*call.tensors.values()))


@pytest.mark.quick("by_chapter")
@every_way
def test_compiled_is_one_graph_and_the_same_bit_for_bit(way: str) -> None:
    case = make_case(**{**SMALL, **WAYS[way]})
    expected, actual = results(case), results(case, "aot_eager")
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


@pytest.mark.slow
def test_the_default_compiler_computes_the_same() -> None:
    case = make_case(**{**SMALL, **WAYS["by_chapter"]})
    torch.testing.assert_close(results(case, "inductor"), results(case), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("block_size, graphs", [(1, 2), (32, 3)])
def test_lengths_share_a_graph_and_are_the_same_bit_for_bit(block_size: int, graphs: int) -> None:
    """The second length makes one for any, and another number of blocks one for any number."""
    options = {"block_size": block_size}

    def run(call: Case, function: Callable[..., Tensor]) -> dict[str, Tensor]:
        given = [call.tensors[n] for n in ("q", "mem_k", "mem_v")]
        return {"o": function(*given, call.chapters, call.tensors["log_weights"])}

    read = partial(chapter_attention, backend="triton", **options)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(read, backend=counter, fullgraph=True)
    for time in (40, 45, 70, 101):
        case = make_case(**{**SMALL, "time": time, "top_k": 2, **options})
        expected, actual = (differentiate(case, lambda c, f=f: run(c, f)) for f in (read, compiled))
        assert all(torch.equal(actual[name], x) for name, x in expected.items()), time
    assert counter.frame_count == graphs


@pytest.mark.parametrize("time", [3, 50])
def test_a_graph_has_one_node_for_the_kernels(time: int) -> None:
    case = make_case(**{**SMALL, "time": time, "top_k": 2})
    found = []

    def keep(graph: GraphModule, example: list[Tensor]) -> GraphModule:
        found.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    results(case, keep)
    assert sum("fast_weights.chapter_attention" in name for name in found) == 1
    assert len(found) < 25  # casts and views around it


@pytest.mark.slow
@pytest.mark.parametrize("mixture, by_block", [(False, False), (False, True), (True, False)])
def test_operations_keep_the_rules_of_the_library(mixture: bool, by_block: bool) -> None:
    """Schema, shapes, and gradients, as torch checks them."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(*s, requires_grad=True) for s in ((14, 2, 5), (4, 3, 1, 5), (4, 3, 1, 5))
    )
    block = 7 if by_block else 1
    weights = torch.randn(2, 7 // block, 2, requires_grad=True)
    chapters = torch.rand(2, 7 // block, 4).topk(2).indices.int()
    sizes = [7, block, int(mixture), int(by_block)]
    assert in_graphs._call(sizes, 0.5) == Call(7, block, 0.5, mixture, by_block)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = ([q, k, v, weights, chapters], sizes, 0.5)
    torch.library.opcheck(in_graphs._forward, given, test_utils=checks)
