"""Recognises video containers by their first bytes, and counts their video streams.

FFmpeg opens much that is no video: it draws text files as letters, follows playlists, and shows pictures as one frame.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["CONTAINERS", "container_of", "count_video_streams", "kind_of_other", "missing_bytes"]

HEAD = 4096
CONTAINERS = "AVI, MP4 and MOV, Matroska and WebM, MPEG-1, -2 and -TS, H.264, FLV, WMV, Ogg, Y4M, IVF, MXF"
_MAGIC = {
    b"\x1a\x45\xdf\xa3": "Matroska",
    b"\x00\x00\x01\xba": "MPEG",
    b"\x00\x00\x01\xb3": "MPEG",
    b"FLV\x01": "FLV",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": "WMV",
    b"OggS": "Ogg",
    b"YUV4MPEG2 ": "Y4M",
    b"DKIF": "IVF",
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01": "MXF",
    b"\x00\x00\x00\x01\x67": "H.264",
    b"\x00\x00\x00\x01\x09": "H.264",
    b"\x00\x00\x01\x67": "H.264",
}
_MP4_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}
_PICTURE_BRANDS = {b"heic", b"heix", b"heif", b"mif1", b"msf1", b"avif", b"avis", b"crx "}
_OTHERS = {
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"GIF8": "a GIF picture",
    b"BM": "a BMP picture",
    b"II*\x00": "a TIFF picture",
    b"MM\x00*": "a TIFF picture",
    b"PK": "a ZIP archive or office file",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"%PDF": "a PDF file",
    b"#EXTM3U": "a playlist",
    b"ffconcat": "a playlist",
    b"ID3": "a sound file",
    b"fLaC": "a sound file",
    b"\x93NUMPY": "a numpy file: give it from Python",
}
_MOST_HEADER = 64_000_000
_SEGMENT, _TRACKS, _TRACK_ENTRY, _TRACK_TYPE = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\x83"


def container_of(head: bytes) -> str | None:
    """Return the container that a file's first bytes (`HEAD` of them) name, None for none that is taken."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    if head[4:8] in _MP4_BOXES:
        return None if head[4:8] == b"ftyp" and head[8:12] in _PICTURE_BRANDS else "MP4"
    packets = [(188, 0), (192, 4)]
    if any(len(head) > 2 * step + at and all(head[at + n * step] == 0x47 for n in range(3)) for step, at in packets):
        return "MPEG-TS"
    return None


def kind_of_other(head: bytes) -> str:
    """Say what a file is that is no video."""
    if not head:
        return "an empty file"
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            return kind
    if head[4:8] == b"ftyp":
        return "a HEIF or AVIF picture"
    if not head.strip(b"\0"):
        return "a file of zeros: a damaged copy"
    try:
        text = head[: HEAD - 4].decode("utf-8")
    except UnicodeDecodeError:
        return "of no format that is known here"
    return "a text file" if "\0" not in text else "of no format that is known here"


def count_video_streams(file: BinaryIO, container: str) -> int:
    """Return how many video streams a file announces; 1 where its container is not looked into."""
    file.seek(0)
    if container == "AVI":
        return len(re.findall(rb"strh.{4}vids", file.read(1_000_000), re.DOTALL))
    if container == "MP4":
        return len(re.findall(rb"hdlr.{8}vide", _mp4_index(file), re.DOTALL))
    if container == "Matroska":
        return _matroska_streams(file.read(4_000_000))
    return 1


def missing_bytes(file: BinaryIO, container: str) -> int:
    """Return how many bytes a file is shorter than it says; 0 where its container does not say."""
    size = file.seek(0, 2)
    file.seek(0)
    told = 0
    if container == "AVI":
        told = 8 + int.from_bytes(file.read(8)[4:], "little")
    elif container == "MP4":
        while told < size:
            file.seek(told)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:], "big") if length == 1 else length
            if length < 8:
                return 0
            told += length
    elif container == "Matroska":
        head = file.read(HEAD)
        at = head.find(_SEGMENT)
        if at < 0 or at + 4 >= len(head):
            return 0
        length, start = _size_at(head, at + 4)
        told = start + length if length >= 0 else 0
    return max(told - size, 0)


def _mp4_index(file: BinaryIO) -> bytes:
    """Return the box `moov`, which describes the streams; nothing where there is none.

    Source: ISO/IEC 14496-12, 4.2.
    """
    while len(head := file.read(8)) == 8:
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        used = 8
        if size == 1:
            size, used = int.from_bytes(file.read(8), "big"), 16
        if kind == b"moov":
            return file.read(min(size - used, _MOST_HEADER) if size > used else _MOST_HEADER)
        if size < used:
            break
        file.seek(size - used, 1)
    return b""


def _matroska_streams(content: bytes) -> int:
    """Source: RFC 8794 (EBML) and RFC 9559: Segment, Tracks, TrackEntry, and TrackType, which is 1 for a video."""
    count = 0
    for segment in _elements(content, _SEGMENT):
        for tracks in _elements(segment, _TRACKS):
            for entry in _elements(tracks, _TRACK_ENTRY):
                count += any(kind == b"\x01" for kind in _elements(entry, _TRACK_TYPE))
            return count
    return count


def _elements(content: bytes, wanted: bytes) -> Iterator[bytes]:
    """Yield the content of each element of this id, cut where `content` ends; an element of unknown size has it all."""
    place = 0
    while place < len(content):
        width = _width(content[place])
        kind = content[place : place + width]
        place += width
        if place >= len(content):
            return
        size, place = _size_at(content, place)
        size = len(content) if size < 0 else size
        if kind == wanted:
            yield content[place : place + size]
        place += size


def _size_at(content: bytes, place: int) -> tuple[int, int]:
    """Return the size that stands at `place`, -1 for one that is not known, and where the element's content begins."""
    width = _width(content[place])
    size = int.from_bytes(content[place : place + width], "big") & ((1 << (7 * width)) - 1)
    return (-1 if size == (1 << (7 * width)) - 1 else size), place + width


def _width(first: int) -> int:
    return 9 - first.bit_length() if first else 8
