"""Compressing an archive while it is written, and reading it again, in constant memory and to the last byte."""

from __future__ import annotations

import importlib
import zlib
from typing import Any, Final, Protocol

from ..errors import ConfigurationError, IntegrityError
from .formats import GZIP, ZSTD
from .tar import BLOCK, is_header

_MAGIC: Final = {b"\x28\xb5\x2f\xfd": ZSTD, b"\x1f\x8b\x08": GZIP}
_WINDOW_LOG: Final = 23
"""8 MiB: no archive may ask for more memory."""
_LEVEL: Final = 3
_READ_BYTES: Final = 1 << 18
_SLACK_BYTES: Final = 64 << 20
"""So many bytes may come out of whatever few."""


_OTHERS: Final = {
    b"PK": "it is a .zip",
    b"7z\xbc\xaf\x27\x1c": "it is a .7z",
    b"BZh": "it is packed with bzip2",
    b"\xfd7zXZ\0": "it is packed with xz",
    b"SQLite format 3\0": "it is a file of SQLite",
}
"""How files begin that are taken for archives; more than two bytes where text could begin so."""
_OTHER_HINT: Final = "They are .tar.zst or .tar.gz. One that was packed again can be unpacked, and its folder named."


class File(Protocol):
    """A file that is open in binary mode."""

    def read(self, size: int = -1, /) -> bytes: ...
    def write(self, data: bytes, /) -> int: ...


def zstd_or_none() -> Any:
    """Return the module for Zstandard; None if this Python has none."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def zstd() -> Any:
    """Return the module for Zstandard.

    Raises:
        ConfigurationError: It is not installed.
    """
    module = zstd_or_none()
    if module is None:
        raise ConfigurationError(
            "tar.zst needs Zstandard, which this Python does not have.",
            hint="pip install 'flatfile-chat-database[zstd]', or use tar.gz.",
        )
    return module


def best() -> str:
    """Return the packing that is used when none is named."""
    return ZSTD if zstd_or_none() is not None else GZIP


def packing_of(beginning: bytes) -> str | None:
    """Return how a file is packed that begins so; None if it is in no way that we know."""
    return next((packing for magic, packing in _MAGIC.items() if beginning.startswith(magic)), None)


def is_packed_otherwise(beginning: bytes) -> bool:
    """Tell whether a file that begins so is an archive of another kind, or a tar that is not compressed."""
    return beginning.startswith(tuple(_OTHERS)) or is_header(beginning[:BLOCK])


def _other(beginning: bytes) -> str:
    if not beginning:
        return "it is empty"
    if is_header(beginning[:BLOCK]):
        return "it is a tar that is not compressed"
    found = next((what for magic, what in _OTHERS.items() if beginning.startswith(magic)), None)
    return found or "it does not begin as a .tar.zst or .tar.gz does"


class Packer:
    """Compresses what is written to it into a file."""

    def __init__(self, file: File, packing: str) -> None:
        """Write to `file`, which stays open."""
        self._file = file
        if packing == ZSTD:
            module = zstd()
            options = {
                module.CompressionParameter.compression_level: _LEVEL,
                module.CompressionParameter.checksum_flag: 1,
                module.CompressionParameter.window_log: 21,
            }
            self._compressor: Any = module.ZstdCompressor(options=options)
        else:
            self._compressor = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: with the header of gzip

    def write(self, data: bytes) -> None:
        self._write(self._compressor.compress(data))

    def finish(self) -> None:
        """Write what is left."""
        self._write(self._compressor.flush())

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]  # type: ignore[arg-type]


class Unpacker:
    """What was compressed into a file, as a stream; ends only where the compressed data ends and nothing follows."""

    def __init__(self, file: File, *, name: str, most_ratio: int | None) -> None:
        """Read `file`, which stays open, and refuse more than `most_ratio` bytes for each compressed one.

        Errors call it by `name`.

        Raises:
            IntegrityError: It is packed in no way that we know.
            ConfigurationError: What unpacks it is not installed.
        """
        self._file = file
        self._most_ratio = most_ratio
        self._input = file.read(_READ_BYTES)
        self.taken = len(self._input)
        """Compressed bytes that were read."""
        self.given = 0
        """Bytes that came out."""
        packing = packing_of(self._input)
        if packing is None:
            raise IntegrityError(f"{name} is no archive of chatdb: {_other(self._input)}.", hint=_OTHER_HINT)
        self._is_zstd = packing == ZSTD
        if packing == ZSTD:
            module = zstd()
            self._error: type[Exception] = module.ZstdError
            self._decompressor: Any = module.ZstdDecompressor(
                options={module.DecompressionParameter.window_log_max: _WINDOW_LOG}
            )
        else:
            self._error = zlib.error
            self._decompressor = zlib.decompressobj(31)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, `size` being more than 0; none only at the end.

        Raises:
            IntegrityError: The compressed data is damaged, truncated, or followed by something.
        """
        while not self._decompressor.eof:
            if not self._input and (not self._is_zstd or self._decompressor.needs_input):
                self._input = self._file.read(_READ_BYTES)
                self.taken += len(self._input)
                if not self._input:
                    raise IntegrityError("The compressed data ends too early: the archive is truncated.")
            try:
                data: bytes = self._decompressor.decompress(self._input, size)
            except self._error as error:
                raise IntegrityError(f"The compressed data is damaged: {error}.") from error
            self._input = b"" if self._is_zstd else self._decompressor.unconsumed_tail
            if data:
                self.given += len(data)
                self._check_ratio()
                return data
        if self._decompressor.unused_data or self._file.read(1):
            raise IntegrityError("Something follows the compressed data: two archives in one, or another file behind.")
        return b""

    def _check_ratio(self) -> None:
        if self._most_ratio is None or self.given <= _SLACK_BYTES:
            return
        if self.given > self.taken * self._most_ratio:
            raise IntegrityError(
                f"More than {self._most_ratio:,} bytes come out of each byte of the archive.",
                hint="If you made it yourself and know why, allow a higher ratio.",
            )
