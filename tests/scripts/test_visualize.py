"""Pictures: glyphs point the right way, panels show what they claim, training batches come back exactly."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import run_pretrain
from datasets.build import build_dataset
from datasets.phantom.gaze_study import make_study
from datasets.replay import training_batch
from datasets.sampler import TrainBatches
from datasets.shown import training_dataset
from datasets.single_image import single_image
from models_cxrmim import CXRMIM
from scripts import visualize
from scripts.visualize import errors, main, mean_targets
from util.checkpoint import load_checkpoint, save_checkpoint
from util.errors import UserError
from util.masking import mask_generator
from util.pictures import hog_glyphs, mask_picture, prediction_picture, reconstruct
from util.radiograph import CONTRASTS, read_radiograph

SMALL = dict(
    img_size=64, embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=32, id_list=(0, 1), scale_list=(2.0, 0.5)
)
ARGS = dict(
    id_list=[0, 1], batch_size=2, seed=5, mask_ratio=0.5, clinical_ratio=0.5, accum_iter=1, epochs=4, use_cache=False
)


@pytest.fixture(scope="module")
def model() -> CXRMIM:
    torch.manual_seed(0)
    return CXRMIM(**SMALL)


@pytest.fixture(scope="module")
def checkpoint(model, tree, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("run") / "checkpoint-3.pth"
    about = {"args": ARGS | {"data_path": str(tree)}, "epoch": 3, "world_size": 1}
    torch.save({"model": model.state_dict(), "model_config": model.config, **about}, path)
    return str(path)


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two images of noise, of which the corner was looked at."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.zeros(2, 64, 64, dtype=torch.uint8)
    attention[:, :32, :32] = 255
    return {
        "img": torch.randint(0, 256, (2, 1, 64, 64), generator=generator, dtype=torch.uint8),
        "attention": attention,
    }


# ---------------------------------------------------------------- glyphs and panels


@pytest.mark.parametrize("degrees", [20, 60, 120])  # in the middle of a bin
def test_glyph_lies_along_the_edge_of_a_real_image(model, degrees):
    """Stripes in a direction give lines in that direction (y down), through the model's own HOG."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    y, x = np.mgrid[:64, :64]
    stripes = torch.from_numpy(127 + 100 * np.sin(0.6 * (y * cosine - x * sine))).to(torch.uint8)[None, None]
    prepared = model.prepare_batch({"img": stripes, "attention": torch.zeros(1, 64, 64)})
    hog = model.hog_targets(prepared["img"])[1].view(2, 2, 3, 9)[:, :, 0].numpy()  # 32 px cells
    drawn = hog_glyphs(hog, cell=63)[:63, :63]
    right, down = round(20 * cosine), round(20 * sine)
    assert drawn[31 + down, 31 + right] > 3 * drawn[31 + right, 31 - down]


def test_pictures_of_mask_and_prediction():
    """The masked patches alone are coloured; a visible cell is hatched, whatever was predicted there."""
    gray = np.full((32, 32), 0.5)
    masked, significant = np.array([[True, False], [True, False]]), np.array([[True, True], [False, False]])
    picture = mask_picture(gray, significant, masked)
    assert (picture[:, 16:] == 0.5).all()
    orange, blue = picture[:16, :16], picture[16:, :16]
    assert (orange[..., 0] > orange[..., 2]).all() and (blue[..., 0] < blue[..., 2]).all()
    prediction = np.eye(9)[np.full((2, 2), 4)]
    picture = prediction_picture(prediction, masked, pixels=40)
    assert np.array_equal(picture[:, :20], hog_glyphs(prediction[:, :1], 20)[..., None].repeat(3, 2))
    changed = prediction_picture(np.where(masked[..., None], prediction, 0.5), masked, pixels=40)
    assert np.array_equal(picture, changed) and picture[:, 20:].max() < 0.5


def test_references_are_the_errors_of_the_mean_targets(model):
    """One constant for all cells of a scale, and the mean of each cell over the training images."""
    batch, other, mask = make_batch(), make_batch(1), torch.ones(2, 16)
    references = mean_targets(model, {key: torch.cat([batch[key], other[key]]) for key in batch})
    found = reconstruct(model, batch, mask, references)
    expected = dict.fromkeys(references, 0.0)
    for one, two in zip(found.targets, reconstruct(model, other, mask).targets, strict=True):
        both = np.concatenate([one, two])
        expected["one constant for all cells"] += ((one - both.mean((0, 1, 2))) ** 2).mean()
        expected["the mean of each place"] += ((one - both.mean(0)) ** 2).mean()
    assert {name: error.mean() for name, error in found.references.items()} == pytest.approx(expected, rel=1e-4)


