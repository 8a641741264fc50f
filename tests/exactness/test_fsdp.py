"""Two processes of FSDP2, each with its streams, are one process that reads them all.

Steps go through two chunks, so that a layer is gathered and given back twice before the backward
pass, which reaches its first call through the fast state, too.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lact_module_cases import adamw
from lightning.pytorch.strategies import ModelParallelStrategy
from process_cases import (
    CLIP,
    STOP,
    TRAINER,
    BothRanks,
    accumulated,
    adapted,
    assert_equal_to_one,
    assert_resumed,
    join_processes,
    make_double,
    one_process,
    prepared,
    run,
    saved,
    stop,
)
from transformers import AutoModelForCausalLM
from two_processes import in_two_processes
from variant_cases import VARIANTS, Interrupted, SaveAndStop, every_variant

from callbacks import EMA
from lightning_modules.distributed.consolidate import consolidate
from lightning_modules.distributed.strategy import FSDP2Strategy
from lightning_modules.models.adapter_files import load_adapters

pytestmark = pytest.mark.slow

DATA = {"tbptt": 2}


def in_process(rank: int, folder: Path) -> None:
    options = {**TRAINER, **join_processes(rank, "fsdp2")}

    def keep(name: str, result: dict[str, Any]) -> None:
        torch.save(result, folder / f"{name}_{rank}.pt")

    for name, variant in VARIANTS.items():
        path = folder / f"{name}.ckpt"

        def data(name: str = name, variant: Any = variant) -> Any:
            return variant.data(folder / name, **DATA)

        keep(name, run(make_double(name), data(), folder, **options))
        stop(make_double(name), data(), folder, path, **options)
        again = run(make_double(name), data(), folder, ckpt_path=path, **options)
        keep(f"{name}_again", again)
    data = VARIANTS["lact"].data(folder / "lact", **DATA)
    one = run(make_double("lact"), data, folder, ckpt_path=folder / "one.ckpt", **options)
    keep("from_one", one)
    keep("adapted", adapters(folder, options))
    keep("errors", errors(folder, options))
    keep("accumulated", accumulated(folder, **options))
    file = {**options, "strategy": FSDP2Strategy(save_distributed_checkpoint=False)}
    data = VARIANTS["lact"].data(folder / "lact", **DATA)
    stop(make_double("lact"), data, folder, folder / "file.ckpt", **file)


def adapters(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Adapters of a frozen base: a run, and the run that was stopped and resumed."""
    model, path = str(folder / "qwen3"), folder / "adapted.ckpt"

    def data() -> Any:
        return VARIANTS["ttt_lora"].data(folder / "ttt_lora")

    whole = run(adapted(model), data(), folder, **options)
    stop(adapted(model), data(), folder, path, **options)
    module = adapted(model)
    again = run(module, data(), folder, ckpt_path=path, **options)
    with pytest.raises(ValueError, match="consolidate"):
        module.save_adapters(folder / "sharded")
    return {"whole": whole, "again": again}


