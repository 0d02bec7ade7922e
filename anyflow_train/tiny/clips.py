"""Write the moving shapes as a user would bring data: a folder of mp4 clips with a caption beside each."""

from collections.abc import Callable
from pathlib import Path

from anyflow_train.data.mp4 import to_frames, write_h264
from anyflow_train.files import atomic_file, begin_results, check_results
from anyflow_train.tiny import shapes

SETTINGS_FILE = "clips.json"
CLIPS = "[0-9][0-9][0-9][0-9][0-9].*"
OPTIONS = {"crf": "6", "preset": "fast"}  # of libx264
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
            # With full colour resolution: 4:2:0 would smear the edges.
            write_h264(paths[index], to_frames(clip), shapes.FRAMES_PER_SECOND, "yuv444p", OPTIONS)
            with atomic_file(paths[index].with_suffix(".txt")) as file:
                file.write(f"{shapes.CAPTIONS[drawn.labels[index]]}\n".encode())
            advance(1)
    return paths
