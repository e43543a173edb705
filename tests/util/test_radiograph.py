"""util/radiograph.py against the formulas of DICOM PS3.3 written out here, and a real radiograph."""

import functools
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from util.errors import UserError
from util.radiograph import (
    CONTRASTS,
    dicom_size,
    equalize_histogram,
    radiograph_size,
    read_dicom,
    read_dicom_by_maximum,
    read_radiograph,
)


def example(name):
    return get_testdata_file(name, download=False)


def write(path, stored, bits=12, syntax=ExplicitVRLittleEndian, pixel_data=None, **tags):
    """A CR file of `stored` values; its type says how many bits are allocated and whether signed."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3"
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = pixel_data or stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    ds["PixelData"].VR = "OW" if stored.itemsize == 2 else "OB"
    for name, value in tags.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def lut_item(entries, first, bits, data=None):
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item.add_new("LUTData", "OW" if data else "US", data or [int(entry) for entry in entries])
    return [item]


def to_255(values, low, high):
    share = (np.asarray(values, float) - low) / (high - low)
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


RAMP = np.linspace(100, 3900, 40 * 30).astype(np.uint16).reshape(40, 30)


# --- the real radiograph ---------------------------------------------------------------------------


def test_real_chest_film():
    """RG1_UNCR.dcm: CR chest PA, MONOCHROME1, 15 bits stored, window 15000 / 30000."""
    path = example("RG1_UNCR.dcm")
    film = read_dicom(path)
    assert film.shape == (1955, 1841) and film.dtype == np.uint8 and dicom_size(path) == (1955, 1841)

    def mean(x0, x1, y0, y1):  # shares of width and height
        height, width = film.shape
        return film[int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)].mean()

    air = mean(0.96, 0.99, 0.03, 0.08)  # beside the neck
    right_lung, left_lung = mean(0.30, 0.40, 0.22, 0.28), mean(0.60, 0.70, 0.25, 0.31)
    spine, heart = mean(0.47, 0.53, 0.75, 0.95), mean(0.58, 0.66, 0.62, 0.70)
    abdomen = mean(0.15, 0.35, 0.75, 0.90)
    assert air + 30 < min(right_lung, left_lung)
    assert max(right_lung, left_lung) + 40 < min(spine, abdomen, heart)
    stored = pydicom.dcmread(path).pixel_array.astype(float)  # MONOCHROME1: turned over
    formula = 255 * (1 - stored / 29999)  # from center - 0.5 - (width - 1) / 2 = 0
    assert np.abs(film - formula).max() <= 0.5 + 1e-6


def test_compressed_copies_of_real_films():
    np.testing.assert_array_equal(read_dicom(example("RG1_J2KR.dcm")), read_dicom(example("RG1_UNCR.dcm")))
    plain = read_dicom(example("MR_small.dcm"))
    for kind in ("jp2klossless", "RLE", "bigendian", "implicit"):
        np.testing.assert_array_equal(read_dicom(example(f"MR_small_{kind}.dcm")), plain, err_msg=kind)


def test_jpeg_lossless():
    pytest.importorskip("gdcm", reason="JPEG-lossless and JPEG-LS need python-gdcm (tests/requirements.txt)")
    plain = read_dicom(example("MR_small.dcm"))
    np.testing.assert_array_equal(read_dicom(example("MR_small_jpeg_ls_lossless.dcm")), plain)
    film = read_dicom(example("JPEG-LL.dcm"))
    assert film.shape == (1024, 256) and film.max() == 255 and len(np.unique(film)) > 100


# --- bits, sign, contrast --------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("dtype, bits", [("u1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)])
def test_without_a_window_min_and_max_of_the_image(tmp_path, dtype, bits, syntax):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype[0] == "i" else (0, 2**bits - 1)
    stored = np.linspace(low * 0.7, high * 0.7, 35 * 22).astype(dtype).reshape(35, 22)
    path = write(tmp_path / "a.dcm", stored, bits, syntax)
    np.testing.assert_array_equal(read_dicom(path), to_255(stored, int(stored.min()), int(stored.max())))


def test_bits_above_those_stored_are_no_part_of_the_value(tmp_path):
    noise = np.random.default_rng(0).integers(0, 16, RAMP.shape).astype(np.uint16) << 12
    path = write(tmp_path / "a.dcm", RAMP | noise, 12)
    np.testing.assert_array_equal(read_dicom(path), to_255(RAMP, 100, 3900))


@pytest.mark.parametrize("empty", [{}, {"WindowCenter": "", "WindowWidth": ""}])
def test_missing_or_empty_window(tmp_path, empty):
    path = write(tmp_path / "a.dcm", RAMP, **empty)
    np.testing.assert_array_equal(read_dicom(path), to_255(RAMP, 100, 3900))


@pytest.mark.parametrize("center, width", [(2048, 4096), (1500, 800), (1000, 1), ([1500, 9], [800, 9])])
def test_linear_window(tmp_path, center, width):
    path = write(tmp_path / "a.dcm", RAMP, WindowCenter=center, WindowWidth=width)
    c, w = np.ravel(center)[0], np.ravel(width)[0]  # the first of several
    below, above = c - 0.5 - (w - 1) / 2, c - 0.5 + (w - 1) / 2
    expected = to_255(RAMP, below, above) if w > 1 else np.where(RAMP > below, 255, 0)
    np.testing.assert_array_equal(read_dicom(path), expected)


def test_exact_and_sigmoid_windows(tmp_path):
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    path = write(tmp_path / "a.dcm", RAMP, **window, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_array_equal(read_dicom(path), to_255(RAMP, 1500, 2500))
    path = write(tmp_path / "a.dcm", RAMP, **window, VOILUTFunction="SIGMOID")
    sigmoid = 1 / (1 + np.exp(-4 * (RAMP.astype(float) - 2000) / 1000))
    assert np.abs(read_dicom(path).astype(int) - to_255(sigmoid, 0, 1)).max() <= 1


def test_rescale_before_the_window(tmp_path):
    stored = (RAMP.astype(int) - 2048).astype(np.int16)
    tags = {"RescaleSlope": 0.5, "RescaleIntercept": -100, "WindowCenter": -100, "WindowWidth": 501}
    path = write(tmp_path / "a.dcm", stored, **tags)
    np.testing.assert_array_equal(read_dicom(path), to_255(stored * 0.5 - 100, -350.5, 149.5))


def test_modality_lut(tmp_path):
    curve = (np.arange(4096) ** 2 // 256).astype(np.uint16)
    path = write(tmp_path / "a.dcm", RAMP, ModalityLUTSequence=lut_item(curve, 0, 16))
    np.testing.assert_array_equal(read_dicom(path), to_255(curve[RAMP], curve[100], curve[3900]))


@pytest.mark.parametrize("bits, packed", [(8, False), (8, True), (12, False), (16, False), (16, True)])
def test_voi_lut_goes_before_the_window(tmp_path, bits, packed):
    """Values below the table take its first entry, those above its last."""
    first, n = 500, 3000
    entries = np.round((np.arange(n) / (n - 1)) ** 0.5 * (2**bits - 1)).astype(np.uint16)
    data = None if not packed else entries.astype("u1" if bits == 8 else "<u2").tobytes()
    tags = {"VOILUTSequence": lut_item(entries, first, bits, data), "WindowCenter": 5, "WindowWidth": 9}
    path = write(tmp_path / "a.dcm", RAMP, **tags)
    expected = entries[np.clip(RAMP.astype(int) - first, 0, n - 1)]
    np.testing.assert_array_equal(read_dicom(path), to_255(expected, 0, 2**bits - 1))


def test_voi_lut_from_a_real_file():
    assert read_dicom(example("vlut_04.dcm")).max() == 255


# --- which end is air ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "photometric, sign, slope, inverted",
    [
        ("MONOCHROME2", None, 1, False),
        ("MONOCHROME1", None, 1, True),
        ("MONOCHROME2", -1, 1, False),
        ("MONOCHROME2", 1, 1, True),
        ("MONOCHROME1", 1, 1, True),  # one statement made twice: turned over once
        ("MONOCHROME1", -1, 1, True),  # what every viewer shows
        ("MONOCHROME2", 1, -1, False),  # the rescale has turned it over already
        ("MONOCHROME2", -1, -1, True),
        ("MONOCHROME2", None, -1, False),
        ("MONOCHROME1", None, -1, True),
    ],
)
@pytest.mark.parametrize("window", ["", "LINEAR", "LINEAR_EXACT", "LUT"])
def test_air_is_dark(tmp_path, photometric, sign, slope, inverted, window):
    tags = {} if sign is None else {"PixelIntensityRelationshipSign": sign}
    if slope == -1:
        tags |= {"RescaleSlope": -1, "RescaleIntercept": 4095}
    if window == "LUT":
        tags |= {"VOILUTSequence": lut_item(range(4096), 0, 12)}
    elif window:  # both, with the same contrast as none
        low, high = (100, 3900) if slope == 1 else (195, 3995)
        tags |= {
            "WindowCenter": (low + high + (window == "LINEAR")) / 2,
            "WindowWidth": high - low + (window == "LINEAR"),
            "VOILUTFunction": window,
        }
    path = write(tmp_path / "a.dcm", RAMP, PhotometricInterpretation=photometric, **tags)
    rising = RAMP.astype(float) / 4095 if window == "LUT" else (RAMP.astype(float) - 100) / 3800
    shade = rising if (slope == 1) != inverted else 1 - rising
    assert np.abs(read_dicom(path) - 255 * shade).max() <= 0.5 + 1e-6


# --- padding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_set_the_contrast(tmp_path, photometric):
    stored = RAMP.copy()
    stored[:, :5] = 0
    path = write(tmp_path / "a.dcm", stored, PhotometricInterpretation=photometric, PixelPaddingValue=0)
    film = read_dicom(path)
    assert (film[:, :5] == 0).all()
    inside = stored[:, 5:]
    expected = to_255(inside, int(inside.min()), int(inside.max()))
    if photometric == "MONOCHROME1":
        assert film[:, 5:].max() == 255 and film[0, 5] == 255 and film[-1, -1] == 0
    else:
        np.testing.assert_array_equal(film[:, 5:], expected)


def test_padding_range(tmp_path):
    stored = RAMP.copy()
    stored[:, :3], stored[:, 3:6] = 4000, 4095
    path = write(tmp_path / "a.dcm", stored, PixelPaddingValue=4095, PixelPaddingRangeLimit=4000)
    film = read_dicom(path)
    assert (film[:, :6] == 0).all() and film.max() == 255 and film[-1, -1] == 255


def test_a_flat_image_is_black(tmp_path):
    assert read_dicom(write(tmp_path / "a.dcm", np.full((4, 5), 77, np.uint16))).tolist() == [[0] * 5] * 4


# --- bad input -------------------------------------------------------------------------------------


def error_of(path, function=read_dicom):
    with pytest.raises(UserError) as error:
        function(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "name, words",
    [
        ("SC_rgb.dcm", "RGB, expected MONOCHROME1"),
        ("examples_palette.dcm", "PALETTE COLOR, expected MONOCHROME1"),
        ("emri_small.dcm", "10 frames"),
        ("rtplan.dcm", "no pixel data"),
        ("MR_truncated.dcm", "can't be decoded"),
        ("README.txt", "can't be read as a DICOM radiograph"),
        ("JPEG-lossy.dcm", "12-bit"),
    ],
)
def test_other_kinds_of_file(name, words):
    assert words in error_of(example(name))


def test_missing_codec_names_its_package(tmp_path):
    """No package of ours decodes HTJ2K, so this is the real thing."""
    path = write(tmp_path / "a.dcm", RAMP, syntax=HTJ2KLossless, pixel_data=encapsulate([b"\xff\x4f" * 10]))
    message = error_of(path)
    assert "pip install" in message and "pylibjpeg-openjpeg" in message


def test_damaged_compressed_stream(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint8)).save(buffer, "JPEG2000", irreversible=False)
    frame = buffer.getvalue()
    start = frame.index(b"\xff\x4f")  # the codestream in its box
    stored = RAMP.astype(np.uint8)
    whole = write(tmp_path / "a.dcm", stored, 8, JPEG2000Lossless, encapsulate([frame[start:]]))
    np.testing.assert_array_equal(read_dicom(whole), to_255(stored, int(stored.min()), int(stored.max())))
    path = write(tmp_path / "b.dcm", stored, 8, JPEG2000Lossless, encapsulate([frame[start : start + 60]]))
    assert "can't be decoded" in error_of(path)


def test_window_that_cannot_be(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP, WindowCenter=5, WindowWidth=0)
    assert "Window Width must be" in error_of(path)


def test_all_padding_and_too_many_bits(tmp_path):
    flat = np.full((4, 5), 7, np.uint16)
    assert "all its pixels are padding" in error_of(write(tmp_path / "a.dcm", flat, PixelPaddingValue=7))
    assert "32 bits" in error_of(write(tmp_path / "b.dcm", flat.astype(np.uint32), 32))


def test_missing_empty_and_cut_files(tmp_path):
    assert "No such file" in error_of(tmp_path / "none.dcm")
    (tmp_path / "empty.dcm").touch()
    assert "DICOM" in error_of(tmp_path / "empty.dcm")
    whole = write(tmp_path / "a.dcm", RAMP).read_bytes()
    for length in (140, 300, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"{length}.dcm"
        path.write_bytes(whole[:length])
        assert "DICOM" in error_of(path)
    assert "no Rows" in error_of(write(tmp_path / "r.dcm", RAMP, Rows=None), dicom_size)


# --- one door --------------------------------------------------------------------------------------


def test_read_radiograph_goes_by_content(tmp_path):
    film = to_255(RAMP, 100, 3900)
    dicom = write(tmp_path / "noname", RAMP)
    picture = Path(tmp_path / "picture.png")
    Image.fromarray(film).save(picture)
    for path in (dicom, picture):
        np.testing.assert_array_equal(read_radiograph(path, "window"), film)
        assert radiograph_size(path) == (40, 30)
    assert "No such file" in error_of(tmp_path / "no.dcm", radiograph_size)
    with pytest.raises(UserError, match="no.jpg"):
        read_radiograph(tmp_path / "no.jpg", "window")


# --- the contrast of MIMIC-CXR-JPG ------------------------------------------------------------------


def pictures():
    """uint8 pictures of every kind of histogram."""
    rng = np.random.default_rng(0)
    yield np.array([[9]], np.uint8)
    yield np.array([[0, 255]], np.uint8)
    yield np.full((7, 5), 200, np.uint8)
    yield np.where(rng.random((30, 20)) < 0.3, 90, 91).astype(np.uint8)
    for levels in (2, 3, 17, 100, 256):
        for shape in ((1, 50), (37, 41), (301, 233)):
            yield rng.integers(0, levels, shape).astype(np.uint8)
            skewed = rng.random(shape) ** 8 * levels
            yield (255 - skewed).astype(np.uint8)


def test_equalize_histogram_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless (tests/requirements.txt)")
    for gray in pictures():
        np.testing.assert_array_equal(equalize_histogram(gray), cv2.equalizeHist(gray))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype, bits", [("u2", 12), ("i2", 16), ("u1", 8)])
def test_mimic_cxr_jpg_by_hand(tmp_path, photometric, dtype, bits):
    """Pixel by pixel in Python's own integers and floats; window, rescaling and padding change nothing."""
    rng = np.random.default_rng(1)
    high = 2 ** (bits - 1) - 1
    stored = (rng.random((23, 31)) ** 3 * high).astype(dtype)
    stored -= np.array(high // 2 if dtype == "i2" else 0, dtype)
    path = write(
        tmp_path / "a.dcm",
        stored,
        bits,
        PhotometricInterpretation=photometric,
        WindowCenter=3,
        WindowWidth=2,
        RescaleSlope=0,
        RescaleIntercept=0,
        PixelPaddingValue=int(stored[3, 3]),
        PixelIntensityRelationshipSign=1,
    )
    values = [int(value) - int(stored.min()) for value in stored.ravel()]
    gray = [int(value / max(values) * 255) for value in values]
    gray = [255 - value for value in gray] if photometric == "MONOCHROME1" else gray
    lowest = min(gray)
    others = len(gray) - gray.count(lowest)
    level = {g: round(255 * (sum(v <= g for v in gray) - gray.count(lowest)) / others) for g in set(gray)}
    expected = np.array([level[g] for g in gray]).reshape(stored.shape)
    # At exact halves float32 may fall on the other side: none here.
    np.testing.assert_array_equal(read_dicom(path, "mimic-cxr-jpg"), expected)


def test_flat_film_as_mimic_cxr_jpg(tmp_path):
    flat = np.full((4, 5), 77, np.uint16)
    assert (read_dicom(write(tmp_path / "a.dcm", flat), "mimic-cxr-jpg") == 0).all()


def test_minmax_does_without_the_window(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP, WindowCenter=2000, WindowWidth=300)
    np.testing.assert_array_equal(read_dicom(path, "minmax"), to_255(RAMP, 100, 3900))
    path = write(tmp_path / "b.dcm", RAMP, VOILUTSequence=lut_item(range(4096), 0, 12))
    np.testing.assert_array_equal(read_dicom(path, "minmax"), to_255(RAMP, 100, 3900))
    with pytest.raises(ValueError, match="none of mimic-cxr-jpg, window, minmax"):
        read_dicom(path, "best")


def test_contrasts_of_a_real_film(tmp_path):
    """Equalised, every band of gray is as full as any other; which is brighter stays as it was."""
    path = example("RG1_UNCR.dcm")
    window, equalised = read_radiograph(path, "window"), read_radiograph(path, "mimic-cxr-jpg")
    bands = np.bincount(equalised.ravel() // 32, minlength=8) / equalised.size
    assert np.abs(bands - 1 / 8).max() < 0.05 < np.abs(np.bincount(window.ravel() // 32) / window.size - 1 / 8).max()
    order = np.argsort(equalised.ravel(), kind="stable")
    assert (np.diff(window.ravel()[order].astype(int)) >= -1).mean() > 0.99


# --- odd headers ------------------------------------------------------------------------------------

WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}


@pytest.mark.parametrize("contrast", ["window", "minmax"])
def test_slope_0_is_not_a_black_film(tmp_path, contrast):
    for window in ({}, WINDOW):
        path = write(tmp_path / "a.dcm", RAMP, RescaleSlope=0, RescaleIntercept=5, **window)
        assert "all pixels the same gray" in error_of(path, lambda path: read_dicom(path, contrast))


def test_a_window_beside_the_values_is_not_a_black_film(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP, WindowCenter=60000, WindowWidth=10)
    assert "--dicom_contrast mimic-cxr-jpg" in error_of(path)


def test_empty_values_say_nothing(tmp_path):
    plain = read_dicom(write(tmp_path / "a.dcm", RAMP, **WINDOW))
    empty = {"RescaleSlope": "", "RescaleIntercept": "", "VOILUTFunction": "", "PixelPaddingValue": 4095}
    path = write(tmp_path / "b.dcm", RAMP, **WINDOW, **empty)
    with pydicom.config.disable_value_validation():
        ds = pydicom.dcmread(path)
        ds.add_new("PixelPaddingRangeLimit", "US", None)
        ds.save_as(path)
    np.testing.assert_array_equal(read_dicom(path), plain)
    path = write(tmp_path / "c.dcm", RAMP, RescaleSlope=2, **WINDOW)
    assert "only one has a value" in error_of(path)


def test_private_transfer_syntax(tmp_path):
    path = write(tmp_path / "a.dcm", RAMP)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.99999.1.2.1\0"))
    assert "1.2.840.99999.1.2.1" in error_of(path)


# Values that a header should not have, as they stand in the file.
ODD_VALUES = (
    b"",
    b" ",
    b"\0\0",
    b"\xff\xff",
    b"\xff\xff\xff\x7f",
    b"0 ",
    b"-1",
    b"nan ",
    b"inf ",
    b"1e999 ",
    b"-1e-320 ",
    b"1\\2 ",
    b"\\\\",
    b"text",
    b"\xc3\x28",
    b"99999999999999999999",
    b"0" * 64,
    b"1.2.3.4 ",
    b"0x10",
)
VRS = ("US", "SS", "DS", "IS", "CS", "LO", "UI", "OW", "OB", "SQ", "UN", "FD", "AT", "PN", "DA")


def fuzzed(rng, whole, elements):
    """A file with one to three elements' values or types replaced, or bytes flipped, or its end lost."""
    kind = rng.integers(4)
    if kind < 2:
        for _ in range(rng.integers(1, 4)):
            start, header, length = elements[rng.integers(len(elements))]
            tag = whole[start : start + 4]
            vr = whole[start + 4 : start + 6] if rng.random() < 0.7 else rng.choice(VRS).encode()
            value = ODD_VALUES[rng.integers(len(ODD_VALUES))] if rng.random() < 0.8 else rng.bytes(6)
            long = vr in (b"OW", b"OB", b"SQ", b"UN")
            size = b"\0\0" + len(value).to_bytes(4, "little") if long else len(value).to_bytes(2, "little")
            replaced = tag + vr + size + value
            found = whole.find(tag + whole[start + 4 : start + 6])
            if found >= 0:
                whole = whole[:found] + replaced + whole[found + header + length :]
    elif kind == 2:
        content = bytearray(whole)
        for _ in range(rng.integers(1, 9)):
            content[rng.integers(128, len(content))] = rng.integers(256)
        whole = bytes(content)
    else:
        whole = whole[: rng.integers(len(whole))]
    return whole


def fuzz(tmp_path, n, seed):
    """Read `n` damaged files in every contrast; how many were read, and how many refused."""
    rng = np.random.default_rng(seed)
    small = RAMP[:6, :5]
    tags = {
        **WINDOW,
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "VOILUTFunction": "LINEAR",
        "NumberOfFrames": 1,
        "PixelPaddingValue": 0,
        "PixelPaddingRangeLimit": 1,
        "PixelIntensityRelationshipSign": -1,
        "PixelAspectRatio": [1, 1],
        "PlanarConfiguration": 0,
        "PatientName": "Phantom",
    }
    lut = {"VOILUTSequence": lut_item(range(64), 0, 12, b"\0\1" * 64)}
    bases = [
        write(tmp_path / "plain.dcm", small, **tags).read_bytes(),
        write(tmp_path / "lut.dcm", small, **tags, **lut).read_bytes(),
        Path(example("MR_small_RLE.dcm")).read_bytes(),
    ]
    files = []
    for base in bases:
        ds = pydicom.dcmread(io.BytesIO(base))
        whole = io.BytesIO(base).getvalue()
        elements = []
        for element in [*ds.file_meta, *ds]:
            tag = element.tag.group.to_bytes(2, "little") + element.tag.elem.to_bytes(2, "little")
            start = whole.find(tag + element.VR.encode(), 128)
            if start >= 0:
                long = element.VR in ("OB", "OW", "SQ", "UN", "UT")
                size = slice(start + 8, start + 12) if long else slice(start + 6, start + 8)
                length = int.from_bytes(whole[size], "little")
                elements.append((start, 12 if long else 8, 0 if length == 0xFFFFFFFF else length))
        files.append((whole, elements))
    read = refused = 0
    path = tmp_path / "fuzzed.dcm"
    for i in range(n):
        path.write_bytes(fuzzed(rng, *files[i % len(files)]))
        for function in (dicom_size, read_dicom_by_maximum, functools.partial(read_dicom, contrast=CONTRASTS[i % 3])):
            try:
                result = function(path)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
            else:
                assert isinstance(result, tuple) or (result.dtype == np.uint8 and result.ndim == 2)
                read += 1
    return read, refused


def test_fuzzed_files_are_read_or_refused_by_name(tmp_path, recwarn):
    read, refused = fuzz(tmp_path, 900, seed=0)
    assert read > 300 and refused > 300
    assert not recwarn.list


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_fuzzed_files_are_read_or_refused_by_name(tmp_path, seed):
    fuzz(tmp_path, 10000, seed)
