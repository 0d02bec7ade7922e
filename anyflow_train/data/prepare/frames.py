"""Frames of a video file in the order and for the time that a player shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import av
from av import VideoFrame
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.stream import VideoStream

# A gap in the times is a hole from this length on (in seconds, and in average frames): a player shows a still picture.
HOLE_SECONDS, HOLE_FRAMES = 1.0, 10

# A file may be a list of addresses (HLS, concat). Only formats that hold their own pictures are read, from files alone.
OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,"
    "m4v,mjpeg,mxf,dv,ivf,nut,rm,yuv4mpegpipe,apng,obu,wtv,vc1,image2,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe",
    "protocol_whitelist": "file",
}


class ClipError(Exception):
    """A clip cannot be used. The message is the reason: a few words, and details after a colon."""


@contextmanager
def open_video(source: Path | BinaryIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file, or its bytes, and choose the stream that a player shows.

    Raises:
        ClipError: there is no video stream that can be decoded.
        FFmpegError, OSError: the file cannot be opened.
    """
    # With `file:` a name like `http:/host/a.mp4` is a file's name, and not an address that FFmpeg opens.
    name = f"file:{source}" if isinstance(source, Path) else source
    with av.open(name, "r", options=OPTIONS) as container:
        moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not moving:
            kinds = {"cover art" if stream.type == "video" else stream.type for stream in container.streams}
            raise ClipError(f"no video: the file holds {' and '.join(sorted(kinds)) or 'nothing'}")
        stream = next((stream for stream in moving if stream.disposition & Disposition.default), moving[0])
        # Theora repeats a picture by an empty packet, which has to find the picture before it decoded.
        stream.thread_type = "SLICE" if stream.codec_context.name == "theora" else "AUTO"
        yield container, stream


def is_picture(container: InputContainer) -> bool:
    """Return whether the file is a picture that does not move, such as a JPEG or PNG."""
    if container.name.lower().endswith((".mjpeg", ".mjpg")):  # a row of JPEGs, which FFmpeg takes for one
        return False
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def stated_duration(container: InputContainer, stream: VideoStream) -> float | None:
    """Return the duration in seconds that the file states; None if it states none."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def duration(container: InputContainer, stream: VideoStream) -> float:
    """Return the duration of the pictures in seconds. All of the file is read, as it may state more than it holds."""
    packets = [(one.pts, one.duration or 0) for one in container.demux(stream) if one.size]
    step = 1 / (float(stream.average_rate or 0) or 25.0)
    times = [(start, start + length) for start, length in packets if start is not None]
    if stream.time_base is None or not times:
        return len(packets) * step
    first, last = min(start for start, _ in times), max(times)
    found = float((last[1] - first) * stream.time_base) + (step if last[0] == last[1] else 0)
    return found if stream.duration is None else min(found, float(stream.duration * stream.time_base))


def shown_frames(container: InputContainer, stream: VideoStream) -> Iterator[tuple[VideoFrame, float]]:
    """Yield each frame with the time (seconds after the first frame) until which a player shows it.

    Raises:
        ClipError: after the last good frame, if a frame is damaged or the times jump.
        FFmpegError: the data cannot be decoded.
    """
    step = 1 / (float(stream.average_rate or 0) or 25.0)
    previous: VideoFrame | None = None
    first = time = 0.0
    for number, frame in enumerate(_deinterlaced(_decoded(container, stream))):
        now = number * step if frame.time is None else frame.time
        if previous is None:
            first = time = now
        jump = not -HOLE_SECONDS <= now - time <= max(HOLE_SECONDS, HOLE_FRAMES * step)
        if previous is not None:
            yield previous, (time + step if jump else now) - first
        if jump:
            raise ClipError(f"hole: the picture after {time - first:.2f} s is of {now - first:.2f} s")
        if frame.is_corrupt:
            raise ClipError(f"damaged: the picture at {now - first:.2f} s cannot be decoded without errors")
        previous, time = frame, now
    if previous is not None:
        last = float(previous.duration * previous.time_base) if previous.duration and previous.time_base else 0
        yield previous, time - first + (last or step)


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    frame = None
    for packet in container.demux(stream):
        if packet.size or packet.dts is None:  # the last packet is empty and has no time: it ends the decoder's delay
            for frame in packet.decode():
                yield frame
        elif frame is not None:
            frame.pts = packet.pts
            yield frame


def _deinterlaced(frames: Iterable[VideoFrame]) -> Iterator[VideoFrame]:
    """Replace interlaced frames by full pictures. A video without such frames does not go through a filter."""
    graph, shape = None, None
    for frame in frames:
        now = (frame.width, frame.height, frame.format.name)
        if graph is not None and now != shape:
            yield from _filtered(graph, None)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, shape = _deinterlacer(frame), now
        if graph is None:
            yield frame
        else:
            yield from _filtered(graph, frame)
    if graph is not None:
        yield from _filtered(graph, None)


def _deinterlacer(frame: VideoFrame) -> Graph:
    graph = Graph()
    start = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or None
    )
    graph.link_nodes(start, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")).configure()
    return graph


def _filtered(graph: Graph, frame: VideoFrame | None) -> Iterator[VideoFrame]:
    """Give a frame, or the end of the video, to a filter, and yield the frames that it returns."""
    graph.push(frame)
    while True:
        try:
            yield cast(VideoFrame, graph.pull())
        except (BlockingIOError, EOFError):
            return
