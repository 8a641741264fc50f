"""`ops.ttt_lora` on a GPU: as the naive loop on the CPU, without waiting."""

from dataclasses import replace

import pytest
import torch
from ttt_cases import assert_same, differentiate, random_flags
from ttt_lora_cases import FORMS, LoRACase, carried_state, case_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case: LoRACase) -> LoRACase:
    state = case.state
    return replace(
        case,
        tensors={name: x.cuda() for name, x in case.tensors.items()},
        options={n: x.cuda() if torch.is_tensor(x) else x for n, x in case.options.items()},
        state=None if state is None else type(state)(*(x.cuda() for x in state)),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [21, 83])  # the longer one is several blocks of mini-batches
@pytest.mark.parametrize("flags", [(), ("mask",), ("mask", "document_ids")])
def test_torch_on_a_gpu_is_naive_on_the_cpu(flags: tuple[str, ...], length: int, form: str) -> None:
    case = carried_state(random_flags(case_of(form, length, batch=3, group=2), 3, *flags), 4)
    expected, expected_gradients = differentiate(case, "naive")

    def back_on_the_cpu(call: LoRACase) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        o, state = on_gpu(call).run("torch")
        return o.cpu(), type(state)(*(x.cpu() for x in state))

    actual, gradients = differentiate(case, back_on_the_cpu)
    # both are float64; sums are taken in another order
    assert_same(actual, expected, 1e-10, "cuda")
    assert_same(gradients, expected_gradients, 1e-9, "cuda gradient of")


@pytest.mark.parametrize("form", FORMS)
def test_call_without_documents_never_waits_for_the_gpu(form: str) -> None:
    case = on_gpu(carried_state(random_flags(case_of(form, 21, group=2), 3, "mask"), 4))
    leaves = {name: x.requires_grad_() for name, x in case.tensors.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.with_tensors(**leaves).run("torch")[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.grad is not None for x in leaves.values())