def test_error_of_patches_is_the_loss(model):
    """Averaged over masked patches, the error panel is the model's own unweighted loss (fine scales)."""
    fine, batch = CXRMIM(**SMALL | {"scale_list": (4.0, 1.0)}), make_batch()
    mask = (torch.arange(16).repeat(2, 1) % 3 == 0).float()
    found = reconstruct(fine, batch, mask)
    loss = fine(batch, mask=mask).item()
    assert found.error[found.masked].mean() == pytest.approx(loss, rel=1e-5)
    assert errors(found, ...) == f"{loss:.4f} of the model"
    assert fine.training


def test_reconstruction_of_a_coarse_scale(model):
    batch, mask = make_batch(), torch.eye(16)[[0, 0]]
    found = reconstruct(model, batch, mask)
    assert found.predicted[1].tolist() == [[[True, False], [False, False]]] * 2
    assert found.predicted[0].sum() == 2 * 4
    assert np.abs(found.gray * 255 - batch["img"][:, 0].numpy()).max() < 1e-3
    assert found.significant[0].sum() == 4 and found.significant[0, :2, :2].all()


# ---------------------------------------------------------------- what training saw


@pytest.mark.parametrize("ranks", [{}, {"rank": 1, "world_size": 2}])
def test_training_batch_comes_back_exactly(model, tree, ranks):
    """Crops, flips and masks of a step equal those of the loader and the generator that training uses."""
    seen = build_dataset(tree, input_size=64, seed=ARGS["seed"], use_cache=False)
    sampler = TrainBatches(len(seen), 2, seed=ARGS["seed"], epochs=2, **ranks)
    batches = list(DataLoader(seen, batch_sampler=sampler))
    dataset = training_dataset(ARGS, [str(tree)], 64, augment=True)
    for epoch, step in [(0, 0), (1, sampler.steps_per_epoch - 1)]:
        expected = batches[epoch * sampler.steps_per_epoch + step]
        shown = training_batch(model, dataset, ARGS, epoch=epoch, step=step, **ranks)
        assert all(torch.equal(shown.batch[key], expected[key]) for key in expected)
        generator = mask_generator(ARGS["seed"], epoch, step, ranks.get("rank", 0), "cpu")
        assert torch.equal(shown.mask, model.draw_mask(model.prepare_batch(expected), 0.5, 0.5, generator))
        assert len(shown.indices) == 2


OUR_COLUMNS = "x,y,duration,sigma_x,sigma_y,xmin,ymin,xmax,ymax"
REFLACX_HEADER = (
    "x_position,y_position,timestamp_start_fixation,timestamp_end_fixation,angular_resolution_x_pixels_per_degree,"
    "angular_resolution_y_pixels_per_degree,xmin_shown_from_image,ymin_shown_from_image,xmax_shown_from_image,"
    "ymax_shown_from_image"
)


@pytest.mark.parametrize(
    "text", [f"{OUR_COLUMNS}\n48,20,1,5,5,0,0,96,64\n", f"{REFLACX_HEADER}\n48,20,3.5,4.5,5,5,0,0,96,64\n"]
)
def test_heatmap_made_from_fixations(model, tmp_path, text):
    gray = np.random.default_rng(0).integers(0, 256, (64, 96), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "x.png")
    (tmp_path / "fixations.csv").write_text(text)
    shown = single_image(model, ARGS, tmp_path / "x.png", fixations=tmp_path / "fixations.csv")
    assert torch.equal(shown.batch["img"][0, 0], torch.from_numpy(gray[:, 16:80]))  # the centre square
    peak = shown.batch["attention"][0].argmax().item()
    assert divmod(peak, 64) == (20, 32) and shown.batch["attention"].max() == 255


@pytest.mark.parametrize("flags", [[], ["--dicom_contrast", CONTRASTS[-1]]])
def test_command_reads_dicom_in_the_contrast_that_is_asked_for(checkpoint, tmp_path, monkeypatch, flags):
    """By default in that of the paper's pictures."""
    image = make_study(tmp_path, n_images=1, size=(64, 64), image_format="dcm", shared_images=0).truth[0].path
    drawn = []
    monkeypatch.setattr(
        visualize, "reconstruct", lambda m, batch, *how: drawn.append(batch) or reconstruct(m, batch, *how)
    )
    main([checkpoint, "--image", str(image), *flags, "--out", str(tmp_path / "p.png")])
    expected = read_radiograph(image, *flags[1:] or ["mimic-cxr-jpg"])
    assert torch.equal(drawn[0]["img"][0, 0], torch.from_numpy(expected))


