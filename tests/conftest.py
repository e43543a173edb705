"""What several test files read (and never write to): a small phantom study, raw and processed; a backbone."""

import signal
from functools import partial

import pytest
import timm
import torch

from datasets.phantom.gaze_study import make_study
from datasets.prepare.readings import prepare
from models_cxrmim import ENCODERS

torch.set_num_threads(1)  # tests run in parallel processes

# Under nohup SIGHUP is ignored and in the background of a script SIGINT, which each process would inherit; the tests are
# about the usual case.
for signum, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, usual)


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Raw REFLACX layout: 12 images of 192 x 224 px, 18 readings."""
    return make_study(tmp_path_factory.mktemp("study"), n_images=12, size=(224, 192))


@pytest.fixture(scope="session")
def tree(study, tmp_path_factory):
    """The processed tree of `study`: 12 entries."""
    out = tmp_path_factory.mktemp("processed")
    prepare(raw=study.raw, images=study.images, out=out, size=0, workers=1)
    return out


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """File of a small ViT with random weights for images of 32 px."""
    torch.manual_seed(9)
    model = timm.create_model("vit_base_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=1, num_classes=0)
    path = tmp_path_factory.mktemp("backbone") / "backbone.pth"
    torch.save({"state_dict": model.state_dict(), "metadata": {"num_heads": "1"}}, path)
    return path


@pytest.fixture
def narrow(monkeypatch):
    """The tiny model with a quarter of its width, so that a checkpoint has 4 MB."""
    name = "cxrmim_vit_tiny_patch16"
    monkeypatch.setitem(ENCODERS, name, partial(ENCODERS[name], embed_dim=48, decoder_embed_dim=32))


# Not needed by what runs on a GPU node; the tests that need one of them are skipped where it is not installed.
OPTIONAL = ("hypothesis", "pydicom", "torchxrayvision", "cv2")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """A test file that imports an optional package which isn't there is skipped, by name."""
    report = yield
    if report.failed:
        lacking = [name for name in OPTIONAL if f"No module named '{name}" in str(report.longrepr)]
        if lacking:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 1, f"Skipped: {lacking[0]} is not installed")
    return report


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` are skipped, by name, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
