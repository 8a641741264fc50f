"""What `expert_gpu.py` runs: the expert with and without TTT, its two calls, and their checks."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from lightning_modules.action_expert import ActionExpertModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.adapters.base import BaseAttentionAdapter
from lightning_modules.layers.adarms import AdaRMSNorm
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.streams import FastState

Chunk = dict[str, Tensor]
PRECISION = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """The model and its calls.

    Args:
        expert: the transformer.
        heads: of TTT.
        state_dim: size of the observation.
        action_dim: size of an action.
        horizon: actions of a chunk; T is one more.
        rows: batch size of a training step, and of the larger sampling call.
        steps: Euler steps of a sampling call.
        backend: of torch.compile.
    """

    expert: ExpertConfig
    heads: int = 8
    state_dim: int = 32
    action_dim: int = 32
    horizon: int = 50
    rows: int = 64
    steps: int = 10
    backend: str = "inductor"


FULL = Size(ExpertConfig(1024, 18, 8, 1, 256, 4096))
"""The Gemma 300M expert of pi0."""

TINY = Size(ExpertConfig(32, 2, 4, 1, 8, 64), 4, 5, 3, 6, 4, 2, "aot_eager")
"""For tests; its compiler only traces, since a C++ compiler takes minutes on a slow core."""


def build(size: Size, device: torch.device, ttt: bool, gate: float = 0.1) -> ActionExpertModule:
    """The expert in training mode, the same weights in every call; state reset, static gate.

    Norms that were just initialised close every branch: here they are open, and all weights
    random, so that nothing is multiplied by zero.

    Args:
        size: of model and call.
        device: where it is made.
        ttt: with TTT-Linear in all layers.
        gate: tanh(alpha) of TTT.
    """
    layer = TTTConfig(kind="linear", num_heads=size.heads, causal=False)
    alpha = float(torch.atanh(torch.tensor(gate)))
    module = ActionExpertModule(
        torch.optim.AdamW,
        expert=size.expert,
        ttt=TTTAdapterConfig(ttt_gate="tanh", alpha_init=alpha, layer=layer) if ttt else None,
        execution_horizon=size.horizon,
        denoise_steps=size.steps,
        normalization="none",
    )
    features = {"state_dim": size.state_dim, "action_dim": size.action_dim, "stride": None}
    with torch.device(device):
        module.build({**features, "horizon": size.horizon, "image_keys": [], "delta_actions": []})
    _draw(module, size, torch.Generator(device).manual_seed(0))
    return module.train()


@torch.no_grad()
def _draw(module: nn.Module, size: Size, generator: torch.Generator) -> None:
    """Random weights: the base's first, so that they do not depend on TTT; TTT's gate stays."""
    named = sorted(module.named_parameters(), key=lambda item: (".ttt" in item[0], item[0]))
    for name, parameter in named:
        if "ttt_gate" not in name:
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.02
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator,
                                              device=parameter.device))  # fmt: skip
        if name.endswith(("ttt_norm_weight", "post_norm.weight")):
            parameter.add_(1.0)
    for norm in module.modules():
        if isinstance(norm, AdaRMSNorm) and norm.cond_size is not None:
            norm.dense.bias.chunk(3)[2].add_(1.0)  # the gate of the branch


def draw_chunk(size: Size, rows: int, device: torch.device) -> Chunk:
    """A batch of random observations and actions."""
    return {
        "observation.state": torch.randn(rows, size.state_dim, device=device),
        "action": torch.randn(rows, size.horizon, size.action_dim, device=device),
        "action_is_pad": torch.zeros(rows, size.horizon, dtype=torch.bool, device=device),
    }


def compile_regions(module: ActionExpertModule, backend: str) -> None:
    """Compile what repeats in every layer: norms, MLP, attention, TTT and its gate.

    Each of them once, however many layers there are; the layer as a whole would be compiled
    anew for each, since it writes the fast state under the layer's name.
    """
    for layer in module.model.decoder.layers:
        attention = layer.self_attn
        adapted = isinstance(attention, BaseAttentionAdapter)
        regions = list(attention.children()) if adapted else [attention]
        regions += [layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
        for region in regions:
            region.compile(dynamic=False, backend=backend)


class Call:
    """A training step, or a sampling call, over inputs that change from call to call.

    Args:
        module: the expert, compiled or not.
        chunk: inputs of the first call; later ones are copied over them.
        train: forward, backward and AdamW; otherwise `sample_actions`.
    """

    def __init__(self, module: ActionExpertModule, chunk: Chunk, train: bool) -> None:
        self.module, self.chunk, self.is_training = module, chunk, train
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Tensor | None = None
        cuda = chunk["action"].is_cuda
        self._context = {"device_type": chunk["action"].device.type, "dtype": PRECISION}
        self._optimizer = torch.optim.AdamW(
            module.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True, capturable=cuda
        )

    def __call__(self, chunk: Chunk) -> Tensor:
        """The loss, or the sampled actions."""
        for name, value in chunk.items():
            self.chunk[name].copy_(value)
        if self.graph is None:
            return self.run()
        self.graph.replay()
        return self.result

    def run(self) -> Tensor:
        """One call on the inputs as they are, launched kernel by kernel."""
        if not self.is_training:
            return self.predict()
        loss = self.predict()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def predict(self) -> Tensor:
        """The loss with its graph, or the sampled actions."""
        with torch.autocast(**self._context):
            if self.is_training:
                return self.module.chunk_loss(self.chunk, FastState.transient(), None)
            return self.module.sample_actions(self.chunk["observation.state"])

    def capture(self) -> None:
        """Record a CUDA graph of `run`, which later calls replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.run()
        self.graph = graph

    def error(self) -> float:
        """`|| out - eager || / || eager ||` of this call on the same noise."""
        seed = 7
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            expected = self.predict().float().clone()
        torch.manual_seed(seed)
        actual = self(self.chunk).float()
        return relative(actual, expected)


