"""util/radiograph.py against the formulas of DICOM PS3.3 written out here, and a real radiograph."""

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, HTJ2KLossless

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

WINDOW = {"WindowCenter": 2000, "WindowWidth": 3000}
RAMP = np.linspace(100, 3900, 40 * 30).astype(np.uint16).reshape(40, 30)


def example(name):
    return get_testdata_file(name, download=False)


def write(path, stored=RAMP, bits=12, syntax=ExplicitVRLittleEndian, pixel_data=None, **tags):
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
        setattr(ds, name, value)
    ds.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def film(tmp_path):
    """What is read of a file that is written as `write` has it."""
    return lambda *stored, contrast="window", **tags: read_dicom(write(tmp_path / "a.dcm", *stored, **tags), contrast)


def lut_item(entries, first, bits, data=None):
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item.add_new("LUTData", "OW" if data else "US", data or [int(entry) for entry in entries])
    return [item]


def to_255(values, low, high):
    share = (np.asarray(values, float) - low) / (high - low)
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


# --- real files ------------------------------------------------------------------------------------


def test_real_chest_film():
    """RG1_UNCR.dcm: CR chest PA, MONOCHROME1, 15 bits stored, window 15000 / 30000."""
    path = example("RG1_UNCR.dcm")
    film = read_dicom(path)
    assert film.shape == (1955, 1841) and film.dtype == np.uint8 and dicom_size(path) == (1955, 1841)
    stored = pydicom.dcmread(path).pixel_array.astype(float)  # MONOCHROME1: turned over
    formula = 255 * (1 - stored / 29999)  # from center - 0.5 - (width - 1) / 2 = 0
    assert np.abs(film - formula).max() <= 0.5 + 1e-6
    np.testing.assert_array_equal(read_dicom(example("RG1_J2KR.dcm")), film)


def test_compressed_copies_of_a_real_film():
    plain = read_dicom(example("MR_small.dcm"))
    for kind in ("jp2klossless", "RLE", "bigendian", "implicit"):
        np.testing.assert_array_equal(read_dicom(example(f"MR_small_{kind}.dcm")), plain, err_msg=kind)


def test_jpeg_lossless():
    pytest.importorskip("gdcm", reason="JPEG-lossless and JPEG-LS need python-gdcm (tests/requirements.txt)")
    plain = read_dicom(example("MR_small.dcm"))
    np.testing.assert_array_equal(read_dicom(example("MR_small_jpeg_ls_lossless.dcm")), plain)
    assert len(np.unique(read_dicom(example("JPEG-LL.dcm")))) > 100


# --- bits, sign, contrast --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bits", [("u1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)])
def test_without_a_window_min_and_max_of_the_image(film, dtype, bits):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype[0] == "i" else (0, 2**bits - 1)
    stored = np.linspace(low * 0.7, high * 0.7, 35 * 22).astype(dtype).reshape(35, 22)
    np.testing.assert_array_equal(film(stored, bits), to_255(stored, int(stored.min()), int(stored.max())))


@pytest.mark.parametrize("center, width", [(2048, 4096), (1500, 800), (1000, 1), ([1500, 9], [800, 9])])
def test_linear_window(film, center, width):
    c, w = np.ravel(center)[0], np.ravel(width)[0]  # the first of several
    below, above = c - 0.5 - (w - 1) / 2, c - 0.5 + (w - 1) / 2
    expected = to_255(RAMP, below, above) if w > 1 else np.where(RAMP > below, 255, 0)
    np.testing.assert_array_equal(film(WindowCenter=center, WindowWidth=width), expected)


def test_exact_and_sigmoid_windows(film):
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    np.testing.assert_array_equal(film(**window, VOILUTFunction="LINEAR_EXACT"), to_255(RAMP, 1500, 2500))
    sigmoid = 1 / (1 + np.exp(-4 * (RAMP.astype(float) - 2000) / 1000))
    assert np.abs(film(**window, VOILUTFunction="SIGMOID") - 255 * sigmoid).max() <= 1


