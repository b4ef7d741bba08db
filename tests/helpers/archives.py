"""Archives written byte by byte from the definition of their format, not with the readers' twins."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

MAGIC = 0xCED7230A


def recordio_frame(data: bytes) -> bytes:
    """One record, cut into parts where the magic word stands at a multiple of 4 (dmlc-core recordio.cc)."""
    magic = struct.pack("<I", MAGIC)
    cuts = [i for i in range(0, len(data) - len(data) % 4, 4) if data[i : i + 4] == magic]
    starts, ends = [0, *(cut + 4 for cut in cuts)], [*cuts, len(data)]
    framed = b""
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        kind = 0 if not cuts else 1 if number == 0 else 3 if number == len(cuts) else 2
        part = data[start:end]
        framed += struct.pack("<2I", MAGIC, kind << 29 | len(part)) + part + bytes(-len(part) % 4)
    return framed


def image_record(image: bytes, *labels: float) -> bytes:
    """MXNet's image header; more than one label moves all of them behind it."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], 0, 0) + image
    return struct.pack("<IfQQ", len(labels), 0.0, 0, 0) + struct.pack(f"<{len(labels)}f", *labels) + image


def write_recordio(
    folder: Path, images: Sequence[tuple[bytes, float]], *, identities: int, tables: bool = True
) -> Path:
    """`train.rec`, `train.idx`, `property` as InsightFace ships them; without `tables` record 0 is an image."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [image_record(image, label) for image, label in images]
    if tables:
        first = len(records) + 1
        zero = struct.pack("<IfQQ", 2, 0.0, 0, 0) + struct.pack("<2f", first, first + identities)
        ranges = [struct.pack("<IfQQ", 2, 0.0, 0, 0) + struct.pack("<2f", 1, 2) for _ in range(identities)]
        records = [zero, *records, *ranges]
    content, index = b"", ""
    for number, record in enumerate(records):
        index += f"{number}\t{len(content)}\n"
        content += recordio_frame(record)
    (folder / "train.rec").write_bytes(content)
    (folder / "train.idx").write_text(index)
    (folder / "property").write_text(f"{identities},112,112")
    return folder


def tar_bytes(members: Sequence[tuple[str, bytes]], *, kind: bytes = b"0", end: bool = True) -> bytes:
    """A tar of the classic layout (POSIX.1-1988)."""
    content = b""
    for name, data in members:
        header = bytearray(512)
        header[: len(name.encode())] = name.encode()
        header[100:108] = b"0000644\0"
        header[108:124] = b"0000000\0" * 2
        header[124:136] = b"%011o\0" % len(data)
        header[136:148] = b"%011o\0" % 0
        header[148:156] = b" " * 8
        header[156:157] = kind
        header[257:265] = b"ustar\x0000"
        header[148:156] = b"%06o\0 " % sum(header)
        content += bytes(header) + data + bytes(-len(data) % 512)
    return content + (bytes(1024) if end else b"")


def zip_bytes(
    members: Mapping[str, bytes],
    *,
    deflate: bool = False,
    zip64: bool = False,
    flags: int = 0,
    claim: int | None = None,
) -> bytes:
    """A zip (PKWARE APPNOTE); `claim` lies about the unpacked size, `zip64` writes every size the wide way."""
    content, central = b"", b""
    for name, data in members.items():
        encoded = name.encode()
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(data) + packer.flush() if deflate else data
        size, offset = len(data) if claim is None else claim, len(content)
        fields = (flags, 8 if deflate else 0, 0, 0, zlib.crc32(data), len(packed), size, len(encoded))
        content += struct.pack("<4s5H3L2H", b"PK\3\4", 20, *fields, 0) + encoded + packed
        wide = struct.pack("<2H3Q", 1, 24, size, len(packed), offset) if zip64 else b""
        shown = (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF) if zip64 else (len(packed), size, offset)
        central += struct.pack(
            "<4s6H3L5H2L",
            *(b"PK\1\2", 45, 20, *fields[:4], fields[4], shown[0], shown[1]),
            *(len(encoded), len(wide), 0, 0, 0, 0, shown[2]),
        )
        central += encoded + wide
    start = len(content)
    if zip64:
        end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(members), len(members), len(central), start)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(central), 1)
        return (
            content
            + central
            + end
            + locator
            + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
        )
    count = len(members)
    return content + central + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(central), start, 0)
