"""Colours and shapes of clips against what a player shows."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av import VideoFrame
from av.filter import Graph
from PIL import ExifTags, Image, ImageOps

from anyflow_train.data.prepare.colour import sdr_pixels
from anyflow_train.data.prepare.frames import ClipError
from anyflow_train.data.prepare.video import fit, read_clip

BT709, BT2020, PQ, HLG, UNSPECIFIED = 1, 9, 16, 18, 2
LUMA = {
    1: (0.2126, 0.7152, 0.0722),
    5: (0.299, 0.587, 0.114),
    9: (0.2627, 0.6780, 0.0593),
}  # Kr, Kg, Kb
COLOURS = [[r, g, b] for r in (0, 1) for g in (0, 1) for b in (0, 1)]


def bars(matrix: int, full_range: bool, height: int) -> VideoFrame:
    """Paint the eight corners of the RGB cube as vertical bars in YUV, by the definition of the matrix."""
    red, green, blue = np.array(COLOURS, float).T
    kr, kg, kb = LUMA[matrix]
    y = kr * red + kg * green + kb * blue
    chroma = [(blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)]
    luma_scale, chroma_scale, black = (255, 255, 0) if full_range else (219, 224, 16)
    planes = [y * luma_scale + black, *(part * chroma_scale + 128 for part in chroma)]
    rows = [np.tile(np.repeat(plane.round().clip(0, 255).astype(np.uint8), 8), (height, 1)) for plane in planes]
    return VideoFrame.from_ndarray(np.stack(rows), format="yuv444p")


@pytest.mark.parametrize(
    ("tagged", "matrix", "full_range", "height"),
    [
        (BT709, 1, False, 64),
        (5, 5, False, 64),
        (BT2020, 9, False, 64),
        (BT709, 1, True, 64),
        (UNSPECIFIED, 5, False, 576),
        (UNSPECIFIED, 1, False, 720),  # no tags: BT.709 from 720 lines on
    ],
)
def test_matrix_and_range(tagged: int, matrix: int, full_range: bool, height: int) -> None:
    frame = bars(matrix, full_range, height)
    frame.colorspace, frame.color_range = tagged, 2 if full_range else 1
    pixels = sdr_pixels(frame, "tonemap").float()
    found = pixels[:, height // 2].unflatten(1, (8, 8))[:, :, 3:5].mean(2)
    assert (found - torch.tensor(COLOURS).T * 255).abs().max() <= 3


def rgb_frame(colours: list[tuple[float, ...]], transfer: int, primaries: int) -> VideoFrame:
    """Make a frame of 16-bit R'G'B' with one column per colour."""
    pixels = (np.array([colours]) * 65535).round().astype(np.uint16)
    frame = VideoFrame.from_ndarray(pixels.repeat(4, axis=0), format="rgb48le")
    frame.color_trc, frame.color_primaries = transfer, primaries
    return frame


def test_pq_is_linear_light_up_to_203_nits() -> None:
    # Signals of 20.3, 100 and 203 cd/m2 in SMPTE ST 2084; brighter light is white.
    frame = rgb_frame([(0.0,) * 3, (0.3584,) * 3, (0.5081,) * 3, (0.5807,) * 3, (0.7518,) * 3], PQ, BT2020)
    found = sdr_pixels(frame, "tonemap")[:, 0]
    wanted = torch.tensor([0, 0.1 ** (1 / 2.4), (100 / 203) ** (1 / 2.4), 1, 1]) * 255
    assert (found - wanted).abs().max() < 0.5


@pytest.mark.parametrize(
    ("transfer", "codes", "wanted"),
    [  # from FFmpeg: zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=clip,zscale=t=bt709:m=bt709:r=pc
        (PQ, (393, 438, 608), (255, 5, 0)),
        (PQ, (530, 424, 474), (27, 255, 0)),
        (PQ, (559, 415, 518), (253, 255, 0)),
        (PQ, (277, 667, 540), (0, 5, 254)),
        (HLG, (646, 350, 446), (14, 255, 8)),
        (HLG, (240, 765, 537), (11, 4, 255)),
        (HLG, (444, 654, 663), (254, 8, 253)),
        (HLG, (721, 512, 512), (255, 255, 255)),
    ],
)
def test_hdr_is_as_ffmpeg_shows_it(transfer: int, codes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    frame = VideoFrame(32, 32, "yuv444p10le")
    for plane, code in zip(frame.planes, codes, strict=True):
        plane.update(np.full(plane.buffer_size // 2, code, np.uint16).tobytes())
    frame.color_trc, frame.color_range = transfer, 1
    found = sdr_pixels(frame, "tonemap")[:, 16, 16]
    assert (found - torch.tensor(wanted)).abs().max() <= 1


@pytest.mark.parametrize(
    ("transfer", "signal", "wanted"),
    [  # a highlight fades to white
        (PQ, (0.996, 0.0, 0.0), (255, 204, 208)),
        (PQ, (0.8779, 0.0, 0.9941), (204, 143, 255)),
        (HLG, (0.7471, 0.7471, 0.7471), (255, 255, 255)),
    ],
)
def test_rgb_in_hdr_is_within_a_few_steps_of_ffmpeg(
    transfer: int, signal: tuple[float, ...], wanted: tuple[int, ...]
) -> None:
    found = sdr_pixels(rgb_frame([signal], transfer, UNSPECIFIED), "tonemap")[:, 0, 0]
    assert (found - torch.tensor(wanted)).abs().max() <= 3


def test_wide_gamuts_become_bt709() -> None:
    # Colours of BT.709 in linear light, seen through the chromaticities of ITU-R BT.2020 and back.
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, 0.1], [1.0, 1.0, 1.0], [0.0, 0.3, 0.9]])
    to_wide = torch.tensor([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    wide = [tuple(row) for row in ((colours @ to_wide.T) ** (1 / 2.4)).tolist()]
    found = sdr_pixels(rgb_frame(wide, BT709, BT2020), "tonemap")[:, 0].T
    # Near black, rounded coefficients show: 0.001 of light is 14 steps of 255.
    assert (found / 255 - colours ** (1 / 2.4)).abs().mean() < 0.005


def test_hdr_may_be_skipped_and_unknown_matrices_are() -> None:
    with pytest.raises(ClipError, match="HDR: PQ, and hdr=skip"):
        sdr_pixels(rgb_frame([(0.5, 0.5, 0.5)], PQ, BT2020), "skip")
    frame = bars(1, False, 16)
    frame.colorspace = 14  # ICtCp
    with pytest.raises(ClipError, match="unsupported colours: matrix 14"):
        sdr_pixels(frame, "tonemap")


def write(path: Path, pictures: list[np.ndarray], sar: Fraction = Fraction(1), filters: str = "null") -> Path:
    """Write pictures (h, w, 3) without loss, through a filter of FFmpeg."""
    graph = Graph()
    height, width = pictures[0].shape[:2]
    start = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 16))
    name, _, options = filters.partition("=")
    graph.link_nodes(start, graph.add(name, options or None), graph.add("buffersink")).configure()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb" if path.suffix == ".mp4" else "ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = height, width, "rgb24" if path.suffix == ".mp4" else "bgr0"
        stream.options = {"crf": "0", "preset": "ultrafast"} if path.suffix == ".mp4" else {}
        stream.codec_context.sample_aspect_ratio = sar
        for number, picture in enumerate(pictures):
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 16)
            graph.vpush(frame)
            container.mux(stream.encode(graph.vpull()))
        container.mux(stream.encode())
    return path


