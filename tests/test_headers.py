"""The header pass: what it reads, how it fails, and that nothing but DecodeError ever comes out of it."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from nbvision.codecs import Header, decode, headers, read_header
from nbvision.errors import CompileError, DecodeError, InputError

ORIENTATION = 0x0112


def picture(height: int = 40, width: int = 56, mode: str = "RGB") -> Image.Image:
    ramp = np.add.outer(np.arange(height) * 3, np.arange(width) * 2).astype(np.uint8)
    return Image.fromarray(np.dstack([ramp, ramp.T.reshape(ramp.shape), 255 - ramp])).convert(mode)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def kind_of(data: bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        read_header(data)
    return caught.value.kind


FILES = {
    "jpeg": encode(picture(), "JPEG"),
    "progressive jpeg": encode(picture(), "JPEG", progressive=True),
    "gray jpeg": encode(picture(mode="L"), "JPEG"),
    "cmyk jpeg": encode(picture(mode="CMYK"), "JPEG"),
    "png": encode(picture(), "PNG"),
    "palette png": encode(picture().quantize(16), "PNG"),
    "rgba png": encode(picture(mode="RGBA"), "PNG"),
    "webp": encode(picture(), "WEBP"),
    "lossless webp": encode(picture(mode="RGBA"), "WEBP", lossless=True),
    "extended webp": encode(picture(mode="RGBA"), "WEBP", exif=exif(6)),
    "bmp": encode(picture(), "BMP"),
    "tiff": encode(picture(), "TIFF"),
    "lzw tiff": encode(picture(), "TIFF", compression="tiff_lzw"),
    "big tiff": encode(picture(), "TIFF", big_tiff=True),
    "gif": encode(picture().quantize(16), "GIF"),
    "jpeg 2000": encode(picture(), "JPEG2000"),
    "bare jpeg 2000": encode(picture(mode="L"), "JPEG2000", no_jp2=True),
    "lossy jpeg 2000 with alpha": encode(picture(mode="RGBA"), "JPEG2000", irreversible=True, quality_layers=[20]),
    "avif": encode(picture(), "AVIF"),
    "turned avif with alpha": encode(picture(mode="RGBA"), "AVIF", exif=exif(7)),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_reads_format_and_size(data: bytes) -> None:
    header = read_header(data)
    assert (header.format, header.height, header.width) == (Image.open(io.BytesIO(data)).format.lower(), 40, 56)
    assert header.complete


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_reads_orientation(format: str, orientation: int) -> None:
    data = encode(picture(), format, exif=exif(orientation))
    header = read_header(data)
    assert header.orientation == orientation
    assert header.oriented_size == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size[::-1]


def test_reads_big_endian_exif_and_exif_after_the_pixels_of_a_png() -> None:
    tags = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, ORIENTATION, 3, 1, 6, 0) + bytes(4)
    jpeg = FILES["jpeg"]
    assert read_header(jpeg[:2] + segment(0xE1, b"Exif\0\0" + tags) + jpeg[2:]).orientation == 6
    png = FILES["png"]
    chunk = struct.pack(">I4s", len(tags), b"eXIf") + tags + bytes(4)
    assert read_header(png[:-12] + chunk + png[-12:]).orientation == 6


@pytest.mark.parametrize(
    "tags", [b"", b"II*\0", b"XX*\0" + bytes(20), b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(11)]
)
def test_broken_exif_means_upright(tags: bytes) -> None:
    jpeg = FILES["jpeg"]
    assert read_header(jpeg[:2] + segment(0xE1, b"Exif\0\0" + tags) + jpeg[2:]).orientation == 1


def test_orientation_out_of_range_means_upright() -> None:
    assert read_header(encode(picture(), "JPEG", exif=exif(9))).orientation == 1


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@pytest.mark.parametrize(
    ("name", "variant", "colorspace", "channels"),
    [
        ("jpeg", "baseline", "ycbcr", 3),
        ("progressive jpeg", "progressive", "ycbcr", 3),
        ("gray jpeg", "baseline", "gray", 1),
        ("cmyk jpeg", "baseline", "cmyk", 4),
    ],
)
def test_reads_how_a_jpeg_is_coded(name: str, variant: str, colorspace: str, channels: int) -> None:
    header = read_header(FILES[name])
    assert (header.variant, header.colorspace, header.channels) == (variant, colorspace, channels)
    assert header.progressive is (variant == "progressive")


def test_reads_a_jpeg_that_stores_rgb() -> None:
    assert read_header(encode(picture(), "JPEG", keep_rgb=True)).colorspace == "rgb"


def test_bytes_after_the_end_are_fine() -> None:
    for data in FILES.values():
        assert read_header(data + b"trailing bytes").complete


def test_fill_bytes_between_segments_are_fine() -> None:
    jpeg = FILES["jpeg"]
    assert read_header(jpeg[:2] + b"\xff" * 7 + jpeg[2:]) == read_header(jpeg)


# The end of a GIF is for the decoder to find; Pillow's TIFFs may end in tags.
ENDS_ARE_SEEN = {name: data for name, data in FILES.items() if not data.startswith((b"GIF", b"II"))}


@pytest.mark.parametrize("data", ENDS_ARE_SEEN.values(), ids=ENDS_ARE_SEEN.keys())
def test_a_cut_file_is_never_complete(data: bytes) -> None:
    for length in range(16, len(data) - 1, 7):
        assert cut_is_seen(data[:length])


def cut_is_seen(data: bytes) -> bool:
    try:
        return not read_header(data).complete
    except DecodeError as error:
        return error.kind == "truncated"


def test_a_thumbnail_does_not_complete_a_cut_jpeg() -> None:
    jpeg = FILES["jpeg"]
    with_thumbnail = jpeg[:2] + segment(0xE2, FILES["gray jpeg"]) + jpeg[2:]
    assert read_header(with_thumbnail).complete
    assert not read_header(with_thumbnail[:-2]).complete


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"hello", "not_an_image"),
        (bytes(100), "not_an_image"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not_an_image"),
        (b"\xff\xd8", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"\xff\xd8\xff\xd9", "truncated"),
        (b"\xff\xd8\xff\xd9\0\0", "corrupt"),
        (b"\xff\xd8 no marker", "corrupt"),
        (b"\0\0\0\x20ftypavif", "truncated"),
        (b"\0\0\0\x10ftypavif\0\0\0\0", "truncated"),
        (b"\0\0\0\x14ftypmif1\0\0\0\0heic", "unsupported"),
        (b"\0\0\0\x10ftypavif\0\0\0\0\0\0\0\x0cmeta\0\0\0\0", "corrupt"),
        (b"\0\0\0\x20ftypheic", "unsupported"),
        (b"\xff\x0a jxl", "unsupported"),
    ],
)
def test_kinds_of_error(data: bytes, kind: str) -> None:
    assert kind_of(data) == kind


def test_no_pixels_is_corrupt() -> None:
    png = bytearray(FILES["png"])
    png[16:20] = bytes(4)
    assert kind_of(bytes(png)) == "corrupt"


def test_height_after_the_pixels_is_unsupported() -> None:
    jpeg = bytearray(FILES["jpeg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 7] = bytes(2)
    assert kind_of(bytes(jpeg)) == "unsupported"


def test_takes_every_kind_of_buffer() -> None:
    jpeg = FILES["jpeg"]
    for buffer in (bytearray(jpeg), memoryview(jpeg), np.frombuffer(jpeg, np.uint8)):
        assert read_header(buffer) == read_header(jpeg)


@pytest.mark.parametrize("wrong", [None, 3, "a path", np.zeros((4, 4, 3), np.uint8), np.zeros(4, np.float32)])
def test_no_bytes_is_an_input_error(wrong: object) -> None:
    with pytest.raises(InputError):
        read_header(wrong)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A real file with bytes overwritten, most often in its header, then perhaps cut."""
    data = bytearray(draw(st.sampled_from(list(FILES.values()))))
    for _ in range(draw(st.integers(1, 8))):
        position = draw(st.one_of(st.integers(0, 64), st.integers(0, len(data) - 1)))
        data[min(position, len(data) - 1)] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


