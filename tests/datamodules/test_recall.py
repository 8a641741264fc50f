"""Answers stand in a sequence's own past, at least `min_distance` back, and nowhere else."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest

from datamodules import RecallDataModule
from datamodules.recall_probes import BEGIN, COPY, END, SPECIAL, RecallProbe, RecallSequence
from datamodules.sampler import IDLE, ChunkRequest
from datamodules.text_chunks import NO_LABEL

SMALL = {"vocab_size": 64, "sequence_length": 96, "min_distance": 40}
MQAR = RecallProbe("mqar", num_pairs=8, num_queries=6, **SMALL)
NEEDLE = RecallProbe("needle", span_length=8, **SMALL)
FUSED = RecallProbe("fused", num_pairs=8, num_queries=6, **{**SMALL, "vocab_size": 200})
PROBES = pytest.mark.parametrize("probe", [MQAR, FUSED, NEEDLE], ids=["mqar", "fused", "needle"])


def draw(probe: RecallProbe, count: int, split: int = 0) -> list[RecallSequence]:
    return [probe.sequence(np.random.default_rng([0, split, i])) for i in range(count)]


def answer(tokens: list[int], place: int, first: int = 0) -> int | None:
    """What a reader of `tokens[first:place + 1]` knows of the label at `place`; None: nothing."""
    context = tokens[first : place + 1]
    if COPY in tokens[: place + 1]:
        done = place - tokens.index(COPY)
        return context[context.index(BEGIN) + 1 + done] if BEGIN in context else None
    query = context.pop()
    return context[context.index(query) + 1] if query in context else None


def unfused(tokens: list[int]) -> list[int]:
    """Tokens of `FUSED` with every pair as a key and a value: 12 fillers, keys and values each."""
    result = []
    for token in tokens:
        key, value = divmod(token - 40, 12)
        result += [token] if token < 40 else [16 + key, 28 + value]
    return result


def reader(probe: RecallProbe, window: int | None = None) -> Any:
    """`answer` by a reader of the last `window` tokens, or of all."""

    def read(tokens: list[int], place: int) -> int | None:
        first = 0 if window is None else max(0, place + 1 - window)
        if probe is not FUSED:
            return answer(tokens, place, first)
        context = unfused(tokens[first : place + 1])
        return answer(context, len(context) - 1)

    return read


def accuracy(sequences: list[RecallSequence], guess: Any) -> float:
    """Share of the labels that `guess(tokens, place)` gets right."""
    right = [
        guess(tokens.tolist(), place) == labels[place]
        for tokens, labels in sequences
        for place in np.flatnonzero(labels != NO_LABEL).tolist()
    ]
    return float(np.mean(right))


def spread(sequences: list[RecallSequence], chance: float) -> float:
    """Four standard deviations of the accuracy of a guess."""
    labels = sum(int((labels != NO_LABEL).sum()) for _, labels in sequences)
    return 4 * float(np.sqrt(chance * (1 - chance) / labels))


@PROBES
def test_a_reader_of_the_whole_context_answers_everything(probe: RecallProbe) -> None:
    assert accuracy(draw(probe, 50), reader(probe)) == 1.0


@PROBES
def test_a_reader_of_the_last_min_distance_tokens_knows_nothing(probe: RecallProbe) -> None:
    sequences = draw(probe, 200)
    # Key and value, or the beginning of the span, are out of sight.
    assert accuracy(sequences, reader(probe, probe.min_distance)) == 0.0
    assert accuracy(sequences, reader(probe, probe.sequence_length)) == 1.0


@PROBES
def test_bigrams_of_the_window_and_of_the_training_set_answer_no_better_than_chance(
    probe: RecallProbe,
) -> None:
    following: dict[int, Counter] = defaultdict(Counter)
    overall: Counter = Counter()
    for tokens, labels in draw(probe, 400):
        for place in np.flatnonzero(labels != NO_LABEL):
            following[int(tokens[place])][int(labels[place])] += 1
            overall[int(labels[place])] += 1

    def bigram(tokens: list[int], place: int) -> int:
        window = tokens[max(0, place + 1 - probe.min_distance) : place]
        for earlier in range(len(window) - 2, -1, -1):
            if window[earlier] == tokens[place] and window[earlier + 1] >= probe.first_value:
                return window[earlier + 1]
        table = following[tokens[place]] or overall
        return table.most_common(1)[0][0]

    unseen = draw(probe, 400, split=1)
    assert abs(accuracy(unseen, bigram) - probe.chance) < spread(unseen, probe.chance)


def test_power_a_key_with_one_value_in_all_sequences_is_learned_by_a_table() -> None:
    table = {key: key + 20 for key in range(24, 44)}
    leaking = []
    for tokens, labels in draw(MQAR, 50):
        asked = labels != NO_LABEL
        labels[asked] = [table[key] for key in tokens[asked].tolist()]
        leaking.append(RecallSequence(tokens, labels))
    assert MQAR.first_value == 44 and accuracy(leaking, lambda t, p: table[t[p]]) == 1.0
    fair = draw(MQAR, 200)
    assert accuracy(fair, lambda t, p: table[t[p]]) < MQAR.chance + spread(fair, MQAR.chance)


@pytest.mark.parametrize("distance", [1, 5, 40, 74])
def test_pairs_come_first_then_filler_then_keys_at_the_distance(distance: int) -> None:
    probe = RecallProbe("mqar", 64, 96, distance, num_pairs=8, num_queries=6)
    nearest = []
    for tokens, labels in draw(probe, 60):
        keys, values = tokens[0:16:2], tokens[1:16:2]
        assert len(set(keys.tolist())) == 8
        assert ((keys >= 24) & (keys < 44) & (values >= 44) & (values < 64)).all()
        places = np.flatnonzero(labels != NO_LABEL)
        asked = tokens[places].tolist()
        assert len(set(asked)) == 6 and set(asked) <= set(keys.tolist())
        nearest.append(places[0] - 15)
        filler = np.delete(tokens, [*range(16), *places])
        assert ((filler >= SPECIAL) & (filler < 24)).all()
    assert min(nearest) >= distance
    if distance < 40:
        assert min(nearest) == distance, "the bound is reached"


@pytest.mark.parametrize("distance", [1, 10, 40, 87])
def test_the_span_stands_at_the_distance_and_is_copied_at_the_end(distance: int) -> None:
    probe = RecallProbe("needle", 64, 96, distance, span_length=8)
    begins = set()
    for tokens, labels in draw(probe, 800):
        (begin,), (end,) = np.flatnonzero(tokens == BEGIN), np.flatnonzero(tokens == END)
        span = tokens[begin + 1 : end]
        assert len(span) == 8 and (span >= 44).all() and tokens[88] == COPY
        assert labels[88:].tolist() == span.tolist() and (labels[:88] == NO_LABEL).all()
        assert tokens[89:].tolist() == span[:-1].tolist()
        assert 88 - (begin + 1) >= distance
        begins.add(int(begin))
    assert begins == set(range(88 - max(distance + 1, 10) + 1))


# --- the DataModule ---


def make(probe: RecallProbe = MQAR, **options: Any) -> RecallDataModule:
    defaults = {"train_sequences": 9, "val_sequences": 4, "batch_size": 4}
    return RecallDataModule(probe, **defaults | options)


def rows(data: RecallDataModule, stage: str = "train") -> dict[int, list[list[int]]]:
    """Tokens and labels of every sequence, joined from its chunks."""
    joined: dict[int, list[list[int]]] = defaultdict(lambda: [[], []])
    for batch in getattr(data, f"{stage}_dataloader")():
        for chunk in batch:
            for row, stream in enumerate(chunk["stream_id"].tolist()):
                mask = chunk["mask"][row]
                joined[stream][0] += chunk["input_ids"][row][mask].tolist()
                joined[stream][1] += chunk["labels"][row][mask].tolist()
    assert joined.pop(-1, [[], []]) == [[], []]
    return dict(joined)


@PROBES
@pytest.mark.parametrize("chunk_length", [None, 96, 32, 25, 1])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sequences_do_not_depend_on_how_they_are_cut_or_read(
    probe: RecallProbe, chunk_length: int | None, workers: int
) -> None:
    data = make(probe, chunk_length=chunk_length, num_workers=workers, seed=0)
    for stage, split, count in (("train", 0, 9), ("val", 1, 4)):
        expected = {i: [t.tolist() for t in s] for i, s in enumerate(draw(probe, count, split))}
        assert rows(data, stage) == expected


def test_sequences_depend_on_seed_split_and_number_and_on_no_epoch() -> None:
    data = make()
    first = rows(data)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    data.train_dataloader = lambda: loader
    assert rows(data) == first
    other = [*rows(make(seed=1)).values(), *rows(make(), "val").values(), *first.values()]
    assert len({str(sequence) for sequence in other}) == 9 + 4 + 9


def test_idle_rows_count_nowhere_and_padding_ends_a_sequence() -> None:
    dataset = make(chunk_length=25).build_dataset("train")
    idle = dataset[IDLE]
    assert not idle["mask"].any() and idle["labels"].eq(NO_LABEL).all()
    last = dataset[ChunkRequest(0, 3, False, False)]
    assert last["mask"].tolist() == [True] * 21 + [False] * 4
    assert last["input_ids"][21:].eq(0).all()


def test_streams_carry_questions_to_other_chunks_than_their_answers() -> None:
    data = make(chunk_length=32, val_sequences=30)
    for batch in data.val_dataloader():
        chunk = batch[0]
        asked = (chunk["labels"] != NO_LABEL).any(1)
        assert not asked[chunk["chunk_index"] == 0].any()
    assert data.features["chunk_length"] == 32 and data.features["vocab_size"] == 64


def test_a_loader_resumes_at_the_exact_batch() -> None:
    def read(batches: Any) -> list:
        return [chunk["input_ids"].tolist() for batch in batches for chunk in batch]

    expected = read(make(chunk_length=32).train_dataloader())
    first, second = (make(chunk_length=32).train_dataloader() for _ in range(2))
    batches = iter(first)
    seen = read([next(batches) for _ in range(3)])
    second.load_state_dict(first.state_dict())
    assert seen + read(second) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "search"}, "choose mqar, fused or needle"),
        ({"num_queries": 17}, "num_queries=17 is more than num_pairs=16"),
        ({"vocab_size": 51}, "at least 52"),
        ({"kind": "fused", "vocab_size": 307}, "at least 308"),
        ({"min_distance": 0}, "min_distance=0"),
        ({"sequence_length": 558}, "choose at least 559"),
        ({"kind": "needle", "sequence_length": 528}, "choose at least 529"),
        ({"kind": "needle", "min_distance": 1, "sequence_length": 33}, "choose at least 34"),
    ],
)
def test_probes_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallProbe(**options)


def test_the_shortest_sequence_that_is_named_can_be_drawn() -> None:
    draw(RecallProbe(sequence_length=559, vocab_size=52), 3)
    draw(RecallProbe("fused", sequence_length=543, vocab_size=308), 3)
    draw(RecallProbe("needle", sequence_length=529), 3)
    draw(RecallProbe("needle", min_distance=1, sequence_length=34), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_length": 97}, "between 1 and sequence_length=96"),
        ({"chunk_length": -1}, "chunk_length=-1"),
        ({"tbptt": 2}, "needs sequences of several chunks"),
        ({"train_sequences": 0}, "train_sequences=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
