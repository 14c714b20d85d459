"""Unpack tar, tar.gz and zip archives, with bounded memory and disk space."""

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

from occgen_hub.errors import SourceError, shorten_message
from occgen_hub.files import opened, printable, sha256

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")
"""The suffixes of archives, in lower or upper case."""

BLOCK = 4096
"""Bytes counted for each entry in addition to its content, so that empty files count too."""

MAX_ENTRIES = 4_000_000
MAX_LEVELS = 32
MAX_HEADER = 1 << 20
"""Limit of a tar header in bytes, including long names. Real ones have a few hundred."""

MAX_DIRECTORY = 1 << 28
"""Limit of a zip file's list of entries in bytes. It is read into memory."""

MAX_TRAILING = 1 << 26
"""Limit of the bytes after the last entry of a tar. Tools pad it with zeros to 10 kB or so."""

CHUNK = 1 << 18

DOWNLOAD_AGAIN = "download it again, or leave it out"

Reserve = Callable[[int], None]
"""Called with a number of bytes before they are written. Raises if there is no space for them."""


@dataclass(frozen=True)
class Archive:
    """An archive that was unpacked. bytes: size of the file; sha256: of the file."""

    name: str
    bytes: int
    sha256: str


def archive_stem(name: str) -> str | None:
    """The name of an archive without its suffix; None if it is not an archive."""
    lower = name.lower()
    suffix = next((s for s in SUFFIXES if lower.endswith(s) and len(name) > len(s)), None)
    return None if suffix is None else name[: -len(suffix)]


def unpack(path: Path, folder: Path, reserve: Reserve, name: str | None = None) -> Archive:
    """Unpack an archive into an empty folder.

    name: its name in the result and in errors, by default its path. A tar is read once from start
    to end; a zip is read a second time for its checksum. Regular files and hard links to earlier
    files of the archive are unpacked. Names that lead out of the folder, symbolic links, devices
    and pipes are refused. Permissions, owners and times are ignored.

    Raises SourceError if the archive is damaged or refused, and the errors of `reserve`.
    """
    label = name or str(path)
    writer = _Writer(folder, reserve, label)
    with opened(path) as file, _damage(label):
        start = file.read(512)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        if start[:2] == b"\x1f\x8b":
            hashed = _HashingReader(file)
            with gzip.GzipFile(fileobj=io.BufferedReader(hashed, CHUNK)) as plain:
                _unpack_tar(plain, writer)  # type: ignore[arg-type]  # it reads as IO[bytes] does
            return Archive(label, size, hashed.hexdigest())
        if start[257:262] == b"ustar" or (start and not any(start)) or _is_old_tar(start):
            hashed = _HashingReader(file)
            _unpack_tar(io.BufferedReader(hashed, CHUNK), writer)
            return Archive(label, size, hashed.hexdigest())
        if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            _check_directory(file, size, label)
            _unpack_zip(file, writer)
            return Archive(label, size, sha256(path))
    raise SourceError(label, _not_archive(start), DOWNLOAD_AGAIN)


def _not_archive(start: bytes) -> str:
    """Why a file with these first bytes is not an archive."""
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (run git lfs pull)"
    words = "".join(c if c.isprintable() else " " for c in start[:24].decode("ascii", "replace"))
    return f"is neither a gzip, a tar nor a zip file (it begins with {words.strip()!r})"


def _is_old_tar(start: bytes) -> bool:
    """Whether a file starts with a tar header older than POSIX, which has no magic number."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Translate the exceptions that libraries raise for a damaged archive into SourceError."""
    try:
        yield
    except EOFError:
        raise SourceError(name, "is truncated", DOWNLOAD_AGAIN) from None
    except (
        tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError,
        NotImplementedError, RuntimeError, ValueError, OverflowError, UnicodeError,
    ) as error:  # fmt: skip
        problem = (
            f"is damaged ({shorten_message(printable(str(error)) or type(error).__name__, 120)})"
        )
        raise SourceError(name, problem, DOWNLOAD_AGAIN) from None


