"""Archives, unpacked at a bounded cost: tar, plain or gzipped, and zip."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from occgen_hub.errors import SourceError, in_brief
from occgen_hub.files import opened, printable, sha256

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
"""How the name of an archive ends, in small or capital letters."""

BLOCK = 4096
"""Bytes that an entry takes on disk at least, which empty files would not count otherwise."""

MAX_ENTRIES = 4_000_000
MAX_LEVELS = 32
MAX_HEADER = 1 << 20
"""Bytes of a tar header, long names included; real ones have a few hundred."""

MAX_DIRECTORY = 1 << 28
"""Bytes of a zip file's list of entries, which is read whole."""

CHUNK = 1 << 18

AGAIN = "fetch it again from where it came from, or leave it out"

Reserve = Callable[[int], None]
"""Called with bytes before they are written; raises where there is no room for them."""


@dataclass(frozen=True)
class Archive:
    """What an archive was when it was read. bytes: its size; sha256: of the file itself."""

    name: str
    bytes: int
    sha256: str


def archive_stem(name: str) -> str | None:
    """The name of a file without the ending of an archive; None where it is none."""
    lower = name.lower()
    suffix = next((s for s in SUFFIXES if lower.endswith(s) and len(name) > len(s)), None)
    return None if suffix is None else name[: -len(suffix)]


def unpack(path: Path, folder: Path, reserve: Reserve, name: str | None = None) -> Archive:
    """Unpack an archive into an empty folder, and return what it was.

    name: what it is called in the result and in errors, its path if not given. A tar is read front
    to back once; a zip is read once more for its checksum. Regular files and hard links to earlier
    files of the archive are unpacked. Names that lead out of the folder, symbolic links, devices
    and pipes are refused. Permissions, owners and times are not taken over.

    Raises SourceError where the archive is damaged or refused, and whatever `reserve` raises.
    """
    said = name or str(path)
    writer = _Writer(folder, reserve, said)
    with opened(path) as file, _damage(said):
        start = file.read(512)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        if start[:2] == b"\x1f\x8b":
            hashed = _Hashed(file)
            with gzip.GzipFile(fileobj=io.BufferedReader(hashed, CHUNK)) as plain:
                _unpack_tar(plain, writer)  # type: ignore[arg-type]  # it reads as IO[bytes] does
            return Archive(said, size, hashed.hexdigest())
        if start[257:262] == b"ustar" or (start and not any(start)) or _is_old_tar(start):
            hashed = _Hashed(file)
            _unpack_tar(io.BufferedReader(hashed, CHUNK), writer)
            return Archive(said, size, hashed.hexdigest())
        if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            _check_directory(file, size, said)
            _unpack_zip(file, writer)
            return Archive(said, size, sha256(path))
    raise SourceError(said, _no_archive(start), AGAIN)


