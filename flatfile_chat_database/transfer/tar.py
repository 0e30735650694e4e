"""The members of a tar stream, in the one form that archives have. On disk, do not change.

Read by nobody but ourselves, with no `tarfile` and nothing like `extract`: a header is taken only if it is, byte for
byte, the one that is written here for a file of that name and size. So there is no link, device, sparse file, second
name, second size or foreign extension to be careful with. Any `tar` can read and unpack what is written.

The form is that of POSIX (pax): a ustar header of a regular file, and before it, only where the name or the size does
not fit in, one extended header with the two.
"""

from __future__ import annotations

from typing import Final, Protocol

from ..errors import IntegrityError

BLOCK: Final = 512
_END: Final = bytes(2 * BLOCK)
_MOST_OCTAL: Final = 8**11
_MOST_EXTENDED: Final = 8 * BLOCK
_EXTENDED_NAME: Final = b"././@PaxHeader"

_KINDS: Final = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a pipe",
    b"7": "a contiguous file",
    b"g": "a global extended header",
    b"K": "a long link name of GNU tar",
    b"L": "a long name of GNU tar",
    b"M": "the rest of a file of another volume",
    b"N": "an old long name of GNU tar",
    b"S": "a sparse file",
    b"V": "a volume label",
    b"X": "an extended header of Solaris",
    b"\0": "a file in the old form, without its kind",
}


_PLAIN: Final = (b"0", b"\0", b"5")
"""What other programs make of the files of an archive, and of the folders around them."""
_REPACKED: Final = (
    "If another program packed it again, unpack it into an empty folder (`tar -C FOLDER -xf FILE`) and name that."
)


class Stream(Protocol):
    """What is read from."""

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes; none only at the end."""


def padding(size: int) -> bytes:
    """Return what follows a member of so many bytes."""
    return bytes(-size % BLOCK)


def end() -> bytes:
    """Return what follows the last member."""
    return _END


def header(name: str, size: int, moment: int) -> bytes:
    """Return what stands before a file in a tar stream.

    Args:
        name: Its name in the archive.
        size: Bytes.
        moment: The time of its last change, in seconds since 1970.
    """
    path = name.encode()
    if len(path) <= 100 and size < _MOST_OCTAL:
        return _block(path, size, moment, b"0")
    records = _record("path", path)
    if size >= _MOST_OCTAL:
        records += _record("size", b"%d" % size)
    short = path[:100].decode(errors="ignore").encode()
    return b"".join(
        (
            _block(_EXTENDED_NAME, len(records), moment, b"x"),
            records,
            padding(len(records)),
            _block(short, min(size, _MOST_OCTAL - 1), moment, b"0"),
        )
    )


def read_header(stream: Stream) -> tuple[str, int, int] | None:
    """Return the name, size and time of the next member; None at the end of the archive.

    Raises:
        IntegrityError: What comes is none of the headers that are written here.
    """
    block = exactly(stream, BLOCK, "a header")
    if block == _END[:BLOCK]:
        if exactly(stream, BLOCK, "the end of the archive") != _END[:BLOCK]:
            raise IntegrityError("The archive has one empty header and goes on behind it.")
        return None
    read = block
    found: dict[str, bytes] = {}
    if block[156:157] == b"x":
        length = _number(block, 124, 12)
        if length > _MOST_EXTENDED:
            raise IntegrityError(f"{_name(block)}: an extended header of {length:,} bytes.")
        records = exactly(stream, length + len(padding(length)), "an extended header")
        found = _records(_name(block), records[:length])
        block = exactly(stream, BLOCK, "a header")
        read += records + block
    try:
        name = found["path"].decode() if "path" in found else block[:100].rstrip(b"\0").decode()
        size = int(found["size"]) if "size" in found else _number(block, 124, 12)
        moment = _number(block, 136, 12)
        expected = header(name, size, moment)
    except ValueError as error:
        raise IntegrityError(f"{_name(block)}: the header of the member cannot be read: {error}.") from error
    if expected != read:
        raise IntegrityError(
            f"{_name(block)}: {_why_not(block)}.",
            hint=_REPACKED if block[156:157] in _PLAIN and is_header(block) else None,
        )
    return name, size, moment


def is_header(block: bytes) -> bool:
    """Tell whether a block is a header of a tar stream, whoever wrote it."""
    blank = block[:148] + b" " * 8 + block[156:]
    digits = block[148:156].strip(b"\0 ")
    return len(block) == BLOCK and digits.isdigit() and digits.lstrip(b"0") == b"%o" % sum(blank)


def exactly(stream: Stream, size: int, what: str) -> bytes:
    """Return so many bytes.

    Raises:
        IntegrityError: There are fewer.
    """
    pieces = []
    while size:
        piece = stream.read(min(size, 1 << 20))
        if not piece:
            raise IntegrityError(f"The archive ends in the middle of {what}: it is truncated.")
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _block(name: bytes, size: int, moment: int, kind: bytes) -> bytes:
    fields = b"".join(
        (
            name.ljust(100, b"\0"),
            b"0000600\0",
            b"0000000\0",
            b"0000000\0",
            b"%011o\0" % size,
            b"%011o\0" % moment,
            b" " * 8,
            kind,
            bytes(100),
            b"ustar\x0000",
            bytes(64),
            b"0000000\0",
            b"0000000\0",
        )
    ).ljust(BLOCK, b"\0")
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _record(key: str, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (key.encode(), value)
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def _records(member: str, data: bytes) -> dict[str, bytes]:
    """Return the records of an extended header; whether they are in their one form is looked at later."""
    found: dict[str, bytes] = {}
    while data:
        digits = data.partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise IntegrityError(f"{member}: an extended header that is damaged.")
        if key not in (b"path", b"size") or key.decode() in found:
            raise IntegrityError(
                f"{member}: an extended header with {ascii(key.decode(errors='replace'))[:50]}.", hint=_REPACKED
            )
        found[key.decode()] = value[:-1]
        data = data[length:]
    return found


def _number(block: bytes, start: int, length: int) -> int:
    text = block[start : start + length].rstrip(b"\0 ")
    if not text.isdigit():
        raise IntegrityError(f"{_name(block)}: its header has {ascii(text)[1:60]} where a number should be.")
    try:
        return int(text, 8)
    except ValueError as error:
        raise IntegrityError(f"{_name(block)}: its header has {ascii(text)[1:60]} for a number.") from error


def _name(block: bytes) -> str:
    return ascii(block[:100].rstrip(b"\0").decode(errors="replace"))[1:-1] or "A member without a name"


def _why_not(block: bytes) -> str:
    """Say what is wrong with a header."""
    kind = block[156:157]
    if kind in _KINDS:
        return f"it is {_KINDS[kind]}; only files are taken"
    if not is_header(block):
        return "its header is damaged (the sum of its bytes is wrong)"
    return "its header is not one that chatdb writes"
