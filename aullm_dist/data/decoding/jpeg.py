"""Finds damage in JPEG and PNG files that decoders accept: zeroed regions, missing ends, wrong checksums.

libjpeg draws whatever the damaged bits happen to say, and Pillow does not ask it for its warnings.
"""

import re
import zlib

__all__ = ["jpeg_damage", "png_damage"]

_ZEROS = bytes(32)
"""A run of zeros that entropy-coded data does not hold by chance; a lost disk sector is 512 bytes or more."""
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_EOI, _SOS, _DHT, _DQT, _SOF2 = 0xD9, 0xDA, 0xC4, 0xDB, 0xC2
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def jpeg_damage(content: bytes) -> str:
    """Return what is wrong with a JPEG file besides what its decoder refuses; empty where nothing is.

    Source: ITU-T T.81, annex B (markers) and C (Huffman codes).
    """
    zero_codes: dict[int, int] = {}
    place, scans, progressive = 2, 0, False
    while found := _NEXT_MARKER.search(content, place):
        marker, start = content[found.start() + 1], found.end()
        if content[place : found.start()].strip(b"\xff"):
            return f"{found.start() - place} bytes from byte {place} on belong to no segment: a damaged copy"
        if marker == _EOI:
            return "" if scans else "it has no image data: a damaged copy"
        place = start + int.from_bytes(content[start : start + 2], "big")
        parameters = content[start + 2 : place]
        progressive = progressive or marker == _SOF2
        if marker == _DHT and not _add_zero_codes(parameters, zero_codes):
            return f"the Huffman tables at byte {start} are none: a damaged copy"
        if marker == _DQT and not _may_quantise(parameters):
            return f"the quantisation tables at byte {start} are none: a damaged copy"
        if marker == _SOS:
            scans += 1
            after = _NEXT_MARKER.search(content, place)
            stop = after.start() if after else len(content)
            zeros = content.find(_ZEROS, place, stop)
            if zeros >= 0 and not _may_be_flat(parameters, zero_codes, progressive):
                return f"{_run(content, zeros)} bytes from byte {zeros} on are zero: a damaged copy"
            place = stop
    return "it has no end marker: it was cut short"


def _add_zero_codes(tables: bytes, found: dict[int, int]) -> bool:
    """Add for each Huffman table (class * 16 + id) the symbol whose code is all zeros, the first of the shortest.

    Returns false where the bytes are no tables: of another length than they say, or with two codes for one symbol.
    """
    place = 0
    while place + 17 <= len(tables):
        count = sum(tables[place + 1 : place + 17])
        symbols = tables[place + 17 : place + 17 + count]
        if not symbols or len(set(symbols)) < count:
            return False
        found[tables[place]] = symbols[0]
        place += 17 + count
    return place == len(tables)


def _may_quantise(tables: bytes) -> bool:
    """Whether no step of a quantisation table is zero."""
    place = 0
    while place < len(tables):
        width = 2 if tables[place] >> 4 else 1
        steps = tables[place + 1 : place + 1 + 64 * width]
        if len(steps) < 64 * width or any(not any(steps[at : at + width]) for at in range(0, 64 * width, width)):
            return False
        place += 1 + 64 * width
    return True


def _may_be_flat(scan: bytes, zero_codes: dict[int, int], progressive: bool) -> bool:
    """Whether zeros may be a flat area: in every table the code of zeros says `as before` or `nothing more`.

    In the scans of a progressive file that hold no DC they cannot: there flat areas are counted, not repeated.
    """
    count = scan[0] if scan else 0
    if not count or len(scan) < 4 + 2 * count:
        return False
    first, last, approximation = scan[1 + 2 * count], scan[2 + 2 * count], scan[3 + 2 * count] >> 4
    if progressive and first > 0:
        return False
    if progressive and approximation:
        return True
    tables = [scan[2 + 2 * component] for component in range(count)]
    level = all(zero_codes.get(table >> 4) == 0 for table in tables)
    return level and ((progressive and last == 0) or all(zero_codes.get(0x10 | (table & 15)) == 0 for table in tables))


def _run(content: bytes, start: int) -> int:
    return len(content) - start - len(content[start:].lstrip(b"\0"))


def png_damage(content: bytes) -> str:
    """Return which chunk of a PNG file does not bear its checksum, or that the last is missing; empty if none.

    Source: PNG specification, 5.3; Pillow does not compare the checksums of image data.
    """
    place = len(_PNG_SIGNATURE)
    while place + 12 <= len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        kind, end = content[place + 4 : place + 8], place + 8 + length
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return f"chunk {kind.decode('latin-1')!r} at byte {place} does not bear its checksum: a damaged copy"
        if kind == b"IEND":
            return ""
        place = end + 4
    return "it has no end chunk: it was cut short"