# ---------------------------------------------------------------- the command


@pytest.mark.usefixtures("narrow")
def test_steps_that_the_run_saw_otherwise_are_refused(tree, tmp_path):
    """Before a change of options; and all of them once the tree has changed."""
    tree = shutil.copytree(tree, tmp_path / "tree")
    command = f"--model cxrmim_vit_tiny_patch16 --input_size 64 --device cpu --num_workers 0 --data_path {tree} "
    command += f"--output_dir {tmp_path} --id_list 1 3 --scale_list 2 0.5"
    assert run_pretrain.main(f"{command} --batch_size 2 --epochs 1".split()) == 0
    assert run_pretrain.main(f"{command} --batch_size 3 --epochs 2".split()) == 0

    def show(checkpoint, epoch):
        step = ["--epoch", epoch, "--step", "1", "--sheet", "--out", str(tmp_path / "p.png")]
        return main([str(tmp_path / checkpoint), *step])

    assert show("checkpoint-0.pth", "0") == show("checkpoint-1.pth", "1") == 0
    with pytest.raises(UserError, match="--epoch 0 --step 1: the run went on with other options or data from epoch 1 "):
        show("checkpoint-1.pth", "0")
    state = load_checkpoint(tmp_path / "checkpoint-1.pth")
    save_checkpoint(state | {"threads": None}, tmp_path / "of-a-gpu.pth")
    with pytest.raises(UserError, match="--device cpu: the run drew its masks on cuda; pass --device cuda"):
        show("of-a-gpu.pth", "1")
    # A run that moves to another kind of device draws other masks from there on.
    assert run_pretrain.main(f"{command} --batch_size 3 --epochs 3 --resume {tmp_path}/of-a-gpu.pth".split()) == 0
    with pytest.raises(UserError, match="--epoch 1 --step 1: the run went on with other options or data from epoch 2 "):
        show("checkpoint-2.pth", "1")
    heatmap = next((tree / "attention").rglob("*.png"))
    Image.fromarray(np.roll(np.asarray(Image.open(heatmap)), 9)).save(heatmap)
    with pytest.raises(UserError, match="--data_path: holds other images or heatmaps than the run trained on"):
        show("checkpoint-1.pth", "1")


@pytest.mark.parametrize("flags", ["--index 4 1", "--epoch 3 --step 0 --sheet", "--image {image} --heatmap {heatmap}"])
def test_command_draws(checkpoint, tree, tmp_path, flags):
    image = next(tree.glob("images/*/*.png"))
    heatmap = next(tree.glob(f"attention/{image.parent.name}/*.png"))
    words = flags.format(image=image, heatmap=heatmap).split()
    assert main([checkpoint, *words, "--out", str(tmp_path / "p.png")]) == 0
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert picture.shape[1] > 550 and len(np.unique(picture[::8, ::8].reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--index 99", "--index 99.*0 to 11"),
        ("--epoch 0", "--epoch and --step"),
        ("--epoch 4 --step 0", "^--epoch 4: the run had 4 epochs, 0 to 3$"),  # batches know no end of their own
        ("--epoch 0 --step 6", "--step 6.*0 to 5"),
        ("--epoch 0 --step 0 --rank 1", "--rank 1"),
        ("--mask_ratio 1.0", "^--mask_ratio 1.0"),
        ("--heatmap x.png", "--image"),
        ("--image {image} --heatmap {folder}/small.png", "small.png: 10 x 12 px"),
        ("--image {image} --fixations {folder}/zero.csv", "zero.csv: no fix"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(checkpoint, tree, tmp_path, flags, told):
    Image.new("L", (10, 12)).save(tmp_path / "small.png")
    (tmp_path / "zero.csv").write_text(f"{OUR_COLUMNS}\n48,20,0,5,5,0,0,96,64\n")
    words = flags.format(image=next(tree.glob("images/*/*.png")), folder=tmp_path).split()
    with pytest.raises(UserError, match=told):
        main([checkpoint, *words, "--out", str(tmp_path / "p.png")])
    assert not (tmp_path / "p.png").exists()
