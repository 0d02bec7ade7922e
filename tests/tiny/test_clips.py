"""The folder of mp4 clips: fidelity, captions, resumption."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from anyflow_train.errors import UserError
from anyflow_train.tiny import shapes as world
from anyflow_train.tiny.clips import write_clips


def _read(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).movedim(-1, 0) / 127.5 - 1


def test_files_hold_the_clips_and_captions(tmp_path: Path) -> None:
    paths = write_clips(tmp_path / "clips", count=24, seed=1)
    real, labels = world.draw_clips(24, seed=1)
    seen = torch.stack([_read(path) for path in paths])
    error = ((seen - real) / 2).square().flatten(1).mean(1)
    # 40 dB is an error of 2.5 grey levels of 255, far below what the codec itself loses (33 dB).
    assert (-10 * torch.log10(error)).min() > 40
    captions = [path.with_suffix(".txt").read_text().strip() for path in paths]
    assert captions == [world.CAPTIONS[label] for label in labels]
    with av.open(str(paths[0])) as container:
        assert container.streams.video[0].average_rate == world.FRAMES_PER_SECOND


def test_an_interrupted_folder_is_completed_and_the_rest_kept(tmp_path: Path) -> None:
    paths = write_clips(tmp_path, count=3, seed=1)
    first = paths[0].stat().st_mtime_ns
    content = paths[1].read_bytes()
    paths[1].unlink()
    paths[1].with_suffix(".txt").unlink()
    assert write_clips(tmp_path, count=3, seed=1) == paths
    assert paths[1].read_bytes() == content
    assert paths[0].stat().st_mtime_ns == first
    assert not list(tmp_path.glob(".*"))


def test_a_missing_video_is_noticed_though_its_caption_is_there(tmp_path: Path) -> None:
    paths = write_clips(tmp_path, count=2, seed=1)
    paths[1].unlink()
    write_clips(tmp_path, count=2, seed=1)
    assert paths[1].exists()


def test_a_folder_of_other_clips_is_refused(tmp_path: Path) -> None:
    write_clips(tmp_path, count=1, seed=1)
    with pytest.raises(UserError, match=r"clips\.json"):
        write_clips(tmp_path, count=1, seed=2)


def test_a_file_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "00001.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out: .* holds '00001\.txt' of another origin"):
        write_clips(tmp_path, 2, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["00001.txt"]
