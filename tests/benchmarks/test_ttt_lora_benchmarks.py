"""The benchmarks around TTT-LoRA, shortened: a base is trained, steps timed, sizes listed."""

import json
from pathlib import Path

import pytest
from benchmark_cases import load, run
from lact_module_cases import write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.slow
def test_a_pretrained_base_is_read_by_transformers_with_its_tokenizer(tmp_path: Path) -> None:
    texts, out = write_texts(tmp_path), tmp_path / "base"
    changes = ["arm=vanilla", "config.model_type=qwen3", "config.num_hidden_layers=2"]
    settings = [f"model.init_args.{change}" for change in changes]
    settings += [
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "trainer.log_every_n_steps=1",
    ]
    settings += ["data.init_args.batch_size=2", "data.init_args.tokenizer.vocab_size=300"]
    settings += [f"data.init_args.cache={tmp_path / 'cache'}", "data.init_args.source.kind=files"]
    settings += [f"data.init_args.source.path={texts}", "data.init_args.val_fraction=0.3"]
    config = str(Path(__file__).parents[2] / "configs" / "memory_scratch.yaml")
    run("pretrain.py", "--config", config, "--out", str(out), "--set", *settings)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == "qwen3" and model.config.num_hidden_layers == 2
    assert model.config.vocab_size >= len(tokenizer)
    assert json.loads((out / "provenance.json").read_text())["source"] == "texts"


@pytest.mark.slow
def test_a_step_is_timed_with_every_adapter_and_new_ones_compute_what_the_base_does() -> None:
    text = run("ttt_lora_gpu.py", "--tiny", "--repeats", "2")
    rows = [line.split("|") for line in text.splitlines() if "[" in line and "p10" not in line]
    assert {row[1].split(",")[0].strip() for row in rows} >= {"TTT-LoRA", "In-Place TTT", "base"}
    assert all(row[6].strip() == "yes" for row in rows)


def test_kernels_are_summed_by_what_they_do() -> None:
    names = {
        "attention": ["void pytorch_flash::flash_bwd_kernel<cutlass::gemm>", "fmha_cutlassF_bf16"],
        "Triton kernels of ours": ["scan_kernel", "token_backward_kernel"],
        "matrix products": ["nvjet_tst_128x256_64x4", "void cublasLt::splitKreduce_kernel<32>"],
        "other element-wise": ["void at::native::elementwise_kernel<4>", "Memset (Device)"],
    }
    module = load("ttt_lora_gpu.py")
    for kind, of_kind in names.items():
        assert {module.kind_of(name) for name in of_kind} == {kind}
    times = [(name, 2.0, 3) for of_kind in names.values() for name in of_kind]
    lines = module.kernels("an arm", times, longest=1)
    assert lines[0] == "## an arm: 16.0 ms"
    assert lines[4:9] == [
        *(f"| **{n}** | 4.00 | 6 |" for n in names),
        f"| {times[0][0]} | 2.00 | 3 |",
    ]


def test_matched_sizes_stay_within_the_parameters_of_the_lora() -> None:
    text = run("matched_sizes.py")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| S")]
    assert rows and all(int(r[6].replace(",", "")) <= int(r[7].replace(",", "")) for r in rows)
