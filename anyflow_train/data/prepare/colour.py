"""Colours of a decoded frame as an SDR screen shows them: BT.709 primaries, full range, 8 bits per channel.

Most frames need only their matrix and range, which FFmpeg's scaler applies. It clips colours outside of BT.709 wrongly,
and its tone mapping is far from a player's. So wide gamuts and HDR are converted here, in linear light.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from av import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from torch import Tensor

from anyflow_train.data.prepare.frames import ClipError

Hdr = Literal["tonemap", "skip"]
"""tonemap: show HDR as an SDR screen does. skip: a clip in HDR cannot be used."""

# Matrices of ITU-T H.273 that FFmpeg's scaler knows. Others, such as ICtCp of Dolby Vision, would show false colours.
RGB, BT709, UNSPECIFIED, BT601, BT2020 = 0, 1, 2, 5, 9
MATRICES = {RGB, BT709, UNSPECIFIED, 4, BT601, 6, 7, BT2020}
HD_LINES = 720  # a picture without tags is BT.709 from this height on, and BT.601 below it

SDR_GAMMA = 2.4  # ITU-R BT.1886
SDR_WHITE = 203.0  # cd/m2, ITU-R BT.2408
PQ_PEAK = 10_000.0  # cd/m2
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2  # of the reference display of ITU-R BT.2100
BT2020_LUMA = (0.2627, 0.6780, 0.0593)
# FFmpeg's scaler multiplies by 256 to get from 8 to 16 bits, also if it reads 10 bits of limited range.
MOST, SCALER_WHITE = 0xFFFF, 0xFF00
HIGHLIGHT = 2.0  # luminance, in units of the white of SDR, from which colours fade to white
HDR_NAMES = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}

# Linear RGB of other primaries -> linear RGB of BT.709, both with the white of D65.
TO_BT709 = {
    int(ColorPrimaries.BT2020): (
        (1.660491, -0.587641, -0.072850),
        (-0.124550, 1.132900, -0.008349),
        (-0.018151, -0.100579, 1.118730),
    ),
    int(ColorPrimaries.SMPTE432): (  # Display P3
        (1.224940, -0.224940, 0.0),
        (-0.042057, 1.042057, 0.0),
        (-0.019638, -0.078636, 1.098274),
    ),
}


def sdr_pixels(frame: VideoFrame, hdr: Hdr) -> Tensor:
    """Convert a frame to RGB as an SDR screen shows it.

    Args:
        frame: decoded frame; what its tags leave open follows the usual rules of players.
        hdr: whether frames in HDR (PQ or HLG) are converted.

    Returns:
        (3, h, w) in 0..255: uint8 for most frames, float32 for those in HDR or with a wide gamut.

    Raises:
        ClipError: the colour matrix is not supported, or the frame is in HDR and `hdr` is "skip".
    """
    name = HDR_NAMES.get(frame.color_trc)
    if name and hdr == "skip":
        raise ClipError(f"HDR: {name}, and hdr=skip")
    primaries = int(ColorPrimaries.BT2020) if name and frame.color_primaries == UNSPECIFIED else frame.color_primaries
    matrix = _matrix(frame, name)
    if not name and primaries not in TO_BT709:
        return _rgb(frame, "rgb24", matrix)
    full = frame.color_range == ColorRange.JPEG or frame.format.is_rgb
    white = MOST if full and frame.format.components[0].bits > 8 else SCALER_WHITE
    light = _light(frame.color_trc if name else None, white)[_rgb(frame, "rgb48le", matrix).long()]
    if primaries in TO_BT709:
        light = torch.einsum("dc,chw->dhw", torch.tensor(TO_BT709[primaries]), light)
    if name:
        light = _clip_highlights(light)
    return light.clamp(0, 1) ** (1 / SDR_GAMMA) * 255


def _clip_highlights(light: Tensor) -> Tensor:
    """Bring linear light (3, h, w) to at most 1 without changing hues, as FFmpeg's filter `tonemap=clip` does."""
    luma = torch.einsum("c,chw->hw", torch.tensor(BT2020_LUMA), light)
    white = (luma - HIGHLIGHT).clamp(min=0) / luma.clamp(min=1e-6)  # a light this bright has no colour
    light = light.lerp(luma.expand_as(light), white.expand_as(light))
    return light / light.amax(0).clamp(min=1)


def _matrix(frame: VideoFrame, hdr: str | None) -> int | None:
    """Return the colour matrix; None for RGB."""
    if frame.format.is_rgb:
        return None
    if frame.colorspace not in MATRICES:
        raise ClipError(f"unsupported colours: matrix {frame.colorspace} of ITU-T H.273")
    if frame.colorspace not in (UNSPECIFIED, RGB):
        return frame.colorspace
    return BT2020 if hdr else BT709 if frame.height >= HD_LINES else BT601


def _rgb(frame: VideoFrame, form: str, matrix: int | None) -> Tensor:
    pixels = frame.to_ndarray(format=form, src_colorspace=matrix)
    return torch.from_numpy(pixels.astype(np.int32) if form == "rgb48le" else pixels).movedim(2, 0)


@lru_cache
def _light(transfer: int | None, white: int) -> Tensor:
    """Tabulate the linear light of the 65,536 signals of a channel, of which `white` is 1; light 1 is SDR's white."""
    signal = torch.arange(MOST + 1, dtype=torch.float64) / white
    if transfer == ColorTrc.SMPTE2084:  # the constants of SMPTE ST 2084
        power = signal ** (4096 / (2523 * 128))
        ratio = (power - 3424 / 4096).clamp(min=0) / (2413 / 128 - 2392 / 128 * power)
        light = ratio ** (16384 / 2610) * (PQ_PEAK / SDR_WHITE)
    elif transfer == ColorTrc.ARIB_STD_B67:  # ITU-R BT.2100, table 5
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = torch.where(signal <= 0.5, signal**2 / 3, (((signal - c) / a).exp() + b) / 12)
        light = scene**HLG_GAMMA * (HLG_PEAK / SDR_WHITE)  # per channel, as FFmpeg's zscale does
    else:
        light = signal**SDR_GAMMA
    return light.float()