def errors(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a user does wrong, and a disk that is full: in all processes, the same error."""
    messages: dict[str, str] = {}

    def attempt(what: str, error: type[Exception], *callbacks: Any, **kw: Any) -> None:
        data = VARIANTS["lact"].data(folder / "lact", **DATA)
        with pytest.raises(error) as caught:
            run(
                make_double("lact", **kw.pop("module", {})),
                data,
                folder,
                *callbacks,
                **options,
                **kw,
            )
        messages[what] = str(caught.value)

    attempt("ema", ValueError, EMA())
    attempt("compiled", ValueError, module={"compile_model": True})
    attempt("unmarked", ValueError, ckpt_path=folder / "unmarked.ckpt")
    attempt("nothing", FileNotFoundError, ckpt_path=folder / "nothing.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        save = ModelParallelStrategy.save_checkpoint

        def lost(*given: Any) -> None:
            """The processes are lost when all is written but the mark."""
            save(*given)
            raise Interrupted

        patch.setattr(ModelParallelStrategy, "save_checkpoint", lost)
        data = VARIANTS["lact"].data(folder / "lact", **DATA)
        with pytest.raises(Interrupted):
            run(make_double("lact"), data, folder, SaveAndStop(1, folder / "lact.ckpt"), **options)
    return messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("fsdp"))
    data = BothRanks(VARIANTS["lact"].data(folder / "lact", **DATA))
    stop(make_double("lact"), data, folder, folder / "one.ckpt", **TRAINER)
    (folder / "unmarked.ckpt").mkdir()
    in_two_processes(in_process, folder)
    return folder


@every_variant
def test_two_sharded_processes_are_one(name: str, folder: Path) -> None:
    """Losses, gradients, clipped gradients, weights and fast states, through two chunks."""
    parts, one = saved(folder, name), one_process(name, folder / name, **DATA)
    assert_equal_to_one(parts, one)
    for part in parts:
        for step in part["clipped"]:
            norm = torch.cat([g.flatten() for g in step.values()]).norm().item()
            assert norm == pytest.approx(CLIP, rel=1e-4)  # torch adds 1e-6 to the norm
        for mine, other in zip(part["metrics"], one["metrics"], strict=True):
            assert mine == pytest.approx(other, rel=1e-6)  # metrics are added up in float32


@every_variant
def test_resumed_from_a_checkpoint_folder_is_never_stopped(name: str, folder: Path) -> None:
    """In the middle of files, bit for bit."""
    parts = saved(folder, f"{name}_again"), saved(folder, name)
    for part, never_stopped in zip(*parts, strict=True):
        assert_resumed(part, never_stopped)


@every_variant
def test_a_consolidated_folder_is_a_checkpoint_of_one_process(name: str, folder: Path) -> None:
    file = consolidate(folder / f"{name}.ckpt", folder / f"{name}_file.ckpt")
    data = VARIANTS[name].data(folder / name, **DATA)
    with pytest.warns(UserWarning, match="every stream starts afresh"):
        result = run(make_double(name), data, folder, ckpt_path=file, **TRAINER)
    (sharded, _) = saved(folder, f"{name}_again")
    for what in ("start", "optimizer"):
        assert result[what].keys() == sharded[what].keys() and result[what]
        for key, value in sharded[what].items():
            assert torch.equal(result[what][key], value), key


def test_a_file_put_together_while_training_is_the_consolidated_one(folder: Path) -> None:
    file = torch.load(folder / "file.ckpt", weights_only=True)
    path = consolidate(folder / "lact.ckpt", folder / "lact_file.ckpt")
    other = torch.load(path, weights_only=True)
    assert file.keys() == other.keys()
    torch.testing.assert_close(file["state_dict"], other["state_dict"], rtol=0, atol=0)
    for mine, theirs in zip(in_order(file), in_order(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def in_order(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """State of the optimizer of every parameter, in the order of its groups."""
    (state,) = checkpoint["optimizer_states"]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    return [state["state"][number] for number in numbers]


def test_a_checkpoint_of_one_process_is_resumed_sharded(folder: Path) -> None:
    checkpoint = torch.load(folder / "one.ckpt", weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    for part in saved(folder, "from_one"):
        for name, value in checkpoint["state_dict"].items():
            assert torch.equal(part["start"][name], value), name
        sums = sorted(value.sum().item() for value in part["optimizer"].values())
        assert sums == sorted(entry["exp_avg"].sum().item() for entry in moments.values())


def test_sharded_adapters_are_saved_without_their_base_and_resumed_exactly(folder: Path) -> None:
    for part in saved(folder, "adapted"):
        assert_resumed(part["again"], part["whole"])
    file = consolidate(folder / "adapted.ckpt", folder / "adapted_file.ckpt")
    weights = torch.load(file, weights_only=True)["state_dict"]
    assert weights and all("ttt_lora" in name for name in weights)
    base = str(folder / "qwen3")
    loaded = type(adapted(base)).load_from_checkpoint(
        file, optimizer=adamw, pretrained=adapted(base).pretrained, ttt_lora=adapted(base).ttt_lora
    )
    shutil.rmtree(folder / "adapters", ignore_errors=True)
    loaded.save_adapters(folder / "adapters")
    model = AutoModelForCausalLM.from_pretrained(base)
    assert load_adapters(model, folder / "adapters") == ["ttt_lora"]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_gradients_of_the_first_chunk_count(folder: Path) -> None:
    """Power: with one chunk in a step, another loss."""
    with pytest.raises(AssertionError):
        assert_equal_to_one(saved(folder, "lact"), one_process("lact", folder / "lact"))


def test_interrupted_before_the_mark_the_old_checkpoint_is_there(folder: Path) -> None:
    """Its third step, not the first one of the save that was lost, which lies beside it."""
    assert (folder / ".lact.ckpt.part").exists()
    file = consolidate(folder / "lact.ckpt", folder / "lact_file.ckpt")
    assert torch.load(file, weights_only=True)["global_step"] == STOP


def test_errors_name_the_cause_and_the_fix(folder: Path) -> None:
    for messages in saved(folder, "errors"):
        assert "strategy: ddp" in messages["ema"] and "strategy: ddp" in messages["compiled"]
        assert "'complete'" in messages["unmarked"] and "another" in messages["unmarked"]
        assert "nothing.ckpt" in messages["nothing"]


def test_resumed_between_two_batches_of_a_step_is_never_stopped(folder: Path) -> None:
    for part in saved(folder, "accumulated"):
        assert_resumed(part["again"], part["whole"])
