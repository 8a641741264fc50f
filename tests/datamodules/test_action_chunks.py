"""Chunks of episodes: which frames, which padding, which statistics; and the DataModules."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lerobot_reference import LENGTHS, TASK_OF_EPISODE, values, write_reference

from datamodules.action_chunk_dataset import (
    ActionChunkConfig,
    ActionChunkDataset,
    from_delta,
    split_episodes,
    to_delta,
)
from datamodules.action_chunks import ActionChunkDataModule, RecordedSimulation
from datamodules.lerobot import LeRobotDataset
from datamodules.lerobot_writer import LeRobotWriter
from datamodules.sampler import IDLE, ChunkRequest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "set")


def make(folder: Path, episodes: Any = (0, 1, 2, 3), **options: Any) -> ActionChunkDataset:
    options = {"horizon": 4, "stride": 2, **options}
    return ActionChunkDataset(LeRobotDataset(folder), episodes, ActionChunkConfig(**options))


def request(file: int, index: int) -> ChunkRequest:
    return ChunkRequest(file, index, index == 0, idle=False)


def test_chunk_c_of_a_stream_starts_at_frame_c_times_stride(folder: Path) -> None:
    dataset = make(folder, stride=3)
    assert list(dataset.lengths) == [-(-length // 3) for length in LENGTHS]
    for file, chunks in enumerate(dataset.lengths):
        states, actions = values("observation.state", file), values("action", file)
        for index in range(chunks):
            sample, start = dataset[request(file, index)], 3 * index
            np.testing.assert_array_equal(sample["observation.state"], states[start])
            expected = actions[start : start + 4]
            np.testing.assert_array_equal(sample["action"][: len(expected)], expected)
            assert sample["episode_index"] == file
            assert sample["frame_index"] == start
            assert sample["task"] == TASK_OF_EPISODE[file]


def test_padding_repeats_the_last_action_and_is_flagged_exactly(folder: Path) -> None:
    sample = make(folder, stride=3)[request(0, 1)]  # episode 0 has 5 frames: 3 and 4 are left
    assert sample["action_is_pad"].tolist() == [False, False, True, True]
    for row in (2, 3):
        np.testing.assert_array_equal(sample["action"][row], values("action", 0)[-1])
    assert sample["action_is_pad"].dtype == torch.bool


def test_every_action_stands_in_some_chunk(folder: Path) -> None:
    dataset = make(folder, horizon=4, stride=4)
    for file, chunks in enumerate(dataset.lengths):
        samples = [dataset[request(file, index)] for index in range(chunks)]
        seen = torch.cat([s["action"][~s["action_is_pad"]] for s in samples])
        np.testing.assert_array_equal(seen, values("action", file))


def test_shuffled_makes_every_frame_a_file_of_one_chunk(folder: Path) -> None:
    dataset = make(folder, episodes=(1, 3), mode="shuffled")
    frames = [(episode, frame) for episode in (1, 3) for frame in range(LENGTHS[episode])]
    assert list(dataset.lengths) == [1] * len(frames)
    for file, (episode, frame) in enumerate(frames):
        sample = dataset[request(file, 0)]
        expected = values("observation.state", episode)[frame]
        np.testing.assert_array_equal(sample["observation.state"], expected)
        assert sample["frame_index"] == frame
        assert sample["action_is_pad"].sum() == max(0, frame + 4 - LENGTHS[episode])


@pytest.mark.parametrize("mode", ["stream", "shuffled"])
def test_idle_rows_have_the_same_shapes_and_count_nowhere(folder: Path, mode: str) -> None:
    dataset = make(folder, mode=mode)
    idle, live = dataset[IDLE], dataset[request(1, 0)]
    assert idle["action_is_pad"].all() and not live["action_is_pad"].all()
    assert {k: (v.shape, v.dtype) for k, v in idle.items()} == {
        k: (v.shape, v.dtype) for k, v in live.items()
    }


def test_samples_are_copies_of_the_dataset(folder: Path) -> None:
    dataset = make(folder)
    for value in dataset[request(0, 0)].values():
        value.zero_()
    np.testing.assert_array_equal(dataset[request(0, 0)]["action"], values("action", 0)[:4])


def test_the_number_of_the_frame_may_be_part_of_the_state(folder: Path) -> None:
    data = LeRobotDataset(folder, ("observation.state", "frame_index", "action"))
    frames = data.episode(2, "frame_index")[:, 0]
    np.testing.assert_array_equal(frames, np.arange(len(frames)))


def test_states_are_concatenated_in_the_given_order(folder: Path) -> None:
    data = LeRobotDataset(folder, ("observation.state", "next.reward", "action"))
    config = ActionChunkConfig(horizon=4, stride=2, state_keys=("next.reward", "observation.state"))
    dataset = ActionChunkDataset(data, (2,), config)
    expected = np.concatenate([values("next.reward", 2), values("observation.state", 2)], axis=1)
    np.testing.assert_array_equal(dataset[request(0, 1)]["observation.state"], expected[2])
    np.testing.assert_allclose(
        dataset.statistics()["observation.state"]["mean"], expected.mean(0), rtol=1e-6
    )


def test_delta_actions_are_relative_to_the_state_at_the_start(folder: Path) -> None:
    sample = make(folder, delta_actions=(1,))[request(1, 2)]
    state, actions = values("observation.state", 1)[4], values("action", 1)[4:8]
    np.testing.assert_array_equal(sample["action"][:, 0], actions[:, 0])
    np.testing.assert_array_equal(sample["action"][:, 1], actions[:, 1] - state[1])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_from_delta_inverts_to_delta(kind: str) -> None:
    generator = np.random.default_rng(0)
    actions, state = generator.normal(size=(5, 7, 4)), generator.normal(size=(5, 6))
    if kind == "torch":
        actions, state = torch.from_numpy(actions), torch.from_numpy(state)
    delta = to_delta(actions, state, (0, 3))
    assert not np.allclose(delta[..., 3], actions[..., 3])
    np.testing.assert_allclose(from_delta(delta, state, (0, 3)), actions, rtol=1e-12, atol=1e-12)


def test_statistics_match_numpy_over_the_training_episodes_only(folder: Path) -> None:
    module = ActionChunkDataModule(str(folder), horizon=4, stride=2, val_fraction=0.3, seed=1)
    module.setup("fit")
    training = module.build_dataset("train").episodes.tolist()
    assert 0 < len(training) < len(LENGTHS)
    for name in ("observation.state", "action"):
        rows = np.concatenate([values(name, episode) for episode in training])
        stats = module.statistics[name]
        np.testing.assert_allclose(stats["mean"], rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(stats["std"], rows.std(0), rtol=1e-6)
        np.testing.assert_allclose(stats["q01"], np.quantile(rows, 0.01, axis=0), rtol=1e-5)
        assert stats["count"].tolist() == [len(rows)]


def test_statistics_of_delta_actions_match_numpy_over_the_valid_samples(folder: Path) -> None:
    options = {"delta_actions": (0,), "episodes": (0, 2)}
    dataset, frames = make(folder, **options), make(folder, mode="shuffled", **options)
    samples = [frames[request(file, 0)] for file in range(len(frames.lengths))]
    rows = torch.cat([s["action"][~s["action_is_pad"]] for s in samples]).numpy()
    stats = dataset.statistics()["action"]
    np.testing.assert_allclose(stats["mean"], rows.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["max"], rows.max(0), rtol=1e-6)
    assert stats["count"].tolist() == [len(rows)]


def test_split_is_disjoint_complete_and_stable_when_episodes_are_added() -> None:
    training, validation = split_episodes(range(1000), 0.2, seed=3)
    assert sorted(training + validation) == list(range(1000))
    assert 150 < len(validation) < 250
    more = split_episodes(range(1500), 0.2, seed=3)[1]
    assert [episode for episode in more if episode < 1000] == validation
    assert split_episodes(range(1000), 0.2, seed=4)[1] != validation
    assert split_episodes(range(5), 0.0, seed=0)[1] == []
    assert all(len(split_episodes(range(3), 1e-9, seed=s)[1]) == 1 for s in range(20))


def goal_folder(path: Path) -> Path:
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "goal_x", "goal_y"]},
        "action": {"dtype": "float32", "shape": [1], "names": ["u"]},
    }
    with LeRobotWriter(path, 10, features) as writer:
        for _ in range(3):
            frames = {"observation.state": np.ones((8, 3)), "action": np.ones((8, 1))}
            writer.add_episode(frames, "go")
    return path


@pytest.mark.parametrize("visible", [(0, 1), (2,)], ids=["early", "late"])
def test_goal_is_visible_in_the_given_chunks_only(visible: tuple, tmp_path: Path) -> None:
    dataset = make(goal_folder(tmp_path / "set"), (0, 1), stride=2, goal_visible_chunks=visible)
    seen = [dataset[request(0, index)]["observation.state"].tolist() for index in range(4)]
    assert seen == [[1, 1, 1] if index in visible else [1, 0, 0] for index in range(4)]
    module = ActionChunkDataModule(
        str(tmp_path / "set"), horizon=4, stride=2, goal_visible_chunks=visible
    )
    assert module.goal_visible_steps == {step for step in range(8) if step // 2 in visible}


def test_hiding_a_goal_that_has_no_name_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="name that begins with 'goal_'"):
        make(folder, goal_visible_chunks=(0,))


def test_horizon_longer_than_every_episode_names_the_longest(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"horizon=9 .* at most {max(LENGTHS)}"):
        make(folder, horizon=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 5}, "some actions would stand in no chunk"),
        ({"stride": 0}, "stride=0"),
        ({"mode": "random"}, "choose stream or shuffled"),
        ({"mode": "shuffled", "goal_visible_chunks": (0,)}, "needs mode: stream"),
        ({"state_keys": ()}, "state_keys is empty"),
        ({"state_keys": ("observation.state", "action")}, "'action', which is what is predicted"),
        ({"state_keys": ("next.reward", "next.reward")}, "names a feature twice"),
        ({"delta_actions": (2,)}, r"delta_actions \[2\].*0 to 1"),
        ({"episodes": ()}, "no episode"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder, **options)


def test_no_training_episode_left_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="leaves none of the 4 episodes"):
        ActionChunkDataModule(str(folder), horizon=4, stride=2, val_fraction=0.99).setup("fit")


def test_tbptt_needs_streams(folder: Path) -> None:
    with pytest.raises(ValueError, match="use mode: stream, or tbptt: 1"):
        ActionChunkDataModule(str(folder), horizon=4, stride=2, mode="shuffled", tbptt=2)


def test_features_describe_the_batches(folder: Path) -> None:
    module = ActionChunkDataModule(
        str(folder), horizon=4, stride=2, delta_actions=(0,), val_fraction=0.3, seed=1
    )
    training = module.build_dataset("train").episodes.tolist()
    recorded = np.concatenate([values("action", episode) for episode in training])
    assert module.features == {
        "state_dim": 3, "action_dim": 2, "horizon": 4, "stride": 2, "image_keys": [],
        "tasks": {0: "Pick the cube.", 1: "Open the drawer."}, "delta_actions": [0],
        "action_range": [recorded.min(0).tolist(), recorded.max(0).tolist()],
        "action_bounds": None,
    }  # fmt: skip


def test_batches_follow_the_contract_and_streams_continue(folder: Path) -> None:
    module = ActionChunkDataModule(
        str(folder), horizon=4, stride=2, batch_size=2, tbptt=2, val_fraction=0.0
    )
    module.setup("fit")
    rows: dict[int, list[int]] = {}
    for batch in module.train_dataloader():
        assert len(batch) == 2
        for chunk in batch:
            assert chunk["observation.state"].shape == (2, 3)
            assert chunk["action"].shape == (2, 4, 2)
            assert chunk["action_is_pad"].shape == (2, 4)
            for row, file in enumerate(chunk["stream_id"].tolist()):
                if file < 0:
                    assert chunk["action_is_pad"][row].all()
                    continue
                index = int(chunk["chunk_index"][row])
                rows.setdefault(file, []).append(index)
                start = values("action", int(chunk["episode_index"][row]))[2 * index]
                np.testing.assert_array_equal(chunk["action"][row, 0], start)
    assert {file: sorted(seen) for file, seen in rows.items()} == {
        file: list(range(-(-length // 2))) for file, length in enumerate(LENGTHS)
    }


class Counter(pl.LightningModule):
    """Counts batches; trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seen = {"train": 0, "validate": 0}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["train"] += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["validate"] += 1

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("val_fraction", [0.0, 0.3])
def test_the_trainer_takes_it_with_and_without_validation(
    folder: Path, tmp_path: Path, val_fraction: float
) -> None:
    data = ActionChunkDataModule(str(folder), horizon=4, stride=2, val_fraction=val_fraction)
    counter = Counter()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(counter, datamodule=data)
    assert counter.seen["train"] > 0
    assert (counter.seen["validate"] > 0) == (val_fraction > 0)


def test_a_recording_is_made_by_prepare_data_and_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gymnasium_robotics")

    def build(**options: Any) -> RecordedSimulation:
        return RecordedSimulation(
            "FetchReach", episodes=6, root=str(tmp_path), horizon=8, stride=4, **options
        )

    data = build()
    with pytest.raises(FileNotFoundError):
        data.setup("fit")
    data.prepare_data()
    data.setup("fit")
    assert data.simulation is not None and data.simulation.name == "FetchReach"
    assert data.features["state_dim"] == 13 and data.features["action_dim"] == 4
    assert data.features["action_bounds"] == [[-1.0] * 4, [1.0] * 4]
    monkeypatch.setattr("datamodules.recording.LeRobotWriter", None)  # recording again would fail
    build(seed=5, batch_size=2).prepare_data()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
