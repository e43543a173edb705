"""What scripts/ablate.sh runs with its variables: masking x loss x seeds on a made-up study, judged on a second one."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
from scipy import stats

from scripts.steps import Steps, located, running
from util.cli import Parser
from util.errors import run_cli

KINDS = "nodule mass consolidation effusion"
# Findings of readings in phase 2 of REFLACX that these lesions have; the others have no image to learn from.
LABELS = "'Any finding' 'Lung nodule or mass' Consolidation 'Pleural abnormality'"
MASKINGS, LOSSES, REFERENCE = ("attention", "random", "block"), ("unweighted", "weighted"), "random_unweighted"


def get_args_parser() -> argparse.ArgumentParser:
    return Parser(description=__doc__)


def main(argv: list[str] | None = None) -> int:
    get_args_parser().parse_args(argv)
    v = SimpleNamespace(**os.environ)
    v.OUT = located(v.OUT)
    with running(v.OUT, quiet=True) as step:
        ablate(v, step)
        table = seed_table([pd.read_csv(path) for path in Path(v.OUT, "downstream").glob("*/results.csv")])
        table.to_csv(Path(v.OUT, "table.csv"), float_format="%.4f")
        print(table.to_string(float_format="{:.3f}".format))
        print(f"mean over seeds, 95% intervals (Student's t); differences to {REFERENCE}, paired by seed")
    return 0


def ablate(v: SimpleNamespace, step: Steps) -> None:
    """All steps. Paths in a command are quoted, those in `place` not."""
    out, seeds, parts = shlex.quote(v.OUT), v.SEEDS.split(), range(int(v.PARTS))
    busy = f"--device {v.DEVICE} --num_workers {v.WORKERS}"

    def study(name: str, images: str, seed: int) -> None:
        lesions = f"--lesion_size {v.LESION_SIZE} --lesion_contrast {v.LESION_CONTRAST} --dwell_ratio {v.DWELL_RATIO}"
        command = f"scripts/make_phantom.py --out {out}/{name}/raw --n_images {int(images) // len(parts)} --seed {seed}"
        command += f" --width {v.IMAGE_SIZE} --height {v.IMAGE_SIZE} --shared_images 0 --normal_fraction 0.4"
        step(f"{name}-raw", f"{command} --lesion_kinds {KINDS} {lesions}", place=f"{v.OUT}/{name}/raw")
        command = f"scripts/prepare_reflacx.py --raw {out}/{name}/raw/reflacx --images {out}/{name}/raw/mimic"
        command += f" --out {out}/{name}/tree --size {v.IMAGE_SIZE}"
        step(name, command, reads=f"{name}-raw", how="--workers 2 --overwrite")

    wanted = [(f"pretrain-{part}", v.N_IMAGES, 100 + part) for part in parts]
    wanted += [(f"probe-{part}", v.N_PROBE, 200 + part) for part in parts]
    side_by_side(study, wanted, len(wanted))

    def several(text: str) -> str:
        return " ".join(text.format(part) for part in parts)

    def pretrain(seed: str, masking: str, loss: str) -> None:
        name = f"{masking}_{loss}_s{seed}"
        run, last = f"runs/{name}", f"checkpoint-{int(v.EPOCHS) - 1}.pth"
        command = f"run_pretrain.py --data_path {several(f'{out}/pretrain-{{}}/tree')} --output_dir {out}/{run}"
        command += f" --model cxrmim_vit_{v.MODEL}_patch16 --pretrained {v.WEIGHTS} --input_size {v.INPUT_SIZE}"
        command += f" --batch_size {v.BATCH_SIZE} --epochs {v.EPOCHS} --warmup_epochs {int(v.EPOCHS) // 10} --lr 5e-4"
        command += f" --save_every {v.EPOCHS} --masking {masking} --seed {seed}"
        command += " --gaze_weighted" * (loss == "weighted")
        command += " --no_cache" if v.DEVICE == "cpu" else f" --cache_size {v.IMAGE_SIZE}"
        step(name, command, reads=several("pretrain-{}"), how=busy, place=f"{v.OUT}/{run}")
        step(f"{name}-export", f"scripts/export_backbone.py {out}/{run}/{last} {out}/{run}/backbone.pth", reads=name)
        Path(v.OUT, run, last).unlink(missing_ok=True)  # 1 GB each

    side_by_side(pretrain, product(seeds, MASKINGS, LOSSES), int(v.JOBS))

    def judge(seed: str) -> None:
        names = [f"{masking}_{loss}_s{seed}" for masking, loss in product(MASKINGS, LOSSES)]
        weights = " ".join(f"{name}={out}/runs/{name}/backbone.pth" for name in names)
        weights += " random pixels" * (seed == seeds[0])
        command = f"run_downstream.py --dataset tree --data_path {several(f'{out}/probe-{{}}/tree')} --split folds"
        command += f" --labels {LABELS} --method probe --seeds 0 --weights {weights} --min_positives 10"
        command += f" --normalisation imagenet --output_dir {out}/downstream/s{seed}"
        exported = " ".join(f"{name}-export" for name in names)
        step(f"judge-s{seed}", command, reads=f"{several('probe-{}')} {exported}", how=busy)

    side_by_side(judge, product(seeds), len(seeds))


def side_by_side(function: Callable[..., None], calls: Iterable[tuple], jobs: int) -> None:
    """Call it with each tuple, so many at a time. Where one fails, those at work end, and no other begins."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(function, *zip(*calls)))


def seed_table(results: list[pd.DataFrame]) -> pd.DataFrame:
    """Gather runs that differ in their seed only.

    Args:
        results: tables of `results.csv`, where the weights are named "SETTING_sSEED, PART"; rows of other weights are
            ignored.

    Returns:
        By part, label and setting: seeds, mean AUC with a 95% interval (Student's t over the seeds: training noise,
        for these test images), and the mean paired difference to `REFERENCE` with its interval.
    """
    table = pd.concat(results, ignore_index=True)
    names = table["weights"].str.extract(r"^(?P<setting>.+)_s(?P<seed>\d+), (?P<features>.+)$")
    aucs = table[["label", "auc"]].join(names).pivot_table("auc", ["features", "label", "setting"], "seed")
    reference = aucs.xs(REFERENCE, level="setting").reindex(aucs.index.droplevel("setting")).to_numpy()
    differences = (aucs - reference).drop(REFERENCE, level="setting")
    found = {"seeds": aucs.count(axis=1)}
    for name, prefix, values in (("auc", "", aucs), ("difference", "diff_", differences)):
        half = stats.t.ppf(0.975, values.count(axis=1) - 1) * values.sem(axis=1)  # NaN for a single run
        found[name] = values.mean(axis=1)
        found |= {f"{prefix}low": found[name] - half, f"{prefix}high": found[name] + half}
    return pd.DataFrame(found)


if __name__ == "__main__":
    run_cli(main)