class _HashingReader(io.RawIOBase):
    """A file that is read from start to end, with its SHA-256."""

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
        """The SHA-256 of the whole file. Reads the rest."""
        while data := self._file.read(CHUNK):
            self._digest.update(data)
        return self._digest.hexdigest()


class _ForwardReader(io.RawIOBase):
    """The uncompressed bytes of a tar, for tarfile, which seeks back by at most one byte.

    Reads of more than MAX_HEADER bytes are refused, because tarfile reads a whole header into
    memory even if it states gigabytes.
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
    stream = _ForwardReader(plain)
    with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all in memory.
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
    rest = 0
    while data := stream.read(CHUNK):  # gzip checks its checksum at the end.
        rest += len(data)
        if rest > MAX_TRAILING:
            raise ValueError(f"it goes on for more than {MAX_TRAILING >> 20} MB after its end")
    if any(stream.tail) or len(stream.tail) < 512:
        raise EOFError  # A complete tar ends with blocks of zeros.


def _check_directory(file: IO[bytes], size: int, name: str) -> None:
    """Raise SourceError if a zip file's list of entries is too large for memory."""
    file.seek(max(0, size - 66_000))
    end = file.read()
    at = end.rfind(b"PK\x05\x06")
    if at >= 0:
        large = end.rfind(b"PK\x06\x06", 0, at)
        listed = end[large + 40 : large + 48] if large >= 0 else end[at + 12 : at + 16]
        if int.from_bytes(listed, "little") > MAX_DIRECTORY:
            raise SourceError(name, "lists more entries than a scene has", DOWNLOAD_AGAIN)
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
    """Writes the entries of an archive into a folder, and nowhere else."""

    def __init__(self, folder: Path, reserve: Reserve, archive: str) -> None:
        self._folder, self._reserve, self._archive = folder, reserve, archive
        self._entries = 0
        self._made = {folder}

    def make_folder(self, name: str) -> None:
        if (path := self._place(name)) != self._folder:
            self._make(path)

    def write(self, name: str, source: IO[bytes], size: int) -> None:
        """Write a file of `size` bytes. Raises EOFError if there are fewer."""
        if (path := self._place(name)) == self._folder:
            self.refuse(name, "is a file without a name")
        with self._named(name):
            self._make(path.parent)
            path.unlink(missing_ok=True)  # The last entry with a name counts.
            with path.open("xb") as target:
                remaining = size
                while remaining > 0 and (data := source.read(min(CHUNK, remaining))):
                    self._reserve(len(data))
                    target.write(data)
                    remaining -= len(data)
        if remaining:
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
        label = printable(name)[:120]
        raise SourceError(
            self._archive,
            f"the entry {label} {printable(problem)[:160]}",
            "pack it again without it",
        )

    def _place(self, name: str) -> Path:
        """The path of an entry. The folder has no symbolic links: checking the name is enough."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            self.refuse(name, "leads out of the archive")
        if "\0" in name or len(parts) > MAX_LEVELS:
            self.refuse(name, "has an invalid name")
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            problem = f"has more than {MAX_ENTRIES:,} entries, the limit of a scene"
            raise SourceError(self._archive, problem, DOWNLOAD_AGAIN)
        self._reserve(BLOCK)
        return self._folder.joinpath(*parts)

    def _make(self, path: Path) -> None:
        if path not in self._made:
            with self._named(path.name):
                missing = [p for p in (path, *path.parents[: MAX_LEVELS + 1]) if not p.exists()]
                for place in reversed(missing):
                    self._reserve(BLOCK)
                    place.mkdir()
            self._made = {self._folder, path}  # Entries next to one another share their folder.

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Translate errors caused by the entry into SourceError."""
        try:
            yield
        except (
            FileExistsError, IsADirectoryError, NotADirectoryError, FileNotFoundError,
        ) as error:  # fmt: skip
            self.refuse(name, f"cannot be unpacked ({error.strerror})")
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.refuse(name, "has an invalid name")
            raise
