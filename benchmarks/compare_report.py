"""Markdown and figures of `compare_adapters.py`, from whatever is complete."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

from compare_figures import by_chunk, to_lora
from compare_results import Measured, at_edge, comparable, measured, search_losses
from compare_statistics import (
    FEWEST,
    LEAST,
    RESAMPLES,
    Estimate,
    Verdict,
    decide,
    difference,
    level,
    position_bins,
    region,
    shared,
    token_difference,
    token_mean,
    verdict,
)
from compare_trials import ARMS, BASE, LORA
from training_runs import machines, texts

Arms = dict[str, Measured]

FAR = 4096
"""Tokens behind which a file is long."""

QUESTIONS = (
    ("ttt", LORA, "does learning while reading beat LoRA?"),
    ("ttt", "ttt_reset", "is it the memory that persists?"),
    ("ttt_reset", LORA, "does learning within a chunk beat LoRA?"),
    ("ttt", BASE, "is anything gained?"),
    (LORA, BASE, "does training help?"),
    ("in_place", LORA, "does its strongest relative beat LoRA?"),
    ("ttt", "in_place", "and TTT-LoRA its relative?"),
    ("ttt+lora", LORA, "do both together beat LoRA alone?"),
)
MEMORY = ("inner loss before", "inner loss after", "eta", "state norm", "relative change")

METHOD = f"""\
Intervals are of 95 %, from {RESAMPLES:,} resamples of the files with replacement, after the seeds
were averaged file by file: they tell how a result varies with the files, not with the seeds, whose
spread stands beside the losses. Differences are paired by file and over the seeds that both have.
A mean over files weighs every file alike (it counts in a region where it has {LEAST} tokens), a
mean over tokens weighs long files more. The verdict is by the mean over files: better if the
interval of the difference is below 0, worse if above, else equal; of fewer than {FEWEST} files
there is none. Learning rates were chosen by a part of the same validation files, in every arm."""


def report(out: Path) -> None:
    """Write `results.md` and `figures/*.png` below `out`, and print the tables."""
    arms = measured(out)
    if not arms:
        print("nothing is evaluated yet: nothing to report")
        return
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    by_chunk(arms).savefig(figures / "compare_loss_by_chunk.png")
    if len(arms) > 1 and LORA in arms:
        to_lora(arms).savefig(figures / "compare_difference_to_lora.png")
    results = {arm.trial: arm.runs for arm in arms.values()}
    parts = [
        decision(arms),
        f"## Verdicts\n\n{METHOD}\n\n{verdict_table(arms)}",
        f"## Arms\n\n{arm_table(arms)}",
        f"## Loss by position in the file\n\n{position_table(arms)}",
        f"## What the fast weights do\n\n{memory_table(arms)}\n\n{persistence(arms)}",
        f"## Learning rates\n\n{rate_table(out)}",
        "\n".join([*machines(results, measured="Measured"), *texts(results)]),
    ]
    text = "\n\n".join(part for part in parts if part)
    (out / "results.md").write_text(text + "\n")
    print(text)


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    lines = [list(titles), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def decision(arms: Arms) -> str:
    """The decision in words, where the arms that it needs are complete."""
    if not comparable(arms, "ttt", LORA) or not comparable(arms, "ttt", "ttt_reset"):
        return "No decision yet: it needs the arms lora, ttt_reset and ttt, with a seed in common."
    learning, memory = _verdict(arms, "ttt", LORA), _verdict(arms, "ttt", "ttt_reset")
    text = f"**{decide(learning, memory, _verdict(arms, 'ttt', LORA, FAR))}**"
    if learning in ("equal", "worse"):
        text += " Why, is below: what the fast weights do, and what the memory is worth."
    return text


def _verdict(arms: Arms, one: str, other: str, low: int = 0) -> Verdict | None:
    a, b, _ = shared(arms[one].readings, arms[other].readings)
    return verdict(difference(a, b, region(a, low)))


def verdict_table(arms: Arms) -> str:
    """Every question, on whole files and far from their beginning."""
    rows = []
    for one, other, question in QUESTIONS:
        if not comparable(arms, one, other):
            continue
        a, b, seeds = shared(arms[one].readings, arms[other].readings)
        for low in sorted({0, a.chunk_length, FAR}):
            estimate = difference(a, b, region(a, low))
            if estimate.files:
                place = f"from token {low:,}" if low else "whole files"
                tokens = token_difference(a, b, region(a, low))
                cells = [f"{one} - {other}", question if not low else "", place, signed(estimate)]
                cells += [f"**{verdict(estimate) or 'too few files'}**", signed(tokens)]
                cells += [f"{estimate.files}", f"{seeds}"]
                rows.append(cells)
    titles = ["loss of", "question", "where", "difference, mean over files", "verdict"]
    return table([*titles, "difference, mean over tokens", "files", "seeds"], rows)


def arm_table(arms: Arms) -> str:
    """Every arm at its best learning rate."""
    lora = arms[LORA].runs[0]["parameters"] if LORA in arms else None
    rows = []
    for name, arm in arms.items():
        readings = [arm.readings[run["seed"]] for run in arm.runs]
        whole = region(readings[0])
        losses = [token_mean(reading, whole) for reading in readings]
        parameters, run = arm.runs[0]["parameters"], arm.runs[0]
        every_n = f", every {run['in_place_every_n']} layers" if run["in_place_every_n"] else ""
        rate = arm.trial.rpartition("/")[2] if parameters else ""
        cells = [name, ARMS[name].about + every_n, rate + (" (edge)" if at_edge(arm.trial) else "")]
        cells += [plus_minus(losses), ", ".join(f"{loss:.4f}" for loss in losses)]
        cells += [plus_minus([level(reading, whole).mean for reading in readings])]
        cells += [f"{parameters:,}", f"{parameters / lora:.3f}" if lora and parameters else ""]
        training = [run["training"] for run in arm.runs]
        cells += [_mean((run.get("seconds") for run in training), ",.0f")]
        cells += [_mean((run.get("tokens_per_second") for run in training), ",.0f")]
        cells += [_mean((run["tokens_per_second"] for run in arm.runs), ",.0f")]
        cells += [_mean((_gib(run.get("peak_memory")) for run in training), ".2f")]
        cells += [_mean((_gib(run["peak_memory"]) for run in arm.runs), ".2f")]
        rows.append(cells)
    titles = ["arm", "what it is", "lr", "loss per token", "by seed", "loss, mean over files"]
    titles += ["parameters trained", "of LoRA's", "s in training, with validation"]
    titles += ["tokens/s in training", "tokens/s in reading", "GiB in training", "GiB in reading"]
    return table(titles, rows)


def position_table(arms: Arms) -> str:
    """Mean over files by position, with its interval, and below it the difference to LoRA."""
    first = next(iter(arms.values())).mean
    files = {edges: level(first, region(first, *edges)).files for edges in position_bins(first)}
    bins = [edges for edges, number in files.items() if number]
    rows = [["files", *(str(files[edges]) for edges in bins)]]
    for name, arm in arms.items():
        cells = (plain(level(arm.mean, region(first, *edges))) for edges in bins)
        rows.append([name, *cells])
    for name in arms:
        if name != LORA and comparable(arms, name, LORA):
            a, b, _ = shared(arms[name].readings, arms[LORA].readings)
            cells = (signed(difference(a, b, region(a, *edges))) for edges in bins)
            rows.append([f"{name} - lora", *cells])
    return table(["from token", *(f"{low:,}" for low, _ in bins)], rows)


def memory_table(arms: Arms) -> str:
    """What the fast weights learn in a chunk, and how far dW has moved at its end, also as a share
    of W: mean over layers and chunks."""
    rows = []
    for name, arm in arms.items():
        values = [arm.memory(statistic) for statistic in MEMORY]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:.4g}" for value in values]
            rows.append([name, *cells, _growth(arm)])
    titles = [*MEMORY, "relative change by chunk index"]
    return table(["arm", *titles], rows) if rows else ""


def _growth(arm: Measured) -> str:
    """From the first chunk of a file on, at indices that double."""
    curve = arm.runs[0]["memory"].get("relative change", {"by_chunk": []})["by_chunk"]
    chosen = [(i, v) for i, v, _ in curve if i == 0 or math.log2(i).is_integer()]
    return ", ".join(f"{index}: {value:.3g}" for index, value in chosen)


def persistence(arms: Arms) -> str:
    """The same weights read with and without what they remember of earlier chunks."""
    rows = []
    for name, arm in arms.items():
        if not arm.reset:
            continue
        on, off, seeds = shared(arm.readings, arm.reset)
        for low in sorted({0, on.chunk_length, FAR}):
            cells = region(on, low)
            if (estimate := difference(on, off, cells)).files:
                values = [f"{level(reading, cells).mean:.4f}" for reading in (on, off)]
                rows.append([name, f"{low:,}", *values, signed(estimate), str(seeds)])
    titles = ["the same weights", "from token", "memory on", "memory off", "on - off", "seeds"]
    return table(titles, rows) if rows else ""


def rate_table(out: Path) -> str:
    """The losses from which the learning rates were chosen."""
    rows = [
        [arm, ", ".join(f"{name.rpartition('/')[2]}: {loss:.4f}" for name, loss in losses.items())]
        for arm, losses in search_losses(out).items()
        if arm != BASE
    ]
    return table(["arm", "last validation loss in training, first seed, by learning rate"], rows)


def plain(estimate: Estimate) -> str:
    """`2.345 [2.100, 2.600]`."""
    if math.isnan(estimate.low):
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def signed(estimate: Estimate) -> str:
    """`-0.01234 [-0.02000, -0.01000]`."""
    if math.isnan(estimate.low):
        return f"{estimate.mean:+.5f}"
    return f"{estimate.mean:+.5f} [{estimate.low:+.5f}, {estimate.high:+.5f}]"


def plus_minus(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _gib(size: float | None) -> float | None:
    return None if size is None else size / 2**30


def _mean(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):{form}}" if known else ""
