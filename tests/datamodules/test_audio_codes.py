"""AudioCodeDataModule: every code once, in order, behind a bos; wrong files are named."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audio_cases import CODEBOOKS, FRAMES, SIZE, codes_of, make_audio, write_codes
from safetensors.numpy import save_file
from text_cases import places_of_streams

import datamodules.token_store
from datamodules import AudioCodeDataModule
from datamodules.audio_files import CodeVocabulary

BOS = CODEBOOKS * SIZE


def expected_tokens(name: str) -> list[int]:
    """Written out from the definition: bos, then frame by frame, codebook by codebook."""
    codes = codes_of(name, FRAMES[name])
    return [BOS] + [k * SIZE + int(codes[k, t]) for t in range(FRAMES[name])
                    for k in range(CODEBOOKS)]  # fmt: skip


@pytest.mark.parametrize("tbptt", [1, 2])
def test_every_code_is_a_label_once_in_order_and_files_are_streams(
    tbptt: int, tmp_path: Path
) -> None:
    data = make_audio(write_codes(tmp_path), val_fraction=0.3, tbptt=tbptt)
    training, validation = data._split
    for files, loader in ((training, data.train_dataloader()), (validation, data.val_dataloader())):
        places = places_of_streams(loader)
        assert sorted(places) == list(range(len(files)))
        for stream, found in places.items():
            tokens = expected_tokens(Path(data.store.names[files[stream]]).stem)
            assert found == list(pairwise(tokens))
    names = {Path(name).stem for name in data.store.names}
    assert names == set(FRAMES) and len(validation) >= 1


def test_chunks_hold_whole_frames_and_keep_the_batch_contract(tmp_path: Path) -> None:
    data = make_audio(write_codes(tmp_path), val_fraction=0, batch_size=6)
    (chunk,) = next(iter(data.train_dataloader()))
    names = {"input_ids", "labels", "mask", "stream_id", "chunk_index", "is_first", "plan"}
    assert names <= set(chunk)
    assert chunk["input_ids"].shape == (6, 15) and chunk["is_first"].all()
    assert (chunk["input_ids"][:, 0] == BOS).all()
    codebook = chunk["labels"] // SIZE
    for row, length in enumerate(chunk["mask"].sum(1).tolist()):
        assert length % CODEBOOKS == 0
        assert codebook[row, :length].tolist() == [0, 1, 2] * (length // CODEBOOKS)
    frames = data.tokenizer.frames(chunk["labels"][0][chunk["mask"][0]].tolist())
    name = Path(data.store.names[data._split[0][chunk["stream_id"][0]]]).stem
    assert np.array_equal(frames, codes_of(name, FRAMES[name])[:CODEBOOKS, : frames.shape[1]])


def test_features_and_provenance(tmp_path: Path) -> None:
    data = make_audio(write_codes(tmp_path), tbptt=2, val_fraction=0.3)
    features = data.features
    assert features["vocab_size"] == BOS + 1 and features["bos_id"] == BOS
    assert features["chunk_length"] == 15 and features["tbptt"] == 2
    assert features["mode"] == "stream" and features["eos_id"] is None
    said = data.provenance
    assert said["files"] == 6 and said["frames"] == sum(FRAMES.values())
    assert said["train_files"] + said["val_files"] == 6


def test_one_codebook_is_one_token_a_frame(tmp_path: Path) -> None:
    data = make_audio(write_codes(tmp_path), codebooks=1)
    assert data.features["chunk_length"] == 5 and data.features["vocab_size"] == SIZE + 1
    number = [Path(name).stem for name in data.store.names].index("c")
    assert data.store.document(number).tolist() == [SIZE, *codes_of("c", 23)[0]]


def test_tokens_are_written_once_and_anew_when_a_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_codes(tmp_path)
    first = make_audio(folder)
    written: list[int] = []
    write = datamodules.token_store._write_documents

    def spy(*args: Any) -> Any:
        written.append(1)
        return write(*args)

    monkeypatch.setattr(datamodules.token_store, "_write_documents", spy)
    assert make_audio(folder).store.path == first.store.path and not written
    codes = codes_of("a", 11)
    codes[2, 7] = (codes[2, 7] + 1) % SIZE
    np.save(folder / "a.npy", codes)
    assert make_audio(folder).store.path != first.store.path and len(written) == 1
    assert make_audio(folder, codebooks=2).store.path != first.store.path


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 1), dtype=np.int64), "zz.npy has 1 frames, fewer than min_frames=2"),
        (np.zeros((3, 0), dtype=np.int64), "zz.npy has 0 frames, fewer than min_frames=2"),
        (np.zeros((3, 9)), "zz.npy holds float64: codes are whole numbers"),
        (np.zeros((3, 9), dtype=bool), "zz.npy holds bool: codes are whole numbers"),
        (np.full((3, 9), SIZE), r"zz.npy has the code 20 in codebook 0, frame 0.*allows 0 to 19"),
        (np.eye(3, 9, dtype=int) * -1, r"zz.npy has the code -1 in codebook 0, frame 0"),
        (np.zeros((2, 9), dtype=int), r"zz.npy has shape \[2, 9\].*at least codebooks=3"),
        (np.zeros(9, dtype=int), r"zz.npy has shape \[9\]"),
        (np.zeros((2, 3, 9), dtype=int), r"zz.npy has shape \[2, 3, 9\]"),
        (np.array([{"a": 1}]), "zz.npy cannot be read as codes"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_codes_is_named(codes: Any, message: str, tmp_path: Path) -> None:
    folder = write_codes(tmp_path)
    np.save(folder / "zz.npy", codes, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        make_audio(folder)
    assert not list((tmp_path / "cache").glob("codes-*"))


def test_broken_files_and_folders_without_codes_are_named(tmp_path: Path) -> None:
    folder = write_codes(tmp_path)
    (folder / "zz.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="zz.npy cannot be read as codes"):
        make_audio(folder)
    (folder / "zz.npy").unlink()
    (folder / "zz.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(ValueError, match="zz.safetensors cannot be read as codes"):
        make_audio(folder)
    both = {"left": np.zeros((3, 9), dtype=np.int64), "right": np.zeros((3, 9), dtype=np.int64)}
    save_file(both, folder / "zz.safetensors")
    with pytest.raises(ValueError, match="zz.safetensors holds left, right: .* named codes"):
        make_audio(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("none")
    with pytest.raises(FileNotFoundError, match="has 1 files, but none ends in .npy"):
        make_audio(tmp_path / "empty")


def test_wrong_options_name_the_fix(tmp_path: Path) -> None:
    folder = write_codes(tmp_path)
    with pytest.raises(ValueError, match="codebooks=0 must be at least 1"):
        AudioCodeDataModule(str(folder), codebooks=0)
    with pytest.raises(ValueError, match="chunk_frames=24 is longer.*c.npy, has 23 frames"):
        make_audio(folder, chunk_frames=24)
    with pytest.raises(ValueError, match="in frame 0 is no code of codebook 1"):
        CodeVocabulary(2, 10).frames([3, 4])
