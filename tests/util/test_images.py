"""util/images.py: what is read equals Pillow's gray, and whatever is wrong with a file is said by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from util.errors import UserError
from util.images import image_size, read_gray, write_gray


def gradient(height: int = 37, width: int = 53) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((x * 5 + y * 3 + (x * y) % 7) % 256).astype(np.uint8)


def encode(array: np.ndarray, image_format: str, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array, mode=mode).save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.PNG", "a.jpeg"])
def test_round_trip(tmp_path, name):
    gray = gradient()
    write_gray(tmp_path / name, gray)
    read = read_gray(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == gray.shape
    tolerance = 0 if name.lower().endswith("png") else 30  # the pattern is hard on JPG
    assert np.abs(read.astype(int) - gray).max() <= tolerance
    assert image_size(tmp_path / name) == (37, 53)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA"])
def test_other_8_bit_modes(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_gray(tmp_path / "a.png"), np.asarray(image.convert("L")))


def refused(path, reader=read_gray) -> str:
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, content, told in [
        ("none.png", None, "no such file"),
        ("empty.png", b"", "empty"),
        ("text.png", b"this is no image", "not a PNG or JPG"),
        ("folder.png", None, "can't be read"),
        *((f"{kind}.png", encode(gradient(), kind), "not a PNG or JPG") for kind in ("BMP", "GIF", "TIFF")),
        ("a.jpg", encode(np.zeros((8, 8, 4), np.uint8), "JPEG", mode="CMYK"), "CMYK"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for reader in (read_gray, image_size):
            assert told in refused(tmp_path / name, reader)


def test_16_bit_is_refused_also_in_colour_which_pillow_would_cut_to_8(tmp_path):
    (tmp_path / "gray.png").write_bytes(encode(gradient().astype(np.uint16) * 257, "PNG"))
    for reader in (read_gray, image_size):
        assert "16-bit, expected 8-bit" in refused(tmp_path / "gray.png", reader)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(4))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "rgb.png").write_bytes(data)
    assert "16-bit" in refused(tmp_path / "rgb.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_every_cut_and_every_flipped_bit_of_a_png_is_refused(tmp_path, name):
    path = tmp_path / name
    write_gray(path, gradient())
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place])
        refused(path)
        if name == "a.png":
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            refused(path)
