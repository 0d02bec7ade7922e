import io
from pathlib import Path

import pytest
import torch

from anyflow_train.data.prepare.video import ClipError, fit, read_clip
from tests.data.prepare.videos import real_clip, write_video


def greys(clip: torch.Tensor) -> list[int]:
    return [round(float(value)) for value in (clip.mean(dim=(0, 2, 3)) + 1) * 127.5]


@pytest.mark.parametrize(
    ("source_fps", "expected"),
    [
        (16, [0, 10, 20, 30, 40]),
        (32, [0, 20, 40, 60, 80]),  # every second frame
        (8, [0, 0, 10, 10, 20]),  # a slow video is shown, and read, with repeats
        (24, [0, 10, 30, 40, 60]),  # 1/16 s is in frame 1.5: the player still shows frame 1
    ],
)
def test_frames_are_those_that_a_player_shows(tmp_path: Path, source_fps: float, expected: list[int]) -> None:
    path = write_video(tmp_path / "clip.mp4", range(0, 200, 10), source_fps)
    clip = read_clip(path, 5, 64, 64, 16.0)
    assert clip.shape == (3, 5, 64, 64)
    assert clip.dtype == torch.float32
    # Going through YUV of 8 bits moves a grey by up to two steps.
    assert all(abs(a - b) <= 2 for a, b in zip(greys(clip), expected, strict=True))


def test_a_clip_may_just_be_long_enough(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", [50] * 17)
    assert read_clip(path, 17, 64, 64, 16.0).shape[1] == 17
    with pytest.raises(ClipError, match=r"too short: it lasts 1\.06 s, but 21 frames at 16 fps need more than 1\.25 s"):
        read_clip(path, 21, 64, 64, 16.0)


def test_bytes_are_read_like_a_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", range(0, 50, 10))
    assert torch.equal(read_clip(io.BytesIO(path.read_bytes()), 5, 64, 64, 16.0), read_clip(path, 5, 64, 64, 16.0))


@pytest.mark.parametrize("content", [b"", b"no video at all", None])
def test_what_is_no_video_is_unreadable(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError, match="unreadable"):
        read_clip(path, 5, 64, 64, 16.0)


def test_a_truncated_video_is_an_error_not_a_crash(tmp_path: Path) -> None:
    data = real_clip("bikes.mp4").read_bytes()
    path = tmp_path / "clip.mp4"
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(ClipError):
        read_clip(path, 81, 64, 64, 16.0)


def test_fit_keeps_the_aspect_and_the_centre() -> None:
    picture = torch.zeros(3, 100, 300)
    picture[:, :, 100:200] = 200
    fitted = fit(picture, 50, 50)  # covers 50 x 150, of which the middle third stays
    assert fitted.shape == (3, 50, 50)
    assert torch.allclose(fitted[:, :, 3:-3], torch.tensor(200.0), atol=0.01)
    assert torch.equal(fit(picture, 100, 300), picture)


def test_fit_does_not_alias_or_leave_the_range() -> None:
    board = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255.0
    fitted = fit(board.expand(3, -1, -1), 30, 30)
    # Without an antialiasing filter a checkerboard of single pixels shrinks to black or white, or to stripes.
    assert float((fitted[:, 2:-2, 2:-2] - 127.5).abs().max()) < 2
    edge = (torch.arange(16) < 8).float().mul(255).expand(3, 16, 16)
    assert 0 <= float(fit(edge, 64, 64).min()) <= float(fit(edge, 64, 64).max()) <= 255


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"])
def test_real_clips_are_read(name: str) -> None:
    clip = read_clip(real_clip(name), 9, 48, 80, 16.0)
    assert clip.shape == (3, 9, 48, 80)
    assert -1 <= float(clip.min()) < float(clip.max()) <= 1
    assert float((clip[:, 1:] - clip[:, :-1]).abs().mean()) > 0  # it moves
