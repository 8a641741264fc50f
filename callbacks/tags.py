"""What every tag means, and which curves belong into one chart: one table for all who tell it.

TensorBoard shows the meaning beside each scalar and in the text page, the custom-scalars layout
takes the charts, and docs/monitoring.md has the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import NamedTuple

Charts = dict[str, dict[str, tuple[str, list[str]]]]
"""Category -> title -> as `SummaryWriter.add_custom_scalars` takes it: `Multiline` and regexes of
tags, or `Margin` and the tags of a curve, its lower and its upper end."""

GATES = "gates"
MEMORY = "fast weights"
ROUTING = "routers"
POSITION = "loss by position"
LOSS = "loss and learning rate"
RUN = "streams and speed"


class TagFamily(NamedTuple):
    """Tags that mean the same of different layers, gates or bins.

    Args:
        name: the tag as a reader sees it, with `<...>` for what varies.
        meaning: one sentence.
        category: of the chart; empty for none.
        title: of the chart; `<...>` is replaced as in the name. Families that share a title share
            a chart.
    """

    name: str
    meaning: str
    category: str = ""
    title: str = ""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches whole tags; a group for every `<...>`, of which the last may have slashes."""
        parts = re.split(r"<(\w+)>", self.name)
        text = re.escape(parts[0])
        for index in range(1, len(parts), 2):
            is_last = index == len(parts) - 2
            text += f"(?P<{parts[index]}>{'.+' if is_last else '[^/]+'})"
            text += re.escape(parts[index + 1])
        return re.compile(text)


FAMILIES = (
    TagFamily("train/loss", "loss of the step's batch", LOSS, "loss"),
    TagFamily("val/loss", "mean loss of the validation data", LOSS, "loss"),
    TagFamily("val/accuracy", "share of tokens whose most likely prediction is right"),
    TagFamily("train/<auxiliary>", "auxiliary loss, times its coefficient"),
    TagFamily("lr/<group>", "learning rate of a parameter group", LOSS, "learning rates"),
    TagFamily(
        "gate/<gate>/mean/<layer>",
        "mean of a gate over rows, tokens and channels: 0 is shut, 1 open (alpha: of its "
        "parameter alone; ratio_...: what the branch adds, relative to the residual stream)",
        GATES, "<gate>: mean of each layer",
    ),
    TagFamily("gate/<gate>/std/<layer>", "standard deviation of a gate"),
    TagFamily("gate/<gate>/min/<layer>", "smallest entry of a gate"),
    TagFamily("gate/<gate>/max/<layer>", "largest entry of a gate"),
    TagFamily(
        "gate/<gate>/saturation/<layer>",
        "share of gates with |gate| > 0.99, which hardly learn any more",
        GATES, "<gate>: saturated share",
    ),
    TagFamily(
        "fast_weight/inner_loss_before/<layer>",
        "what the fast weights minimise, of a call's tokens, with the weights before the call",
        MEMORY, "inner loss before and after the update",
    ),
    TagFamily(
        "fast_weight/inner_loss_after/<layer>",
        "the same with the weights after the call: must be lower, else the memory does not learn",
        MEMORY, "inner loss before and after the update",
    ),
    TagFamily(
        "fast_weight/state_norm/<layer>",
        "size of what was learned from the file, |dW|",
        MEMORY, "size of the state |dW|",
    ),
    TagFamily(
        "fast_weight/relative_change/<layer>",
        "|dW| / |W|: what was learned from the file against the learned initial weights",
        MEMORY, "relative change |dW| / |W|",
    ),
    TagFamily("fast_weight/relative_change_max/<layer>", "largest |dW| / |W| of any row and head"),
    TagFamily("fast_weight/cosine/<layer>", "cosine of W + dW to W: 1 where nothing was learned"),
    TagFamily(
        "fast_weight/eta/<layer>", "inner learning rate as used", MEMORY, "inner learning rate"
    ),
    TagFamily("fast_weight/reset_share", "share of rows that began a file, and so forgot"),
    TagFamily(
        "chapter_router/load_entropy/<layer>",
        "evenness of the chapters' use: 1 is balanced, 0 one chapter for everything",
        ROUTING, "chapters: load entropy and dead share",
    ),
    TagFamily(
        "chapter_router/dead/<layer>",
        "share of chapters that nothing chose",
        ROUTING, "chapters: load entropy and dead share",
    ),
    TagFamily("chapter_router/max_over_mean/<layer>", "load of the fullest chapter / mean load"),
    TagFamily("chapter_router/balance/<layer>", "load balancing loss: 1 is balanced"),
    TagFamily(
        "chapter_router/entropy/<layer>", "uncertainty of a decision, in nats",
        ROUTING, "chapters: entropy of a decision",
    ),
    TagFamily("chapter_router/top_k_mass/<layer>", "probability of what was chosen"),
    TagFamily("chapter_router/z/<layer>", "mean squared logsumexp of the logits: grows with them"),
    TagFamily("chapter_router/changed/<layer>", "share of decisions unlike the one before"),
    TagFamily(
        "router/load_entropy/<layer>",
        "evenness of the use of a routed adapter's members: 1 is balanced, 0 one member",
        ROUTING, "members: load entropy and dead share",
    ),
    TagFamily(
        "router/dead/<layer>",
        "share of members that nothing chose",
        ROUTING, "members: load entropy and dead share",
    ),
    TagFamily("router/max_over_mean/<layer>", "load of the fullest member / mean load"),
    TagFamily("router/entropy/<layer>", "uncertainty of a decision, in nats"),
    TagFamily(
        "position_loss/from_<position>",
        "validation loss of the tokens from this position of their file on, up to the next bin",
        POSITION, "loss by position in the file",
    ),
    TagFamily(
        "chunk_loss/chunk_<index>",
        "validation loss of the files' chunk of that number",
        POSITION, "loss by chunk of the file",
    ),
    TagFamily("closed_loop/success", "share of solved episodes in the simulator"),
    TagFamily("closed_loop/success_low", "lower end of its 95 % Wilson interval"),
    TagFamily("closed_loop/success_high", "upper end of its 95 % Wilson interval"),
    TagFamily("closed_loop/episode_length", "mean control steps of an episode"),
    TagFamily(
        "throughput/tokens_per_sec", "input tokens or action steps", RUN, "tokens per second"
    ),
    TagFamily("throughput/samples_per_sec", "chunks of rows that have a file"),
    TagFamily("throughput/batches_per_sec", "batches"),
    TagFamily(
        "throughput/data_wait",
        "share of the time in which training waited for the next batch",
        RUN, "share of time spent waiting for data",
    ),
    TagFamily("throughput/mfu", "share of the device's peak FLOP/s that the model uses"),
    TagFamily(
        "streams/resets", "rows that began a file so far", RUN, "files begun and chunks continued"
    ),
    TagFamily(
        "streams/continuations",
        "rows that continued one so far",
        RUN, "files begun and chunks continued",
    ),
    TagFamily("final/<metric>", "as it was when the run ended: what the HPARAMS tab compares"),
)  # fmt: skip

