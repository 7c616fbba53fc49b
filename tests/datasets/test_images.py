import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sqloss.common.errors import UserError
from sqloss.datasets import load_dataset

pytestmark = pytest.mark.usefixtures("torchvision")


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(channels: int) -> bytes:
    """6 x 5 pixels of 16 bits per channel."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", 6, 5, 16, colour, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(6 * channels * 2)) * 5)
    end = chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + end


def tiff(order: str, channels: int, bits: int) -> bytes:
    """6 x 5 pixels, without compression."""
    short, long = 3, 4
    where = 8 + 2 + 9 * 12 + 4  # of the bits of each channel, and behind them the pixels
    tags = [
        (256, short, 1, 6),
        (257, short, 1, 5),
        (258, short, channels, where) if channels > 2 else (258, short, 1, bits),
        (259, short, 1, 1),
        (262, short, 1, 2 if channels == 3 else 1),
        (273, long, 1, where + 2 * channels),
        (277, short, 1, channels),
        (278, short, 1, 5),
        (279, long, 1, 6 * 5 * channels * bits // 8),
    ]
    content = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, kind, count, value in tags:
        inline = struct.pack(order + ("H" if kind == short and count == 1 else "I"), value)
        content += struct.pack(order + "HHI", tag, kind, count) + inline.ljust(4, b"\0")
    content += bytes(4) + struct.pack(order + "H", bits) * channels
    return content + bytes(6 * 5 * channels * bits // 8)


def in_format(name: str, dtype) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((5, 6), 300, dtype=dtype)).save(content, name)
    return content.getvalue()


DEEP = {
    "grey.png": png(1),
    "grey-alpha.png": png(2),
    "colour.png": png(3),
    "colour-alpha.png": png(4),
    "grey.tiff": tiff("<", 1, 16),
    "colour.tiff": tiff("<", 3, 16),
    "big-endian.tiff": tiff(">", 3, 16),
    "grey-32.tiff": in_format("tiff", np.int32),
    "float.tiff": in_format("tiff", np.float32),
    "grey.pgm": b"P5 6 5 65535\n" + bytes(60),
    "grey-10.pgm": b"P5 6 5 1023\n" + bytes(60),
    "plain.pgm": b"P2 6 5 65535\n" + b"300 " * 30,
    "colour.ppm": b"P6 6 5 65535\n" + bytes(180),
    "plain.ppm": b"P3 6 5 1023\n" + b"300 " * 90,
}


@pytest.mark.parametrize("name", DEEP)
def test_images_of_more_than_8_bits_are_refused_by_name(tmp_path, write_images, name):
    write_images(tmp_path, {"cat": 5, "dog": 5})
    deep = tmp_path / "cat" / name
    deep.write_bytes(DEEP[name])
    Image.open(deep).load()  # which Pillow does, whatever it makes of the values
    with pytest.raises(UserError, match=f"{deep}: expected an image of 8 bits per channel, got"):
        load_dataset("folder", data_dir=tmp_path)


SHALLOW = {
    "colour.tiff": tiff("<", 3, 8),
    "grey.ppm": b"P6 6 5 255\n" + bytes(90),
    "plain.pgm": b"P2 6 5 255\n" + b"30 " * 30,
    "two-bits.pgm": b"P5 6 5 3\n" + bytes(30),
}


@pytest.mark.parametrize("name", SHALLOW)
def test_images_of_8_bits_and_less_are_read(tmp_path, write_images, name):
    write_images(tmp_path, {"cat": 4, "dog": 5})
    (tmp_path / "cat" / name).write_bytes(SHALLOW[name])
    assert sum(load_dataset("folder", data_dir=tmp_path).class_counts()) == 8


@pytest.mark.parametrize("name", ["JPEG2000", "AVIF", "SGI"])
def test_a_format_whose_depth_we_cannot_tell_is_refused_by_name(tmp_path, write_images, name):
    write_images(tmp_path, {"cat": 5})
    other = tmp_path / "cat" / "other.png"
    try:
        Image.new("RGB", (6, 5)).save(other, name)
    except (OSError, KeyError) as error:
        pytest.skip(f"this Pillow cannot write {name}: {error}")
    with pytest.raises(UserError, match=f"cannot read the image {other}: cannot identify"):
        load_dataset("folder", data_dir=tmp_path)


def huge_png() -> bytes:
    """The head of a PNG of 20,000 x 20,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def encoded(suffix: str) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((20, 30), 50).save(content, suffix)
    return content.getvalue()


BROKEN = {
    "none.png": b"",
    "text.png": b"no image",
    "huge.png": huge_png(),
    "cut.png": encoded("png")[:-60],
    "sized.png": encoded("png").replace(b"IHDR\0\0\0\x14", b"IHDR\0\0"),
    "words.pgm": b"P5 six 5 255\n" + bytes(30),
    "deep.pgm": b"P5 6 5 99999999\n" + bytes(30),
    "wide.ppm": b"P6 " + b"9" * 40 + b" 5 255\n",
    "cut.tiff": encoded("tiff")[:40],
    "tags.tiff": b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\xff\xff\xff\xff",
    "cut.jpg": encoded("jpeg")[:100],
    "cut.webp": b"RIFF\x10\0\0\0WEBPVP8 ",
    "cut.bmp": encoded("bmp")[:20],
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", [*BROKEN, "link.png"])
def test_an_unreadable_image_is_named(tmp_path, name, write_images):
    write_images(tmp_path, {"cat": 5})
    broken = tmp_path / "cat" / name
    broken.write_bytes(BROKEN[name]) if name in BROKEN else broken.symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"^cannot read the image {broken}: ."):
        load_dataset("folder", data_dir=tmp_path)
