"""util/images.py: what is read equals Pillow's gray, and whatever is wrong with a file is said by name."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from util.errors import UserError
from util.images import image_size, read_gray, write_gray


def gradient(height: int = 37, width: int = 53) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((x * 5 + y * 3 + (x * y) % 7) % 256).astype(np.uint8)


def encode(array: np.ndarray, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg"])
def test_round_trip(tmp_path, name):
    gray = gradient()
    write_gray(tmp_path / name, gray)
    read = read_gray(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == gray.shape
    tolerance = 0 if name.lower().endswith("png") else 30  # the pattern is hard on JPG
    assert np.abs(read.astype(int) - gray).max() <= tolerance
    assert image_size(tmp_path / name) == (37, 53)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_colour_becomes_pillows_gray(tmp_path, image_format):
    rgb = np.stack([gradient(), gradient().T.copy().reshape(37, 53), 255 - gradient()], axis=-1)
    path = tmp_path / "image"
    path.write_bytes(encode(rgb, image_format))
    with Image.open(path) as image:
        assert image.mode == "RGB"
        expected = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(read_gray(path), expected)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA"])
def test_other_8_bit_modes(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_gray(tmp_path / "a.png"), np.asarray(image.convert("L")))


def test_result_is_writable_and_contiguous(tmp_path):
    write_gray(tmp_path / "a.png", gradient())
    read = read_gray(tmp_path / "a.png")
    read[0, 0] = 1
    assert read.flags.c_contiguous


def refused(path, reader=read_gray) -> str:
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_missing_empty_text_directory(tmp_path):
    for reader in (read_gray, image_size):
        assert "no such file" in refused(tmp_path / "none.png", reader)
        (tmp_path / "empty.png").write_bytes(b"")
        assert "empty" in refused(tmp_path / "empty.png", reader)
        (tmp_path / "text.png").write_text("this is no image")
        assert "not a PNG or JPG" in refused(tmp_path / "text.png", reader)
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        assert "can't be read" in refused(tmp_path / "folder.png", reader)


def test_other_formats_are_refused(tmp_path):
    for image_format in ("BMP", "GIF", "TIFF"):
        (tmp_path / "a.png").write_bytes(encode(gradient(), image_format))
        assert "not a PNG or JPG" in refused(tmp_path / "a.png")
    Image.fromarray(np.zeros((8, 8, 4), np.uint8), mode="CMYK").save(tmp_path / "a.jpg")
    assert "CMYK" in refused(tmp_path / "a.jpg")


def test_16_bit_is_refused(tmp_path):
    gray16 = gradient().astype(np.uint16) * 257
    (tmp_path / "gray.png").write_bytes(encode(gray16, "PNG"))
    for reader in (read_gray, image_size):
        assert "16-bit, expected 8-bit" in refused(tmp_path / "gray.png", reader)


def test_16_bit_colour_which_pillow_would_cut_to_8(tmp_path):

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(4))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "rgb.png").write_bytes(data)
    with Image.open(tmp_path / "rgb.png") as image:
        assert image.mode == "RGB"  # Pillow does not tell
    assert "16-bit" in refused(tmp_path / "rgb.png")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncated_file_is_refused(tmp_path, data):
    png = encode(gradient(), "PNG")
    (tmp_path / "a.png").write_bytes(png[: data.draw(st.integers(0, len(png) - 1))])
    refused(tmp_path / "a.png")
    jpg = encode(gradient(), "JPEG")
    (tmp_path / "a.jpg").write_bytes(jpg[: data.draw(st.integers(0, len(jpg) - 1))])
    refused(tmp_path / "a.jpg")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_a_png_is_refused(tmp_path, data):
    png = bytearray(encode(gradient(), "PNG"))
    png[data.draw(st.integers(0, len(png) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "a.png").write_bytes(png)
    refused(tmp_path / "a.png")


def test_write_refuses_what_it_cannot_keep(tmp_path):
    with pytest.raises(ValueError, match="float64"):
        write_gray(tmp_path / "a.png", np.zeros((4, 4)))
    with pytest.raises(ValueError, match="uint8"):
        write_gray(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="a.tif"):
        write_gray(tmp_path / "a.tif", np.zeros((4, 4), np.uint8))
