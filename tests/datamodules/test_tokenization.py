"""Text to tokens and back, without loss; special tokens only where they belong."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_cases import make_data, write_documents
from transformers import ByT5Tokenizer, GPT2Tokenizer

from datamodules.tokenization import ByteTokenizer, PretrainedTokenizer, TokenizerConfig

TEXTS = [
    "def f(x):\n\treturn x ** 2  # über\r\n",
    "日本語 ✓ \x00\ufeff  trailing ",
    "it's <eos> or <pad><bos>? <|endoftext|>",
    "x",
]


def bpe(vocab_size: int = 300) -> PretrainedTokenizer:
    return PretrainedTokenizer.train(TEXTS * 5, vocab_size)


def test_bytes_are_the_bytes_between_bos_and_eos() -> None:
    tokenizer = ByteTokenizer()
    for text, tokens in zip(TEXTS, tokenizer.encode([t.encode() for t in TEXTS]), strict=True):
        assert tokens.tolist() == [256, *text.encode(), 257]
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (259, 258)


@pytest.mark.parametrize("make", [ByteTokenizer, bpe])
def test_decoding_gives_the_text_back(make) -> None:
    tokenizer = make()
    for text, tokens in zip(TEXTS, tokenizer.encode([t.encode() for t in TEXTS]), strict=True):
        assert tokenizer.decode(tokens) == text
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert not np.isin(
            tokens[1:-1], [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
        ).any()


_TRAINED = bpe()


@given(st.text(min_size=1))
def test_a_trained_bpe_decodes_every_text_exactly(text: str) -> None:
    text = text.encode(errors="ignore").decode()
    assert _TRAINED.decode(_TRAINED.encode([text.encode()])[0]) == text


def test_a_trained_bpe_has_the_wanted_size_merges_and_special_tokens() -> None:
    tokenizer = bpe(280)
    assert tokenizer.vocab_size == 280
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    tokens = tokenizer.encode([TEXTS[0].encode()])[0]
    assert len(tokens) < len(TEXTS[0].encode()) and tokens.dtype == np.uint16
    assert bpe(280).key == tokenizer.key != bpe(281).key


def test_text_cannot_spell_a_special_token_but_power_without_splitting_it_does() -> None:
    tokenizer = bpe()
    text = "a<eos>b"
    assert tokenizer.eos_id not in tokenizer.encode([text.encode()])[0][1:-1]
    assert tokenizer.eos_id in tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_pretrained_tokenizer_has_its_own_special_tokens(tmp_path: Path) -> None:
    alphabet = dict(bpe().tokenizer.get_vocab())
    GPT2Tokenizer(vocab=alphabet, merges=[]).save_pretrained(tmp_path / "tokenizer")
    tokenizer = PretrainedTokenizer.load(str(tmp_path / "tokenizer"))
    end = tokenizer.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.pad_id == end
    assert tokenizer.vocab_size == len(tokenizer.tokenizer) > end
    tokens = tokenizer.encode([b"abc"])[0].tolist()
    assert tokens[0] == tokens[-1] == end and len(tokens) == 5


def test_a_tokenizer_without_bos_begins_with_the_text(tmp_path: Path) -> None:
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    tokenizer = PretrainedTokenizer.load(str(tmp_path))
    assert tokenizer.bos_id is None and tokenizer.pad_id == 0
    assert tokenizer.encode([b"ab"])[0].tolist() == [ord("a") + 3, ord("b") + 3, tokenizer.eos_id]
    other = ByT5Tokenizer(extra_ids=5)
    assert PretrainedTokenizer(other).key != tokenizer.key  # a tokenizer written in Python


def test_ids_take_as_few_bytes_as_the_vocabulary_allows() -> None:
    tokenizer = bpe()
    for size, dtype in ((256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)):
        tokenizer.vocab_size = size
        assert tokenizer.encode([b"\n"])[0].dtype == dtype


def test_a_name_that_leads_nowhere_says_what_to_give(tmp_path: Path) -> None:
    for name in (str(tmp_path), "nobody/nothing-of-this-name"):
        with pytest.raises(ValueError, match="no tokenizer could be loaded.*tokenizer.json"):
            PretrainedTokenizer.load(name)


def test_a_bpe_learns_from_training_documents_only(tmp_path: Path) -> None:
    folder = write_documents(tmp_path / "corpus", 6)
    data = make_data(folder, val_fraction=0.3, chunk_length=4)
    secret = "unseen" * 50  # one word of validation that would be worth a token
    name = data.store.names[int(data._split[1][0])]
    (folder / name).write_text(secret)
    config = TokenizerConfig("bpe", vocab_size=400)
    tokenizer = make_data(folder, val_fraction=0.3, chunk_length=4, tokenizer=config).tokenizer
    assert len(tokenizer.encode([secret.encode()])[0]) == len(secret) + 2
    seen = make_data(folder, val_fraction=0.0, chunk_length=4, tokenizer=config).tokenizer
    assert len(seen.encode([secret.encode()])[0]) < len(secret) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "words"}, "choose bytes, bpe or pretrained"),
        ({"kind": "pretrained"}, "needs a name"),
        ({"name": "gpt2"}, "needs a name"),
        ({"vocab_size": 300}, "is of kind: bpe"),
        ({"kind": "bpe", "vocab_size": 258}, "at least 259"),
    ],
)
def test_tokenizers_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**options)