class Measurement(NamedTuple):
    """Times in ms, memory in GiB."""

    median: float
    low: float
    high: float
    memory: float


def measure(call: Call, chunks: Iterator[Chunk], repeats: int) -> Measurement:
    """Median, 10th and 90th percentile of a call, and the most memory that it ever took."""
    device = call.chunk["action"].device
    for _ in range(min(repeats, 5)):
        call(next(chunks))
    times = []
    for _ in range(repeats):
        chunk = next(chunks)
        if not call.is_training:
            synchronize(device)  # a policy waits for its actions; training steps queue up
        times.append(timed(call, chunk))
    synchronize(device)
    milliseconds = sorted(t if isinstance(t, float) else t[0].elapsed_time(t[1]) for t in times)
    tenth = len(milliseconds) // 10
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    median = statistics.median(milliseconds)
    return Measurement(median, milliseconds[tenth], milliseconds[-1 - tenth], memory)


def timed(call: Callable[[Chunk], Any], chunk: Chunk) -> Any:
    """Milliseconds on a CPU; on a GPU two events to be read later."""
    if not chunk["action"].is_cuda:
        begin = time.perf_counter()
        call(chunk)
        return 1000 * (time.perf_counter() - begin)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    call(chunk)
    events[1].record()
    return events


def kernels(call: Call, chunk: Chunk) -> int | None:
    """Kernels of one call on the GPU; None on a CPU."""
    if not chunk["action"].is_cuda:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call(chunk)
        torch.cuda.synchronize()
    return count_kernels(profile.events())


def count_kernels(events: Iterable[Any]) -> int:
    """How many of the profiler's events are kernels: no copies, no ranges with a name."""
    others = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")
    on_device = (event for event in events if event.device_type == DeviceType.CUDA)
    return sum(not event.name.startswith(others) for event in on_device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def relative(actual: Tensor, expected: Tensor) -> float:
    """`|| actual - expected || / || expected ||`; NaN where something is NaN."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


# --- correctness ---


def closed_gate_difference(size: Size, device: torch.device) -> int:
    """How many sampled actions and losses differ by a bit between a gate of 0 and no TTT."""
    plain, closed = build(size, device, False), build(size, device, True, gate=0.0)
    report = closed.load_state_dict(plain.state_dict(), strict=False)
    assert not report.unexpected_keys and all(".ttt" in name for name in report.missing_keys)
    chunk, different = draw_chunk(size, 2, device), 0
    for train in (False, True):
        results = []
        for module in (plain, closed, build(size, device, True)):
            torch.manual_seed(3)
            results.append(Call(module, chunk, train).predict().detach())
        different += int((results[0] != results[1]).sum())
        assert not torch.equal(results[0], results[2]), "an open gate must change something"
    return different


def precision_errors(size: Size, device: torch.device, rows: int) -> dict[str, float]:
    """`|| x - x64 || / || x64 ||` of the velocity, and of all gradients of TTT, by precision."""
    module = build(size, device, True)
    chunk = draw_chunk(size, rows, device)
    noisy = torch.randn_like(chunk["action"])
    t = torch.rand(rows, device=device)

    def velocity_and_gradients(dtype: torch.dtype, autocast: bool) -> tuple[Tensor, Tensor]:
        model = deepcopy(module.model).to(dtype)
        state = chunk["observation.state"].to(dtype)
        with torch.autocast(device.type, PRECISION, enabled=autocast):
            out = model(state, noisy.to(dtype), t.to(dtype))
        out.backward(chunk["action"].to(out.dtype))
        named = model.named_parameters()
        grads = [p.grad.flatten().double() for name, p in named if ".ttt" in name]
        return out.detach(), torch.cat(grads)

    exact = velocity_and_gradients(torch.float64, False)
    errors = {}
    for name, autocast in (("float32", False), ("bfloat16", True)):
        out, gradients = velocity_and_gradients(torch.float32, autocast)
        errors[f"{name} velocity"] = relative(out, exact[0])
        errors[f"{name} gradients of TTT"] = relative(gradients, exact[1])
    return errors


TOLERANCES = {
    # 24 bits, 18 layers, sums over up to 4096 terms
    "float32 velocity": 1e-4,
    "float32 gradients of TTT": 1e-3,
    # 8 bits: 0.4 % a rounding, a dozen of them a layer, added up as a random walk
    "bfloat16 velocity": 0.05,
    "bfloat16 gradients of TTT": 0.15,
    # another order of the same roundings
    "call": 0.05,
}


def fresh_memory(device: torch.device, forget: bool = True) -> None:
    """Drop what earlier cases left on the device and in the compiler; the peak starts anew.

    Args:
        device: where.
        forget: False keeps what is compiled.
    """
    gc.collect()
    if forget:
        torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