MARGINS = {
    ("closed loop", "success rate with its 95 % interval"): (
        "closed_loop/success",
        "closed_loop/success_low",
        "closed_loop/success_high",
    )
}
"""Charts of a curve with a band: value, lower and upper end."""


@cache
def family_of(tag: str) -> TagFamily | None:
    """The first family that a tag belongs to."""
    return next((family for family in FAMILIES if family.pattern.fullmatch(tag)), None)


def describe(tag: str) -> str:
    """What a tag means; empty where it is not known."""
    family = family_of(tag)
    return "" if family is None else family.meaning


def families_of(tags: Iterable[str]) -> list[TagFamily]:
    """The families of which there is a tag, in the table's order."""
    found = {family_of(tag) for tag in tags}
    return [family for family in FAMILIES if family in found]


def layout(tags: Iterable[str]) -> Charts:
    """The custom-scalars layout of these tags: related curves in one chart, none is empty."""
    tags = sorted(tags)
    charts: Charts = {}
    for (category, title), curve in MARGINS.items():
        if set(curve) <= set(tags):
            charts.setdefault(category, {})[title] = ("Margin", list(curve))
    for family in FAMILIES:
        for tag in tags if family.title else ():
            if family_of(tag) is family:
                match = family.pattern.fullmatch(tag)
                title = _fill(family.title, match)
                # All families of the chart, written or not: TensorBoard merges the layouts of
                # several runs, and shows a chart of another list of curves as another chart.
                shared = [other for other in FAMILIES if other.title == family.title]
                regexes = [_regex(other, match) for other in shared]
                charts.setdefault(family.category, {})[title] = ("Multiline", regexes)
    return charts


def _regex(family: TagFamily, match: re.Match[str] | None) -> str:
    """Matches a family's tags, whatever comes last in them."""
    head, _, tail = family.name.rpartition("<")
    return f"{re.escape(tail)}$" if not head else re.escape(_fill(head, match))


def _fill(text: str, match: re.Match[str] | None) -> str:
    groups = {} if match is None else match.groupdict()
    return re.sub(r"<(\w+)>", lambda name: groups[name[1]], text)


def table(families: Iterable[TagFamily]) -> str:
    """Markdown table of tags and their meaning."""
    rows = [f"| `{family.name}` | {_cell(family.meaning)} |" for family in families]
    return "\n".join(["| tag | what it is |", "|---|---|", *rows])


def facts(rows: Mapping[str, str]) -> str:
    """Markdown table of names and values."""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| what | value |", "|---|---|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
