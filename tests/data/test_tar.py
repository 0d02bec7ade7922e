import io
import tarfile

import pytest

from anyflow_train.data.tar import Member, TarWriter, key_and_extension, scan

FILES = {"a.txt": b"one", "deep/er.json": b"x" * 513, "b" * 150 + ".bin": b"", "c.d.e": b"y" * 512}


def written() -> tuple[bytes, list[Member]]:
    file = io.BytesIO()
    tar = TarWriter(file)
    members = [tar.add(name, data) for name, data in FILES.items()]
    tar.finish()
    return file.getvalue(), members


def test_the_standard_library_reads_what_is_written() -> None:
    data, _ = written()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert {info.name: archive.extractfile(info).read() for info in archive} == FILES  # pyright: ignore


def test_places_are_those_of_the_bytes() -> None:
    data, members = written()
    assert [data[m.offset : m.offset + m.size] for m in members] == list(FILES.values())
    samples, damage = scan(io.BytesIO(data))
    assert [member for files in samples.values() for member in files.values()] == members
    assert damage is None


@pytest.mark.parametrize("keep", [0, 100, 600, 1024, 2048, 2500])
def test_a_truncated_tar_gives_its_complete_files_and_says_so(keep: int) -> None:
    data, members = written()
    samples, damage = scan(io.BytesIO(data[:keep]))
    assert damage
    found = [member for files in samples.values() for member in files.values()]
    assert found == [m for m in members if m.offset + m.size <= keep and (m.size or m.offset <= keep)]


def test_key_and_extension_follow_webdataset() -> None:
    assert key_and_extension("dir.x/clip.left.MP4") == ("dir.x/clip", "left.mp4")