SIGNATURES = [
    FILES["avif"][:80],
    b"\xff\xd8\xff\xe1",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\xff\0\0\0WEBPVP8",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0+",
]


def test_an_offset_past_all_integers_is_truncated() -> None:
    assert kind_of(b"MM\0+\0\x08\0\0\x80" + bytes(7)) == "truncated"


ANY_BYTES = st.one_of(damaged_files(), st.builds(bytes.__add__, st.sampled_from(SIGNATURES), st.binary(max_size=200)))


@settings(max_examples=500)
@given(ANY_BYTES)
def test_any_bytes_give_a_header_or_a_decode_error(data: bytes) -> None:
    try:
        header = read_header(data)
    except DecodeError:
        return
    assert isinstance(header, Header)
    assert header.height > 0
    assert header.width > 0
    assert 1 <= header.orientation <= 8


# --- many at once ----------------------------------------------------------------------------------------------------


def with_segment(marker: int, body: bytes) -> bytes:
    return FILES["jpeg"][:2] + segment(marker, body) + FILES["jpeg"][2:]


def with_exif(tags: bytes) -> bytes:
    return with_segment(0xE1, b"Exif\0\0" + tags)


ENTRY = struct.pack("<HHIHxx", ORIENTATION, 3, 1, 6)
PLAIN = {
    "jpeg": FILES["jpeg"],
    "progressive": FILES["progressive jpeg"],
    "gray": FILES["gray jpeg"],
    "rgb": encode(picture(), "JPEG", keep_rgb=True),
    "turned": encode(picture(), "JPEG", exif=exif(6)),
    "turned, big-endian": with_exif(b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHxx", ORIENTATION, 3, 1, 5)),
    "turned twice": with_exif(b"II*\0\x08\0\0\0\x02\0" + ENTRY.replace(b"\6", b"\2") + ENTRY),
    "no such turn": encode(picture(), "JPEG", exif=exif(9)),
    "profile": encode(picture(), "JPEG", icc_profile=b"what it says does not matter"),
    "Adobe's": with_segment(0xEE, b"Adobe\0\0\0\0\0\0\1"),
    "Adobe's, before JFIF": with_segment(0xEE, b"Adobe\0\0\0\0\0\0\0"),
    "a comment": with_segment(0xFE, b"said the Adobe to the JFIF"),
    "4:4:4": encode(picture(), "JPEG", subsampling=0),
    "bytes after the end": FILES["jpeg"] + b"\xff\xd8 and more" * 9,
    "one pixel": encode(picture(1, 1), "JPEG"),
}
ODD = {
    "cmyk": FILES["cmyk jpeg"],
    "fill bytes": FILES["jpeg"][:2] + b"\xff" * 7 + FILES["jpeg"][2:],
    "cut": FILES["jpeg"][:-2],
    "cut in its header": FILES["jpeg"][:99],
    "a long in its EXIF": with_exif(b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", ORIENTATION, 4, 1, 6)),
    "EXIF that points behind the file": with_exif(b"II*\0\xff\xff\xff\xff"),
    "no image": b"\xff\xd8",
    "an AVIF": b"\xff\xd8\xff\xe0ftypavif" + FILES["jpeg"],
    "empty": b"",
    "png": FILES["png"],
}


def test_many_at_once_are_as_one_by_one() -> None:
    headers.warm_up()
    assert headers.read_headers(list(PLAIN.values())) == [read_header(data) for data in PLAIN.values()]
    assert headers.read_headers(list(ODD.values())) == [None] * len(ODD)
    assert headers.read_headers([FILES["jpeg"]] * 2) == [None] * 2  # quicker so
    assert headers.read_headers([]) == []


@settings(max_examples=1000)
@given(st.lists(ANY_BYTES, min_size=3, max_size=5))
def test_of_any_bytes_the_loop_says_what_python_says_or_nothing(datas: list[bytes]) -> None:
    headers.warm_up()
    for data, header in zip(datas, headers.read_headers(datas), strict=True):
        assert header is None or header == read_header(data)


@pytest.mark.parametrize("error", [CompileError("no compiler"), MemoryError(), OSError("the disk is full")])
def test_a_host_that_cannot_compile_reads_them_one_by_one(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    headers.warm_up()
    monkeypatch.setattr(headers, "_read_by_loop", fail)
    assert headers.read_headers([FILES["jpeg"], b""] * 2) == [None] * 4
    assert decode([FILES["jpeg"], b""] * 2, device="cpu").sizes.tolist() == [[40, 56], [0, 0]] * 2


FEW_AND_MANY = """
import io, sys
from PIL import Image
import nbvision as nbv
from nbvision.codecs import headers

stream = io.BytesIO()
Image.new("RGB", (30, 20)).save(stream, "JPEG")
files = [stream.getvalue()] * 100
nbv.decode(files, device="cpu")
assert "numba" not in sys.modules
if sys.argv[1] == "many":
    headers._WORTH_FILES = 250
    for _ in range(4):
        nbv.decode(files, device="cpu")
else:
    nbv.Decoder(device="cpu", color="gray").warm_up()
assert "numba" in sys.modules
print(nbv.decode(files, device="cpu").sizes.sum())
"""


@pytest.mark.parametrize("how", ["many", "warm"])
def test_a_process_that_reads_few_does_not_import_numba(how: str) -> None:
    command = [sys.executable, "-c", FEW_AND_MANY, how]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    assert (done.returncode, done.stdout.strip()) == (0, "5000"), done.stderr