def test_rescale_and_lut_before_the_window(film):
    stored = (RAMP.astype(int) - 2048).astype(np.int16)
    tags = {"RescaleSlope": 0.5, "RescaleIntercept": -100, "WindowCenter": -100, "WindowWidth": 501}
    np.testing.assert_array_equal(film(stored, **tags), to_255(stored * 0.5 - 100, -350.5, 149.5))
    curve = (np.arange(4096) ** 2 // 256).astype(np.uint16)
    found = film(ModalityLUTSequence=lut_item(curve, 0, 16))
    np.testing.assert_array_equal(found, to_255(curve[RAMP], curve[100], curve[3900]))


@pytest.mark.parametrize("bits, packed", [(8, False), (12, False), (16, False), (16, True)])
def test_voi_lut_goes_before_the_window(film, bits, packed):
    """Values below the table take its first entry, those above its last."""
    first, n = 500, 3000
    entries = np.round((np.arange(n) / (n - 1)) ** 0.5 * (2**bits - 1)).astype(np.uint16)
    data = entries.astype("<u2").tobytes() if packed else None
    found = film(VOILUTSequence=lut_item(entries, first, bits, data), WindowCenter=5, WindowWidth=9)
    expected = entries[np.clip(RAMP.astype(int) - first, 0, n - 1)]
    np.testing.assert_array_equal(found, to_255(expected, 0, 2**bits - 1))


def test_minmax_does_without_the_window(film):
    for tags in (WINDOW, {"VOILUTSequence": lut_item(range(4096), 0, 12)}):
        np.testing.assert_array_equal(film(**tags, contrast="minmax"), to_255(RAMP, 100, 3900))


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
    ],
)
@pytest.mark.parametrize("window", ["", "LINEAR", "LINEAR_EXACT", "LUT"])
def test_air_is_dark(film, photometric, sign, slope, inverted, window):
    tags = {"PixelIntensityRelationshipSign": sign} if sign else {}
    if slope == -1:
        tags |= {"RescaleSlope": -1, "RescaleIntercept": 4095}
    if window == "LUT":
        tags["VOILUTSequence"] = lut_item(range(4096), 0, 12)
    elif window:  # both, with the same contrast as none
        low, high, more = *((100, 3900) if slope == 1 else (195, 3995)), window == "LINEAR"
        tags |= dict(WindowCenter=(low + high + more) / 2, WindowWidth=high - low + more, VOILUTFunction=window)
    rising = RAMP.astype(float) / 4095 if window == "LUT" else (RAMP.astype(float) - 100) / 3800
    shade = rising if (slope == 1) != inverted else 1 - rising
    assert np.abs(film(PhotometricInterpretation=photometric, **tags) - 255 * shade).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [(0, 0), (4000, 4095)])
def test_padding_is_black_and_does_not_set_the_contrast(film, photometric, padding):
    stored = RAMP.copy()
    stored[:, :3], stored[:, 3:5] = padding
    limit = {"PixelPaddingRangeLimit": padding[0]} if padding[0] else {}
    found = film(stored, PhotometricInterpretation=photometric, PixelPaddingValue=padding[1], **limit)
    gray = (255, 0) if photometric == "MONOCHROME1" else (0, 255)
    shade = np.interp(RAMP[:, 5:], (RAMP[0, 5], RAMP[-1, -1]), gray)
    assert not found[:, :5].any() and np.abs(found[:, 5:] - shade).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype, bits", [("u2", 12), ("i2", 16), ("u1", 8)])
