"""Lines of files, pipes and standard input: decoded, bounded in length, and counted where they are odd.

The encoding is UTF-8, or the one that a byte order mark names. Lines end with LF or CRLF, or with CR where there is no
LF.
"""

from __future__ import annotations

import codecs
import io
import itertools
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from offramp.errors import UsageError, missing, shown
from offramp.units import format_size

MAX_TEXT_BYTES = 1 << 20
"""Bytes read of a line of plain text. The rest is skipped: it lies far behind the longest text that a model reads."""
MAX_ROW_BYTES = 4 << 20
"""Largest line, and largest field, of a table. A longer one is refused, since a row cannot be cut."""
MAX_PLACES = 5
"""Number of places that a message lists."""
Line = Tuple[str, str]
"""Position of a line (`FILE:LINE`), and its text with the line break."""
Log = Callable[[str], None]
"""Function that receives one line of progress or a notice."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks, the longest first, and the encodings that they name. UTF-8's is removed when a line is decoded."""
_PACKED = (
    (b"\x1f\x8b", "gzip data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"\x04\x22\x4d\x18", "LZ4 data"),
)
"""First bytes of compressed data, and their names."""
_BZIP2_MARKS = (b"1AY&SY", b"\x17rE8P\x90")
"""Bytes from the fifth on of bzip2 data: of a block, and of the end of empty data. A text may begin with BZh."""
_ARCHIVES = (
    (b"PK\3\4", "a zip archive, such as an Excel workbook (.xlsx) or an OpenDocument sheet (.ods)"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document, such as an Excel workbook (.xls)"),
    (b"Rar!\x1a\7", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
)
"""First bytes of files that hold others, or tables, and their names."""
_PARQUET = b"PAR1\x15"
"""First bytes of a Parquet file, and of its first page header."""
_BINARY = (
    (b"ARROW1\0\0", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"FEA1\0\0\0\0", "a Feather file"),
    (b"Obj\1", "an Avro file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x80\4\x95", "a pickle"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
"""First bytes of files of other kinds, and their names. Each has a byte that no text has."""
_PRINTABLE = (
    (re.compile(rb"%PDF-[12]\.\d\s*(?:[\r\n]|\Z)"), "a PDF document"),
    (re.compile(rb"\{\\rtf1\s*(?:[{\\]|\Z)"), "an RTF document"),
)
"""First lines of files of characters, and their names. A text may begin in the same way, with more behind it."""
POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of the file that Git puts in the place of a large one."""
_AS_UTF8 = "save it as UTF-8"


def silent(line: str) -> None:
    """Discard a line."""


class Notes:
    """Counts of odd rows by kind, with the places of the first of each kind."""

    def __init__(self, log: Log = silent) -> None:
        self._log = log
        self._found: Dict[str, Tuple[int, List[str]]] = {}

    def log(self, line: str) -> None:
        """Report a line now."""
        self._log(shown(line))

    def add(self, what: str, place: str) -> None:
        """Count one row."""
        number, places = self._found.get(what, (0, []))
        self._found[what] = number + 1, places if number >= MAX_PLACES else [*places, place]

    def report(self) -> None:
        """Report each kind in one line, and forget it."""
        for what, (number, places) in self._found.items():
            self.log(f"{what}: {number} ({', '.join(places)}{', ...' if number > len(places) else ''})")
        self._found = {}


@contextmanager
def open_source(source: Union[str, Path]) -> Iterator[IO[bytes]]:
    """Open a file or a pipe, or standard input for `-`, which stays open. Raises UsageError, also while it is read."""
    if source == "-" and sys.stdin is None:
        raise UsageError("standard input is closed", source, "name a file, or pipe the inputs into the command")
    try:
        with nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as file:
            yield file
    except FileNotFoundError:
        raise missing(source) from None
    except OSError as error:
        raise UsageError(f"input cannot be read ({error.strerror})", source, "check the path") from None


def is_pipe(source: Union[str, Path]) -> bool:
    """Return whether `source` can be read only once: standard input, a named pipe, or a pipe of the shell."""
    path = Path(source)
    return source == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def lines_of(
    where: object,
    file: IO[bytes],
    notes: Notes,
    longest: int = MAX_ROW_BYTES,
    cut: Optional[Callable[[str], None]] = None,
) -> Iterator[Line]:
    """Yield the lines of a file, which `where` names in errors. A longer line than `longest` bytes is never in memory.

    Args:
        notes: receives the notice that lines end with CR, which is read as LF.
        cut: receives the place of a line of which only the first `longest` bytes are read; None: such a line raises.

    Raises UsageError for a line in another encoding, and for one that is too long.
    """
    number, (file, data) = 1, _as_utf8(where, file, longest)
    if b"\r" in data[:-1] and not data.endswith(b"\n"):
        notes.log(f"{where}: lines end with CR alone, and each CR is read as a line break")
        file = _stream(_with_line_feeds(file, data))
        data = file.readline(longest + 1)
    while data:
        place = f"{where}:{number}"
        is_cut = len(data) > longest and not data.endswith(b"\n")
        if is_cut:
            if cut is None:
                raise UsageError(f"a line of more than {format_size(longest)}", place, "shorten or split it")
            cut(place)
            _skip_line(file, longest)
            data = data[:longest]
        decoder = codecs.getincrementaldecoder("utf-8-sig" if number == 1 else "utf-8")()
        try:
            text = decoder.decode(data, not is_cut)  # the last character of a line that is cut may be incomplete
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
            raise UsageError(what, place, _AS_UTF8) from None
        yield place, text
        number, data = number + 1, file.readline(longest + 1)


def _as_utf8(where: object, file: IO[bytes], longest: int) -> Tuple[IO[bytes], bytes]:
    """Return a file as UTF-8, and its first line, of which at most `longest` + 1 bytes are read."""
    data = file.readline(longest + 1)
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is not None:
        file = _stream(_transcoded(file, data, encoding, where))
        return file, file.readline(longest + 1)
    _require_text(where, data)
    if b"\0" in data[:4]:
        raise UsageError("not UTF-8 (zero bytes, perhaps UTF-16 without a byte order mark)", where, _AS_UTF8)
    return file, data


def _skip_line(file: IO[bytes], step: int) -> None:
    """Read to the end of a line, `step` bytes at a time."""
    while file.readline(step)[-1:] not in (b"", b"\n"):
        pass


def _require_text(where: object, data: bytes) -> None:
    """Raise UsageError if the first bytes of a file are those of a file of another kind."""
    packed = next((name for mark, name in _PACKED if data.startswith(mark)), None)
    if packed is not None and (packed != "bzip2 data" or data[4:].startswith(_BZIP2_MARKS)):
        raise UsageError(f"{packed}, not text", where, "decompress it")
    archive = next((name for mark, name in _ARCHIVES if data.startswith(mark)), None)
    if archive is not None:
        raise UsageError(f"{archive}, not text", where, "export the sheet as CSV, or unpack the archive")
    if data.startswith(_PARQUET):
        raise UsageError("a Parquet file, not text", where, "name it .parquet, or give --input-format parquet")
    binary = next((name for mark, name in _BINARY if data.startswith(mark)), None)
    binary = binary or next((name for pattern, name in _PRINTABLE if pattern.match(data)), None)
    if binary is not None:
        raise UsageError(f"{binary}, not text", where, "save its texts as CSV, JSON lines or Parquet")
    if data.startswith(POINTER):
        raise UsageError("a pointer of Git LFS, not the file itself", where, "fetch the file: git lfs pull")


def _chunks(file: IO[bytes], first: bytes) -> Iterator[bytes]:
    """Yield `first`, what follows it in a file, and an empty chunk at the end."""
    return itertools.chain([first], iter(lambda: file.readline(io.DEFAULT_BUFFER_SIZE), b""), [b""])


def _transcoded(file: IO[bytes], first: bytes, encoding: str, where: object) -> Iterator[bytes]:
    """Yield the text of a file in another encoding as UTF-8."""
    decoder = codecs.getincrementaldecoder(encoding)()
    for chunk in _chunks(file, first):
        try:
            yield decoder.decode(chunk, not chunk).encode()
        except UnicodeError as error:
            raise UsageError(f"damaged text ({error})", where, _AS_UTF8) from None


def _with_line_feeds(file: IO[bytes], first: bytes) -> Iterator[bytes]:
    """Yield the bytes of a file with LF in place of each CR and CRLF."""
    held = b""
    for chunk in _chunks(file, first):
        text = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""  # an LF may follow
        yield text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _stream(chunks: Iterator[bytes]) -> IO[bytes]:
    """Return chunks of bytes as a stream."""
    return io.BufferedReader(_Joined(chunks))


class _Joined(io.RawIOBase):
    """Stream of chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)
