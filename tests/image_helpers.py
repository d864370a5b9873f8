"""Image files that Pillow reads and does not write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

_CHANNELS = {"grey": (0, 1), "RGB": (2, 3), "grey with alpha": (4, 2), "RGBA": (6, 4)}  # PNG's number, and how many
DEEP = tuple(_CHANNELS)


def write_deep_png(path: Path, kind: str, *, width: int = 6, height: int = 4) -> None:
    """A PNG of 16 bits a channel, all of it 300."""
    colour_type, channels = _CHANNELS[kind]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = (b"\0" + struct.pack(">H", 300) * width * channels) * height
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
