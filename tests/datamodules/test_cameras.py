"""Pictures of LeRobot folders: mp4 by PyAV, inline PNG by Pillow, and what is said without them."""

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_reference import FPS, LENGTHS, edit_table, write_reference
from PIL import Image

from datamodules.cameras import Camera, DecoderMissingError
from datamodules.lerobot import LeRobotDataset, LeRobotFormatError

SIZE = 32
VIDEO, INLINE = "observation.images.top", "observation.images.wrist"
EPISODES_FILE = "meta/episodes/chunk-000/file-000.parquet"
VIDEO_STARTS = (0.0, 0.5, 0.0, 0.6)  # two files: episodes 0, 1 in the first, 2, 3 in the second


def grey(episode: int, frame: int) -> int:
    """Brightness that says which frame a picture is."""
    return 20 + 10 * (sum(LENGTHS[:episode]) + frame)


def camera_feature(dtype: str) -> dict[str, object]:
    return {"dtype": dtype, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channels"]}


def write_video(path: Path, episodes: tuple[int, ...], key_frame_every: int) -> None:
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"crf": "1", "g": str(key_frame_every)}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for episode in episodes:
            for frame in range(LENGTHS[episode]):
                picture = np.full((SIZE, SIZE, 3), grey(episode, frame), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def with_video(tmp_path: Path) -> Callable[[int], Path]:
    def make(key_frame_every: int = 2) -> Path:
        root = write_reference(tmp_path / "set", extra={VIDEO: camera_feature("video")})
        for file, episodes in enumerate(((0, 1), (2, 3))):
            path = root / f"videos/{VIDEO}/chunk-000/file-{file:03d}.mp4"
            write_video(path, episodes, key_frame_every)
        table = pq.read_table(root / EPISODES_FILE, partitioning=None)
        columns = {"chunk_index": [0] * 4, "file_index": [0, 0, 1, 1]}
        columns |= {"from_timestamp": VIDEO_STARTS}
        for name, column in columns.items():
            table = table.append_column(f"videos/{VIDEO}/{name}", pa.array(column))
        pq.write_table(table, root / EPISODES_FILE)
        return root

    return make


@pytest.fixture
def with_inline(tmp_path: Path) -> Path:
    root = write_reference(tmp_path / "set", extra={INLINE: camera_feature("image")})
    for file, episodes in enumerate(((0, 1), (2, 3))):
        pictures = []
        for episode in episodes:
            for frame in range(LENGTHS[episode]):
                buffer = io.BytesIO()
                picture = np.full((SIZE, SIZE, 3), grey(episode, frame), np.uint8)
                Image.fromarray(picture).save(buffer, "PNG")
                pictures.append({"bytes": buffer.getvalue(), "path": f"frame-{frame:06d}.png"})
        path = root / f"data/chunk-000/file-{file:03d}.parquet"
        table = pq.read_table(path, partitioning=None).append_column(INLINE, pa.array(pictures))
        pq.write_table(table, path, row_group_size=3)
    return root


def all_frames() -> list[tuple[int, int]]:
    return [(e, f) for e, length in enumerate(LENGTHS) for f in range(length)]


@pytest.mark.parametrize("key_frame_every", [2, 50])
def test_video_frames_in_any_order_match_what_was_encoded(
    with_video: Callable[[int], Path], key_frame_every: int
) -> None:
    camera = Camera(LeRobotDataset(with_video(key_frame_every)), VIDEO)
    frames = all_frames()
    np.random.default_rng(0).shuffle(frames)
    for episode, frame in frames:
        picture = camera.read(episode, frame)
        assert picture.shape == (3, SIZE, SIZE) and picture.dtype == np.uint8
        # Neighbouring frames differ by 10; lossy coding and colour conversion by 1 or 2.
        assert abs(picture.astype(int) - grey(episode, frame)).max() <= 4


def test_inline_pictures_match_bit_for_bit(with_inline: Path) -> None:
    camera = Camera(LeRobotDataset(with_inline), INLINE)
    for episode, frame in all_frames()[::-1]:
        assert (camera.read(episode, frame) == grey(episode, frame)).all()


def test_a_camera_survives_pickling_with_open_files(with_video: Callable[[int], Path]) -> None:
    camera = Camera(LeRobotDataset(with_video(2)), VIDEO)
    before = camera.read(2, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(camera)).read(2, 3), before)


def test_without_pyav_the_error_names_the_fix(
    with_video: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = LeRobotDataset(with_video(2))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DecoderMissingError, match="pip install"):
        Camera(data, VIDEO)


def test_a_cut_off_video_is_named(with_video: Callable[[int], Path]) -> None:
    folder = with_video(2)
    edit_table(folder / EPISODES_FILE, **{f"videos/{VIDEO}/from_timestamp": [0.0, 0.5, 0.0, 9.0]})
    camera = Camera(LeRobotDataset(folder), VIDEO)
    with pytest.raises(LeRobotFormatError, match=r"file-001\.mp4 has no frame within .* of 9\.0"):
        camera.read(3, 0)


def test_a_missing_video_is_named(with_video: Callable[[int], Path]) -> None:
    folder = with_video(2)
    (folder / f"videos/{VIDEO}/chunk-000/file-000.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"file-000\.mp4 is missing"):
        Camera(LeRobotDataset(folder), VIDEO).read(0, 0)


def test_an_unknown_camera_lists_the_known_ones(with_inline: Path) -> None:
    with pytest.raises(LeRobotFormatError, match=f"no camera 'side'; it has: {INLINE}"):
        Camera(LeRobotDataset(with_inline), "side")
