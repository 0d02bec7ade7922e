"""Local and remote folders of shards. Whole remote files are copied into a bounded cache that processes share."""

from __future__ import annotations

import fcntl
import http.client
import logging
import os
import re
import shlex
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from anyflow_train.files import open_inside, read_inside

CHUNK = 1 << 20
TIMEOUT_SECONDS = 60
ATTEMPTS = 4
RETRY_SECONDS = 1.0
GOPEN_SCHEMES = ("gs", "hf", "ais", "sftp", "ftps", "scp", "htgs")

log = logging.getLogger(__name__)


def is_remote(location: str) -> bool:
    """Whether a location is a URL (`http://`, `s3://`, `pipe:...`) and not a local folder."""
    return location.startswith("pipe:") or "://" in location


def public_location(location: str) -> str:
    """Shorten a location for messages: a password, a signature or a header in it is a secret.

    A command keeps its first word, and a URL loses its user, password and parameters.
    """
    if location.startswith("pipe:"):
        return f"{location.split(maxsplit=1)[0]} ..."
    if not is_remote(location):
        return location
    return re.sub(r"//[^/@]*@", "//", location.partition("?")[0].partition("#")[0], count=1)


@dataclass(frozen=True)
class LocalFolder:
    """A local folder."""

    root: Path

    def read_bytes(self, name: str) -> bytes:
        """Read a small file. Raises OSError."""
        return read_inside(self.root, name)

    def open(self, name: str, size: int | None) -> int:
        """Open a file for reading. The caller closes the descriptor. Raises OSError."""
        return open_inside(self.root, name)

    def cancel(self) -> None:
        """Do nothing: local files are not copied."""


@dataclass
class RemoteFolder:
    """A URL prefix, or a URL with `{}` in place of the file name (`pipe:ssh host cat /data/{}`).

    Attributes:
        url: URL prefix.
        cache: folder of the copies; any number of processes may share it.
        limit: bytes of copies to keep; the least recently used are deleted first.
        version: prefix of the copies' names; it differs when the shards at the URL change.
    """

    url: str
    cache: Path
    limit: int
    version: str
    _stop: threading.Event = field(default_factory=threading.Event)
    _failed: dict[str, OSError] = field(default_factory=dict)

    def read_bytes(self, name: str) -> bytes:
        """Read a small file without caching it. Raises OSError."""
        with open_url(self._url_of(name)) as stream:
            return stream.read()

    def open(self, name: str, size: int | None) -> int:
        """Open the local copy of a file, and make the copy if it is missing. The caller closes the descriptor.

        Args:
            name: file name.
            size: expected size in bytes, if known.

        Raises:
            OSError: the file cannot be copied. This process does not try the same file again.
        """
        if name in self._failed:
            raise self._failed[name]
        copy = self.cache / f"{self.version}-{name.replace('/', '_')}"
        while True:
            try:
                descriptor = os.open(copy, os.O_RDONLY)
            except FileNotFoundError:  # not there yet, or just removed by another process
                self._fetch(name, copy, size)
            else:
                # Eviction goes by this time of last use. The kernel's own clock for it is too coarse.
                os.utime(descriptor, ns=(time.time_ns(), time.time_ns()))
                return descriptor

    def cancel(self) -> None:
        """Stop copies that are in progress in any thread. Their readers get an OSError."""
        self._stop.set()

    def _url_of(self, name: str) -> str:
        # A shell runs the command of a pipe, so it must take the name as one word.
        name = shlex.quote(name) if self.url.startswith("pipe:") else name
        return self.url.replace("{}", name) if "{}" in self.url else f"{self.url.rstrip('/')}/{name}"

    def _fetch(self, name: str, copy: Path, size: int | None) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        with _locked(self.cache / f".{copy.name}.lock"):
            if copy.exists():  # another process made it while this one waited
                return
            part = self.cache / f".{copy.name}.part"
            try:
                self._copy_with_retries(name, part, size)
            except OSError as error:
                part.unlink(missing_ok=True)
                if not self._stop.is_set():
                    self._failed[name] = error
                raise
            os.replace(part, copy)
        self._evict(keep=copy)

    def _copy_with_retries(self, name: str, part: Path, size: int | None) -> None:
        for attempt in range(ATTEMPTS):
            try:
                return self._copy(name, part, size)
            except OSError as error:
                if isinstance(error, FileNotFoundError) or self._stop.is_set() or attempt + 1 == ATTEMPTS:
                    raise
                log.warning("copying %s from %s failed (%s); trying again", name, public_location(self.url), error)
                time.sleep(RETRY_SECONDS * 2**attempt)

    def _copy(self, name: str, part: Path, size: int | None) -> None:
        with open_url(self._url_of(name)) as stream, open(part, "wb") as file:
            while chunk := stream.read(CHUNK):
                if self._stop.is_set():
                    raise OSError("the copy was cancelled")
                file.write(chunk)
                if size is not None and file.tell() > size:
                    raise OSError(f"more bytes arrived than the {size} that the manifest says")
            copied = file.tell()
        if size is not None and copied != size:
            raise OSError(f"{copied} bytes arrived, but the manifest says {size}")

    def _evict(self, keep: Path) -> None:
        with _locked(self.cache / ".evict.lock"):
            copies = [(entry.stat(), entry) for entry in self.cache.iterdir() if not entry.name.startswith(".")]
            total = sum(stat.st_size for stat, _ in copies)
            for stat, entry in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
                if total <= self.limit:
                    return
                if entry != keep:
                    entry.unlink(missing_ok=True)
                    total -= stat.st_size


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """Open a URL as a stream of bytes. A shell runs the command of a `pipe:` URL.

    The standard library reads http(s), webdataset its schemes, fsspec the rest.

    Raises:
        FileNotFoundError: the URL does not exist.
        OSError: any other failure.
    """
    scheme = url.partition(":")[0]
    try:
        if scheme in ("http", "https"):
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as stream:
                yield stream
        elif scheme == "pipe":
            with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
                yield process.stdout  # pyright: ignore[reportReturnType] # not None: stdout is a pipe
            if process.returncode:
                raise OSError(f"{public_location(url)}: the command ended with exit code {process.returncode}")
        elif scheme in GOPEN_SCHEMES:
            from webdataset.gopen import gopen  # slow import

            with gopen(url, "rb") as stream:
                yield stream  # pyright: ignore[reportReturnType]
        else:
            import fsspec

            with fsspec.open(url, "rb") as stream:
                yield stream  # pyright: ignore[reportReturnType]
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"{public_location(url)}: {error}") from error
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace(url, public_location(url))) from error
    except (ValueError, ImportError, http.client.HTTPException) as error:
        reason = str(error).replace(url, "its address")
        raise OSError(f"{public_location(url)}: {reason}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock against other processes and threads. The lock of a killed process is released."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