def test_mimic_cxr_jpg_by_hand(film, photometric, dtype, bits):
    """Window, rescaling and padding change nothing."""
    high = 2 ** (bits - 1) - 1
    stored = (np.random.default_rng(1).random((23, 31)) ** 3 * high).astype(dtype)
    stored -= np.array(high // 2 if dtype == "i2" else 0, dtype)
    ignored = {"RescaleSlope": 0, "RescaleIntercept": 0, "PixelPaddingValue": int(stored[3, 3])}
    ignored |= WINDOW | {"PixelIntensityRelationshipSign": 1}
    found = film(stored, bits, PhotometricInterpretation=photometric, **ignored, contrast="mimic-cxr-jpg")
    gray = [[int((int(value) - stored.min()) / np.ptp(stored.astype(int)) * 255) for value in row] for row in stored]
    gray = np.array(gray, np.uint8)
    np.testing.assert_array_equal(found, equalize_histogram(255 - gray if photometric == "MONOCHROME1" else gray))


def test_equalize_histogram_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2", reason="needs opencv-python-headless (tests/requirements.txt)")
    for levels in (1, 2, 17, 256):
        gray = (np.random.default_rng(0).random((37, 41)) ** 8 * levels).astype(np.uint8)
        np.testing.assert_array_equal(equalize_histogram(gray), cv2.equalizeHist(gray))


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
        ("MR_truncated.dcm", "can't be read as a DICOM radiograph"),
        ("README.txt", "can't be read as a DICOM radiograph"),
        ("JPEG-lossy.dcm", "12-bit"),
    ],
)
def test_other_kinds_of_file(name, words):
    assert words in error_of(example(name))


def test_missing_codec_names_its_package(tmp_path):
    """No package of ours decodes HTJ2K, so this is the real thing."""
    path = write(tmp_path / "a.dcm", syntax=HTJ2KLossless, pixel_data=encapsulate([b"\xff\x4f" * 10]))
    assert "missing dependencies" in (message := error_of(path)) and "pylibjpeg-openjpeg" in message


@pytest.mark.parametrize(
    "stored, tags, words",
    [
        (RAMP, WINDOW | {"WindowWidth": 0}, "Window Width must be"),
        (RAMP, {"WindowCenter": 60000, "WindowWidth": 10}, "--dicom_contrast mimic-cxr-jpg"),  # no black film
        (RAMP, {"RescaleSlope": 0, "RescaleIntercept": 5}, "all pixels the same gray"),
        (np.full((4, 5), 7, np.uint16), {"PixelPaddingValue": 7}, "zero-size"),
        (RAMP.astype(np.uint32), {"bits": 32}, "32 bits"),
    ],
)
def test_values_that_make_no_film(tmp_path, stored, tags, words):
    assert words in error_of(write(tmp_path / "a.dcm", stored, **tags))


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_damaged_files_are_read_or_refused_by_name(tmp_path, recwarn, contrast):
    rng, path = np.random.default_rng(0), tmp_path / "fuzzed.dcm"
    tags = WINDOW | {"RescaleSlope": 1, "NumberOfFrames": 1, "PixelPaddingValue": 0, "PatientName": "Phantom"}
    whole, read = write(path, RAMP[:6, :5], **tags).read_bytes(), 0
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.integers(128, len(whole), 3):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        for function in (dicom_size, lambda path: read_dicom(path, contrast), read_dicom_by_maximum):
            try:
                function(path)
                read += 1
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
    assert 100 < read < 500 and not recwarn.list


def test_missing_empty_and_cut_files(tmp_path):
    for name in ("none.dcm", "none.jpg"):
        assert "no such file" in error_of(tmp_path / name, radiograph_size).lower()
    whole, path = write(tmp_path / "a.dcm").read_bytes(), tmp_path / "cut.dcm"
    for length in (0, 140, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "DICOM" in error_of(path)
    assert "no Rows" in error_of(write(tmp_path / "r.dcm", Rows=0), dicom_size)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_flat_image_is_black(film, contrast):
    assert not film(np.full((4, 5), 77, np.uint16), contrast=contrast).any()


def test_empty_values_say_nothing(tmp_path):
    plain = read_dicom(write(tmp_path / "a.dcm", **WINDOW))
    empty = {"RescaleSlope": "", "RescaleIntercept": "", "VOILUTFunction": "", "PixelPaddingValue": 4095}
    np.testing.assert_array_equal(read_dicom(write(tmp_path / "b.dcm", **WINDOW, **empty)), plain)


def test_read_radiograph_goes_by_content(tmp_path):
    dicom, picture = write(tmp_path / "noname"), tmp_path / "picture.png"
    Image.fromarray(to_255(RAMP, 100, 3900)).save(picture)
    for path in (dicom, picture):
        np.testing.assert_array_equal(read_radiograph(path, "window"), to_255(RAMP, 100, 3900))
        assert radiograph_size(path) == (40, 30)