def corners() -> np.ndarray:
    """Paint the quarters of a picture red, green, blue and white."""
    picture = np.zeros((32, 64, 3), np.uint8)
    for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]):
        picture[number // 2 * 16 :, number % 2 * 32 :][:16, :32] = colour
    return picture


@pytest.mark.parametrize(
    ("matrix", "wanted"),
    [
        ((1, 0, 0, 1), "RGBW"),
        ((-1, 0, 0, 1), "GRWB"),
        ((1, 0, 0, -1), "BWRG"),
        ((-1, 0, 0, -1), "WBGR"),
        ((0, 1, -1, 0), "BRWG"),
        ((0, -1, 1, 0), "GWRB"),
        ((0, 1, 1, 0), "RBGW"),
        ((0, -1, -1, 0), "WGBR"),
    ],
)
def test_display_matrices(tmp_path: Path, matrix: tuple[int, int, int, int], wanted: str) -> None:
    path = write(tmp_path / "a.mp4", [corners()] * 2)
    data, none = path.read_bytes(), struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(none, data.index(b"tkhd"))  # the matrix of the track
    a, b, c, d = (value << 16 for value in matrix)
    path.write_bytes(data[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[place + 36 :])
    shown = read_clip(path, 1, 32, 32, 16.0)[:, 0]
    names = {(True, False, False): "R", (False, True, False): "G", (False, False, True): "B", (True, True, True): "W"}
    places = [(5, 5), (5, 26), (26, 5), (26, 26)]
    assert "".join(names[tuple((shown[:, y, x] > 0).tolist())] for y, x in places) == wanted


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_photos_are_turned_as_their_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(corners()).save(path, exif=exif)
    with Image.open(path) as photo:
        wanted = np.array(ImageOps.exif_transpose(photo).convert("RGB"))
    shown = read_clip(path, 1, wanted.shape[0], wanted.shape[1], 16.0)[:, 0]
    assert (shown - torch.from_numpy(wanted).movedim(2, 0) / 127.5 + 1).abs().mean() < 0.1


def test_anamorphic_pixels_become_square(tmp_path: Path) -> None:
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[16:48, 32:64] = 255  # with pixels twice as wide as high: 64 wide, 32 high
    shown = read_clip(write(tmp_path / "a.mp4", [picture] * 2, Fraction(2)), 1, 64, 192, 16.0)[0, 0] > 0
    assert (int(shown.any(0).sum()), int(shown.any(1).sum())) == (64, 32)


def test_interlaced_frames_lose_their_comb(tmp_path: Path) -> None:
    def field(place: int) -> np.ndarray:
        picture = np.zeros((64, 96, 3), np.uint8)
        picture[:, place : place + 32] = 255
        return picture

    woven = []
    for number in range(4):  # the second field of each frame is half a frame later: the bar has moved by 8 pixels
        picture = field(16 * number)
        picture[1::2] = field(16 * number + 8)[1::2]
        woven.append(picture)
    marked = write(tmp_path / "marked.mkv", woven, filters="setfield=tff")
    plain = write(tmp_path / "plain.mkv", woven)
    comb = [float(read_clip(path, 3, 64, 96, 16.0).diff(dim=2).abs().mean()) for path in (marked, plain)]
    assert comb[0] < comb[1] / 4


def test_an_ordinary_clip_goes_through_no_filter(tmp_path: Path) -> None:
    """Shards of ordinary clips stay equal byte for byte: FFmpeg's own conversion, and nothing else."""
    generator = np.random.default_rng(0)
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 80, "yuv420p"
        for _ in range(2):
            picture = generator.integers(0, 256, (48, 80, 3), dtype=np.uint8)
            container.mux(stream.encode(VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    wanted = fit(torch.from_numpy(frame.to_ndarray(format="rgb24")).movedim(2, 0), 32, 32) / 127.5 - 1
    assert torch.equal(read_clip(path, 1, 32, 32, 16.0)[:, 0], wanted)