def _no_archive(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself (git lfs pull fetches that)"
    words = "".join(c if c.isprintable() else " " for c in start[:24].decode("ascii", "replace"))
    return f"is neither a gzip, a tar nor a zip file (it begins with {words.strip()!r})"


def _is_old_tar(start: bytes) -> bool:
    """Whether a file begins with a tar header of before POSIX, which has no mark of its own."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """What libraries raise in the middle of a damaged archive, as one sentence."""
    try:
        yield
    except EOFError:
        raise SourceError(name, "is cut off before its end", AGAIN) from None
    except (
        tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
        NotImplementedError, RuntimeError, ValueError, OverflowError, UnicodeError,
    ) as error:  # fmt: skip
        problem = f"is damaged ({in_brief(printable(str(error)) or type(error).__name__, 120)})"
        raise SourceError(name, problem, AGAIN) from None


class _Hashed(io.RawIOBase):
    """A file that is read front to back, and its SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    def hexdigest(self) -> str:
        """Of all that was read, once the end is reached."""
        while data := self._file.read(CHUNK):
            self._digest.update(data)
        return self._digest.hexdigest()


class _Forward(io.RawIOBase):
    """The uncompressed bytes of a tar, for tarfile, which goes back by one byte at most.

    Reads of more than MAX_HEADER bytes are refused, as tarfile asks for the whole of a header that
    claims gigabytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._position, self._back = file, 0, False
        self.tail = b""
        """The last 512 bytes that were read."""

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        if size and self._back:
            self._back, self._position = False, self._position + 1
            return self.tail[-1:] + self.read(size - 1)
        data = self._file.read(size)
        self._position += len(data)
        self.tail = (self.tail + data)[-512:]
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            raise tarfile.ReadError("a header that leads backward")
        if position == self._position - 1 and self.tail and not self._back:
            self._back, self._position = True, position
        if position < self._position:
            raise tarfile.ReadError("a header that leads backward")
        while position > self._position:
            if not self.read(min(CHUNK, position - self._position)):
                raise EOFError
        return position


def _unpack_tar(plain: IO[bytes], writer: _Writer) -> None:
    stream = _Forward(plain)
    with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # It keeps all, and memory would grow.
            if member.isdir():
                writer.make_folder(member.name)
            elif member.islnk():
                writer.link(member.name, member.linkname)
            elif member.issym():
                writer.refuse(member.name, f"is a symbolic link to {member.linkname}")
            elif not member.isreg() or member.issparse():
                kind = "a sparse file" if member.issparse() else "a device, a pipe or the like"
                writer.refuse(member.name, f"is {kind}")
            else:
                source = tar.extractfile(member)
                assert source is not None
                writer.write(member.name, source, member.size)
    while stream.read(CHUNK):  # To the end, where the checksum of gzip is looked at.
        pass
    if any(stream.tail) or len(stream.tail) < 512:
        raise EOFError  # A tar ends with blocks of zeros.


def _check_directory(file: IO[bytes], size: int, name: str) -> None:
    """Raise SourceError where a zip file's list of entries does not belong in memory."""
    file.seek(max(0, size - 66_000))
    end = file.read()
    at = end.rfind(b"PK\x05\x06")
    if at >= 0:
        large = end.rfind(b"PK\x06\x06", 0, at)
        listed = end[large + 40 : large + 48] if large >= 0 else end[at + 12 : at + 16]
        if int.from_bytes(listed, "little") > MAX_DIRECTORY:
            raise SourceError(name, "lists more entries than a scene has", AGAIN)
    file.seek(0)


def _unpack_zip(file: IO[bytes], writer: _Writer) -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == 3 else 0
            if entry.is_dir():
                writer.make_folder(entry.filename)
            elif entry.flag_bits & 1:
                writer.refuse(entry.filename, "is encrypted")
            elif kind not in (0, stat.S_IFREG):
                what = "a symbolic link" if kind == stat.S_IFLNK else "a device, a pipe or the like"
                writer.refuse(entry.filename, f"is {what}")
            else:
                with archive.open(entry) as source:
                    writer.write(entry.filename, source, entry.file_size)


class _Writer:
    """Writes the entries of an archive below a folder, and nowhere else."""

    def __init__(self, folder: Path, reserve: Reserve, archive: str) -> None:
        self._folder, self._reserve, self._archive = folder, reserve, archive
        self._entries = 0
        self._made = {folder}

    def make_folder(self, name: str) -> None:
        if (path := self._place(name)) != self._folder:
            self._make(path)

    def write(self, name: str, source: IO[bytes], size: int) -> None:
        """Write a file of `size` bytes; raises EOFError where there are fewer."""
        if (path := self._place(name)) == self._folder:
            self.refuse(name, "is a file without a name")
        with self._named(name):
            self._make(path.parent)
            path.unlink(missing_ok=True)  # A later entry of one name counts.
            with path.open("xb") as target:
                left = size
                while left > 0 and (data := source.read(min(CHUNK, left))):
                    self._reserve(len(data))
                    target.write(data)
                    left -= len(data)
        if left:
            raise EOFError

    def link(self, name: str, target: str) -> None:
        """Link to a file that was unpacked before."""
        path, earlier = self._place(name), self._place(target)
        if not earlier.is_file():
            self.refuse(name, f"is a link to {target}, which does not come before it")
        with self._named(name):
            self._make(path.parent)
            if path != earlier:
                path.unlink(missing_ok=True)
                path.hardlink_to(earlier)

    def refuse(self, name: str, problem: str) -> None:
        """Raise SourceError about an entry."""
        said = printable(name)[:120]
        raise SourceError(
            self._archive,
            f"the entry {said} {printable(problem)[:160]}",
            "pack it again without it",
        )

    def _place(self, name: str) -> Path:
        """Where an entry goes. No link is ever made in the folder, so its name alone decides."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            self.refuse(name, "leads out of the archive")
        if "\0" in name or len(parts) > MAX_LEVELS:
            self.refuse(name, "has a name that no file can have")
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            problem = f"holds more than {MAX_ENTRIES:,} entries, more than a scene has"
            raise SourceError(self._archive, problem, AGAIN)
        self._reserve(BLOCK)
        return self._folder.joinpath(*parts)

    def _make(self, path: Path) -> None:
        if path not in self._made:
            with self._named(path.name):
                missing = [p for p in (path, *path.parents[: MAX_LEVELS + 1]) if not p.exists()]
                for place in reversed(missing):
                    self._reserve(BLOCK)
                    place.mkdir()
            self._made = {self._folder, path}  # Neighbours in the archive share it.

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Errors that the entry is to blame for, as one sentence."""
        try:
            yield
        except (
            FileExistsError, IsADirectoryError, NotADirectoryError, FileNotFoundError,
        ) as error:  # fmt: skip
            self.refuse(name, f"cannot be unpacked ({error.strerror})")
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.refuse(name, "has a name that no file can have")
            raise
