import io
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image

from anyflow_train.config.base import ClipSize
from anyflow_train.data.prepare.frames import shown_frames
from anyflow_train.data.prepare.video import ClipError, fit, read_clip, read_windows
from anyflow_train.data.prepare.windows import Framing, Limits
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


def write_frames(path: Path, streams: list[dict[int, int]], marks: list[Disposition]) -> Path:
    """Write one video stream per table of time (in 1/16 s) -> grey."""
    with av.open(str(path), "w") as container:
        added = []
        for mark in marks:
            codec, form = ("png", "rgb24") if mark == Disposition.attached_pic else ("libx264", "yuv420p")
            added.append(container.add_stream(codec, rate=16))
            added[-1].height, added[-1].width, added[-1].pix_fmt, added[-1].disposition = 64, 64, form, mark
        for stream, table in zip(added, streams, strict=True):
            for time, grey in table.items():
                frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), grey, np.uint8), format="rgb24")
                frame.pts, frame.time_base = time, Fraction(1, 16)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def test_the_default_stream_is_read_and_no_cover(tmp_path: Path) -> None:
    first, second = dict.fromkeys(range(5), 50), dict.fromkeys(range(5), 200)
    marks = [Disposition(0), Disposition.default]
    assert abs(greys(read_clip(write_frames(tmp_path / "a.mkv", [first, second], marks), 1, 64, 64, 16.0))[0] - 200) < 3
    cover = write_frames(tmp_path / "a.mp4", [{0: 50}, second], [Disposition.attached_pic, Disposition(0)])
    assert abs(greys(read_clip(cover, 1, 64, 64, 16.0))[0] - 200) < 3
    with pytest.raises(ClipError, match="no video: the file holds cover art"):
        read_clip(write_frames(tmp_path / "b.mp4", [{0: 50}], [Disposition.attached_pic]), 1, 64, 64, 16.0)


def test_a_row_of_jpegs_is_a_video(tmp_path: Path) -> None:
    path, noise = tmp_path / "a.mjpeg", np.random.default_rng(0).integers(0, 20, (256, 256, 3), dtype=np.uint8)
    with path.open("wb") as file:  # so large that FFmpeg does not see the second one when it guesses the format
        for grey in range(0, 200, 20):
            Image.fromarray(noise + np.uint8(grey)).save(file, "JPEG", quality=95)
    assert greys(read_clip(path, 9, 32, 32, 25.0)) == pytest.approx([9.5 + 20 * number for number in range(9)], abs=2)


def test_a_hole_ends_a_clip_and_a_slow_clip_has_none(tmp_path: Path) -> None:
    times = [0, 1, 2, 80, 81]
    path = write_frames(tmp_path / "a.mkv", [dict.fromkeys(times, 100)], [Disposition.default])
    assert read_clip(path, 3, 64, 64, 16.0).shape[1] == 3
    with pytest.raises(ClipError, match=r"hole: the picture after 0\.1.* s is of 5\.00 s"):
        read_clip(path, 5, 64, 64, 16.0)
    slow = write_video(tmp_path / "slow.mp4", [10, 20, 30], Fraction(1, 2))
    assert all(abs(a - b) <= 2 for a, b in zip(greys(read_clip(slow, 33, 64, 64, 16.0))[::32], [10, 20], strict=True))


def test_an_empty_packet_repeats_the_picture(tmp_path: Path) -> None:
    """Theora writes one for a picture that does not change, and decoders refuse it."""
    with av.open(str(write_video(tmp_path / "a.mp4", [10]))) as container:
        stream = container.streams.video[0]
        first, end = container.demux(stream)
        stream.thread_type = "NONE"
        empty = av.Packet()
        empty.pts = empty.dts = 5 * (first.duration or 0)
        empty.time_base = first.time_base
        frames = SimpleNamespace(demux=lambda stream: iter([first, empty, end]))
        times = [time for _, time in shown_frames(cast(Any, frames), stream)]
    assert times == [5 / 16, 6 / 16]


def test_damaged_frames_are_not_used(tmp_path: Path) -> None:
    data = bytearray(real_clip("carphone_pristine.mp4").read_bytes())
    for place in range(len(data) // 3, len(data) // 2, 999):
        data[place] ^= 16
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(ClipError, match=r"damaged: the picture at \d\.\d\d s"):
        read_clip(tmp_path / "a.mp4", 49, 64, 64, 16.0)


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


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(size=49), "smaller than min_size: 96x48 pixels, but min_size=49"),
        (Limits(upscale=1.3), "over max_upscale: 96x48 pixels must be enlarged by 1.33, but max_upscale=1.3"),
        (Limits(seconds=0.7), "under min_seconds: 0.62 s, but min_seconds=0.7"),
        (Limits(48, 0.6, 1.34), None),
    ],
)
def test_clips_outside_of_the_limits_are_not_used(tmp_path: Path, limits: Limits, reason: str | None) -> None:
    clip = write_video(tmp_path / "a.mp4", range(10), size=(48, 96))
    framing = Framing((ClipSize(5, 64, 64),), 16.0, limits=limits)
    if reason is None:
        assert next(read_windows(clip, "", framing))[1].shape == (3, 5, 64, 64)
        return
    with pytest.raises(ClipError) as caught:
        next(read_windows(clip, "", framing))
    assert str(caught.value) == reason
