"""A checkpoint folder is there whole or not at all, wherever its writing ends."""

from pathlib import Path

import pytest

from lightning_modules.distributed import checkpoint_folder as folders
from lightning_modules.distributed.checkpoint_folder import (
    MARKER,
    begin,
    check_complete,
    part_of,
    publish,
    recover,
)


def write(folder: Path, text: str) -> None:
    (begin(folder) / "weights").write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "last.ckpt"
    write(folder, "old")
    publish(folder)
    return folder


def test_while_a_new_one_is_written_the_old_one_is_whole(folder: Path) -> None:
    write(folder, "new")
    recover(folder)
    check_complete(folder)
    assert (folder / "weights").read_text() == "old"
    publish(folder)
    check_complete(folder)
    assert (folder / "weights").read_text() == "new" and not part_of(folder).exists()


def test_what_was_left_of_an_interrupted_save_does_not_come_into_the_next(folder: Path) -> None:
    (begin(folder) / "rubbish").write_text("half")
    write(folder, "new")
    publish(folder)
    assert {path.name for path in folder.iterdir()} == {"weights", MARKER}


@pytest.mark.parametrize("after", ["mark", "removal"])
def test_interrupted_behind_the_mark_the_new_one_is_found(
    after: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(*args: object) -> None:
        raise Killed

    write(folder, "new")
    name = {"mark": "rmtree", "removal": "rename"}[after]
    with monkeypatch.context() as patch:
        patch.setattr(*((folders.shutil, name) if after == "mark" else (Path, name)), killed)
        with pytest.raises(Killed):
            publish(folder)
    assert folder.exists() == (after == "mark")
    recover(folder)
    check_complete(folder)
    assert (folder / "weights").read_text() == ("old" if after == "mark" else "new")


def test_a_file_in_its_place_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "last.ckpt"
    folder.write_text("a checkpoint of one process")
    write(folder, "new")
    publish(folder)
    assert (folder / "weights").read_text() == "new"


def test_an_unmarked_folder_is_an_error_that_names_cause_and_fix(tmp_path: Path) -> None:
    (tmp_path / "half.ckpt").mkdir()
    with pytest.raises(ValueError, match="interrupted while it was written.*another checkpoint"):
        check_complete(tmp_path / "half.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        check_complete(tmp_path / "nothing.ckpt")
