"""Write the moving shapes as a user would bring data: a folder of mp4 clips with a caption beside each."""

from collections.abc import Callable
from pathlib import Path

import av
import torch
from torch import Tensor

from anyflow_train.files import atomic_file, begin_results, check_results
from anyflow_train.tiny import shapes

SETTINGS_FILE = "clips.json"
CLIPS = "[0-9][0-9][0-9][0-9][0-9].*"
_BATCH = 48  # clips drawn at once: about 40 MB


def write_clips(folder: Path, count: int, seed: int, advance: Callable[[int], None] = lambda count: None) -> list[Path]:
    """Write `count` clips `00000.mp4`, `00000.txt`, ... of `draw_clips(count, seed)`.

    Every file appears under its name only when it is complete, and files that are there already are kept, so an
    interrupted call is continued by the same call. A finished folder costs no rendering. `advance` is called with the
    number of clips that are there, and after each new clip.

    Returns:
        The mp4 files in order.

    Raises:
        UserError: the folder holds clips of another count or seed.
    """
    settings = {"world": "shapes", "count": count, "seed": seed}
    check_results(folder, SETTINGS_FILE, settings, (path.name for path in folder.glob(CLIPS)))
    begin_results(folder, SETTINGS_FILE, settings)
    paths = [folder / f"{index:05d}.mp4" for index in range(count)]
    missing = [i for i, path in enumerate(paths) if not (path.exists() and path.with_suffix(".txt").exists())]
    advance(count - len(missing))
    drawn = shapes.draw(count, seed)
    for start in range(0, len(missing), _BATCH):
        part = missing[start : start + _BATCH]
        clips = shapes.render(drawn.labels[part], drawn.start[part], drawn.contrast[part])
        for index, clip in zip(part, clips, strict=True):
            _write_video(paths[index], clip, shapes.FRAMES_PER_SECOND)
            with atomic_file(paths[index].with_suffix(".txt")) as file:
                file.write(f"{shapes.CAPTIONS[drawn.labels[index]]}\n".encode())
            advance(1)
    return paths


def _write_video(path: Path, clip: Tensor, fps: int) -> None:
    """Writes (3, F, H, W) in [-1, 1] as h264 with full colour resolution: 4:2:0 would smear the edges."""
    pixels = ((clip.movedim(0, -1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = pixels.shape[2], pixels.shape[1]
        stream.pix_fmt = "yuv444p"
        stream.options = {"crf": "6", "preset": "fast"}
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
