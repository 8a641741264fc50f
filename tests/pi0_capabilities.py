"""The checks of `capabilities.py` for PI0's action expert (`dit`), which is no language model.

It denoises: there are no tokens to generate, and the sampler reads one cached prefix in every
Euler step instead. All tokens of a call may read what all of them write, so TTT is not causal here
and takes the call as one mini-batch, as `ActionExpertModule` does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architecture_cases import CLOSE, AdapterCase, assert_every_parameter_learns, disturb
from pi0_cases import HORIZON, PADDED, make_chunk, make_pi0
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import inject_adapters, remove_adapters
from lightning_modules.models.flow_matching import euler_sample
from lightning_modules.streams import FastState, Slots

PI0 = "pi0"
STEPS = 3
"""Euler steps."""


def zero_gate(case: AdapterCase, attention: str = "sdpa") -> None:
    """An adapter that adds nothing: bit-identical velocities and sampled actions.

    With and without pi0.5's modulation, which gives attention a gate.
    """
    for adarms in (False, True):
        module = _module(adarms=adarms, attention=attention)
        expected = [velocity(module.train(train)) for train in (True, False)]
        actions = sample(module)
        inject(module, case, zero=True)
        for train, wanted in zip((True, False), expected, strict=True):
            assert torch.equal(velocity(module.train(train)), wanted)
        assert torch.equal(sample(module), actions)


def attention_implementations(case: AdapterCase) -> None:
    """SDPA and eager attention give the same, and zero gates are exact in both."""
    outs = [velocity(adapted(case, attention=name)) for name in ("sdpa", "eager")]
    torch.testing.assert_close(*outs, **CLOSE)
    zero_gate(case, "eager")


def train(case: AdapterCase) -> None:
    """Two chunks of an episode, one backward: every parameter of the adapter learns."""
    module = adapted(case)
    losses_and_gradients(module)
    assert_every_parameter_learns(module, case)


def sampling(case: AdapterCase) -> None:
    """Sampling over one cached prefix equals Euler steps of transformers' own joint forward.

    The joint forward is the one of training: nothing is cached, gradients are on, train mode.
    """
    module = adapted(case, adarms=False)
    chunk, pi0 = make_chunk(), module.model.pi0
    state = F.pad(chunk["observation.state"], (0, PADDED - 5))
    inputs = {"state": state, **module.model.inputs(chunk, len(state))._asdict()}
    pi0.train()
    joint = euler_sample(lambda x, t: pi0(**inputs, noise=x, timestep=t).logits, _noise(), STEPS)
    assert joint.requires_grad
    module.eval()
    torch.testing.assert_close(sample(module), joint.detach()[..., :3], **CLOSE)
    official = pi0.sample_actions(**inputs, noise=_noise(), num_steps=STEPS)
    assert torch.equal(sample(module), official[..., :3])


def compile_in_place(case: AdapterCase) -> None:
    """`dit.compile()` gives the eager velocities and states in two chunks, in one graph."""
    module = adapted(case).eval()
    expected = two_chunks(module)
    torch.compiler.reset()
    counters.clear()
    module.model.decoder.compile(backend="aot_eager")
    for actual, wanted in zip(two_chunks(module), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **CLOSE)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, "one when fresh, one that goes on"
    assert not counters["graph_break"]


def checkpointing(case: AdapterCase) -> None:
    """Activation checkpointing with two chunks of an episode: bit-equal loss and gradients."""
    plain, recomputed = (adapted(case, gradient_checkpointing=on) for on in (False, True))
    calls = []
    attention = recomputed.model.decoder.layers[0].self_attn
    attention.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(losses_and_gradients(plain), losses_and_gradients(recomputed))
    assert len(calls) == 4, "two chunks, forward and recomputed"
    theirs = dict(recomputed.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, theirs[name].grad), name


def bf16_autocast(case: AdapterCase) -> None:
    """Under bf16 autocast: finite losses and gradients, and zero gates leave the base as it is."""
    module = _module()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = velocity(module)
        inject(module, case, zero=True)
        assert torch.equal(velocity(module), expected)
        module = adapted(case)
        assert losses_and_gradients(module).isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)


def saves_the_base(case: AdapterCase) -> None:
    """`save_pretrained` after removal writes the files that it wrote before injection."""
    module = _module(adarms=False)
    before = _saved(module.model.pi0)
    inject(module, case, zero=True)
    velocity(module)
    remove_adapters(module.model.decoder)
    assert _saved(module.model.pi0) == before


CHECKS: dict[str, Callable[[AdapterCase], None]] = {
    "zero gate": zero_gate,
    "train": train,
    "generate": sampling,
    "compile": compile_in_place,
    "checkpointing": checkpointing,
    "bf16": bf16_autocast,
    "sdpa and eager": attention_implementations,
    "save base": saves_the_base,
}
"""As `capabilities.CAPABILITIES`."""


def adapted(case: AdapterCase, **options: Any) -> ActionExpertModule:
    """A module with the adapter in every layer of its expert, everything random."""
    module = _module(**options)
    disturb(inject(module, case))
    return module


def _module(
    adarms: bool = True, attention: str = "sdpa", gradient_checkpointing: bool = False
) -> ActionExpertModule:
    module = make_pi0(
        with_ttt=False,
        adarms=adarms,
        gradient_checkpointing=gradient_checkpointing,
        module={"ttt_state": "carry_episode", "ttt_write": "all", "denoise_steps": STEPS},
    )
    module.model.pi0.set_attn_implementation(attention)
    assert module.model.decoder.config._attn_implementation == attention
    return module


def inject(module: ActionExpertModule, case: AdapterCase, zero: bool = False) -> dict[str, Any]:
    """Put the adapter into every layer of the expert."""
    options = case.zero if zero and case.zero is not None else case.options
    adapters = inject_adapters(module.model.decoder, [("*", case.adapter_type, as_one(options))])
    module.model.complete()
    return adapters


def as_one(options: Any) -> Any:
    """Options whose TTT layers, at any depth, take a call as one mini-batch, not causal."""
    if not isinstance(options, dict):
        return options
    changed = {name: as_one(value) for name, value in options.items()}
    return changed | ({"causal": False, "mini_batch_size": None} if "causal" in changed else {})


def velocity(module: ActionExpertModule) -> Tensor:
    """`v(x_t, t)` of every row."""
    with torch.no_grad():
        observed = module.model.observe(make_chunk())
        return module.model(observed, _noise(), torch.tensor([0.9, 0.5, 0.1]))


def sample(module: ActionExpertModule) -> Tensor:
    """Actions from the noise of `_noise`."""
    return module.sample_actions(make_chunk(), None, torch.Generator().manual_seed(1))


def _noise() -> Tensor:
    return torch.randn(3, HORIZON, PADDED, generator=torch.Generator().manual_seed(1))


def losses_and_gradients(module: ActionExpertModule) -> Tensor:
    """Losses of two chunks of an episode `[2]`, one backward through both."""
    module.train()
    state, losses = FastState.transient(), []
    generator = torch.Generator().manual_seed(7)
    for index in range(2):
        losses.append(module.chunk_loss(make_chunk(index), state, generator))
        state = state.advance()
    stacked = torch.stack(losses)
    stacked.sum().backward()
    return stacked.detach()


@torch.no_grad()
def two_chunks(module: ActionExpertModule) -> list[Tensor | Slots]:
    """Velocities of two chunks of an episode, and the state after them."""
    state, outs = FastState.transient(), []
    for index in range(2):
        observed = module.model.observe(make_chunk(index))
        outs.append(module.model(observed, _noise(), torch.full((3,), 0.5), fast_state=state))
        state = state.advance()
    return [*outs, state.outgoing]


def _saved(model: nn.Module) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
