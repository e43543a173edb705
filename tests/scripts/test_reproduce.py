"""scripts/reproduce.sh and ablate.sh with a stand-in for Python that notes what it is given. Real runs: tests/reliability."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scripts.ablate import seed_table

ROOT = Path(__file__).resolve().parents[2]
# Notes its words and does what the file HOOK says with them. `-c` is the question for the number of GPUs.
STAND_IN = rf"""#!/usr/bin/env bash
if [[ "$1" =~ ^scripts/(reproduce|ablate).py ]]; then exec {sys.executable} "$@"; fi
if [ "$1" = -c ]; then echo 2; exit; fi
printf '%s\0' "$@" '' >> "$NOTES"
if [ -e "$HOOK" ]; then . "$HOOK"; fi
"""


class Chain:
    """Calls of the script in a place with blanks, where data for them lie."""

    def __init__(self, root: Path):
        self.root = root / "a place"
        for name in ("reflacx", "mimic jpg", "rsna", "nih"):
            (self.root / name).mkdir(parents=True)
        (self.root / "bin").mkdir()
        self.tool("python", STAND_IN)
        self.notes, self.hook, self.out = self.root / "notes", self.root / "hook", self.root / "an out"
        self.out.mkdir()
        (self.out / "table.md").write_text("the table\n")
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "PYTHON": "bin/python",
            "NOTES": str(self.notes),
            "HOOK": str(self.hook),
            "REFLACX": "reflacx",
            "IMAGES": "mimic jpg",
            "RSNA": "rsna",
            "OUT": "an out",
            "PRETRAINED": "none",
            "COMPARE": "random",
            "EPOCHS": "7",
        }

    def tool(self, name: str, text: str) -> None:
        (self.root / "bin" / name).write_text(text)
        (self.root / "bin" / name).chmod(0o755)

    def start(self, script: str = "reproduce.sh", **settings: str) -> subprocess.Popen:
        self.notes.write_text("")
        return subprocess.Popen(
            ["bash", ROOT / "scripts" / script],
            cwd=self.root,
            env=self.env | settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def call(self, status: int = 0, **settings: str) -> tuple[list[str], str]:
        """Steps that were run, and what was said on stderr."""
        process = self.start(**settings)
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, out + err
        return [line[3:] for line in out.splitlines() if line[:3] == "== " and "done before" not in line], err

    def commands(self) -> list[list[str]]:
        return [call.split("\0") for call in self.notes.read_text().removesuffix("\0\0").split("\0\0")]

    def parsed(self) -> dict[str, list]:
        """What the programs' own parsers make of their words."""
        found: dict[str, list] = {}
        for words in self.commands():
            if words[0] == "scripts/launch.py":
                assert words[1:5] == ["--standalone", "--nproc_per_node", "2", "run_pretrain.py"]
                words = words[4:]
            module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
            found.setdefault(words[0], []).append(module.get_args_parser().parse_args(words[1:]))
        return found

    def until_noted(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.notes.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def chain(tmp_path) -> Chain:
    return Chain(tmp_path)


ALL = "prepare check rsna-linear-check pretrain export rsna-linear table pictures".split()


def test_every_command_is_understood_by_its_program(chain):
    settings = {
        "PREPARE_FLAGS": "--readings each",
        "MIMIC_FLAGS": "--views all",
        "PRETRAIN_FLAGS": "--dtype bfloat16 --batch_size 5",
    }
    settings |= {"PREDICTED_GAZE": "yes", "NIH": "nih", "METHODS": "linear probe finetune", "FRACTIONS": "0.01 1"}
    chain.call(**settings, DEVICE="cpu", GPUS="2", COMPARE="")
    parsed = chain.parsed()
    check, pretrained = parsed["run_pretrain.py"]
    assert check.check_data and not pretrained.check_data
    assert (pretrained.epochs, pretrained.gaze_weighted, pretrained.blr) == (7, True, 3e-3)
    assert (pretrained.warmup_epochs, pretrained.dtype) == (10, "bfloat16")
    # The GPUs share a batch, as the paper's one GPU has it. Somebody's own flag comes later, and wins.
    launched = next(words for words in chain.commands() if words[0] == "scripts/launch.py")
    assert [word for flag, word in itertools.pairwise(launched) if flag == "--batch_size"] == ["64", "5"]
    (read,), (filled,) = parsed["scripts/prepare_reflacx.py"], parsed["scripts/prepare_mimic.py"]
    assert (read.raw, read.images) == (chain.root / "reflacx", chain.root / "mimic jpg")
    assert not read.accept_damaged
    assert pretrained.data_path == [str(filled.out)]  # which holds REFLACX's images too
    dry, judged = parsed["run_downstream.py"][:6], parsed["run_downstream.py"][6:]
    assert all(args.dry_run for args in dry) and not any(args.dry_run for args in judged)
    methods = ("linear", "probe", "finetune")
    assert [(a.dataset, a.method) for a in judged] == list(itertools.product(("rsna", "nih"), methods))
    assert all(args.weights == [f"ours={chain.out}/backbone.pth"] for args in judged)
    (table,) = parsed["scripts/summarize_results.py"]
    assert table.results == [f"{args.output_dir}/results.csv" for args in judged]


def test_what_has_changed_is_done_again_and_what_reads_it(chain):
    (chain.out / "pretrain").mkdir()
    assert chain.call()[0] == ALL
    before = list(chain.out.glob("pretrain-before-*"))
    assert len(before) == 1  # which was none of ours
    assert chain.call(WORKERS="1", GPUS="1", ACCEPT_DAMAGED="yes")[0] == []
    assert chain.call(PICTURES="0")[0] == ["pictures"]
    assert chain.call(NIH="nih", PICTURES="0")[0] == ["nih-linear-check", "nih-linear", "table"]
    assert chain.call(EPOCHS="8")[0] == ["check", *ALL[3:]]
    # Ended between two steps: what was made from the old tree is still known to be old.
    chain.hook.write_text('[[ "$*" != *--check_data* ]]')
    assert chain.call(status=1, EPOCHS="8", PREPARE_FLAGS="--size 0")[0] == ["prepare", "check"]
    assert "--overwrite" in chain.commands()[0]  # a tree made from something else is replaced
    chain.hook.unlink()
    (chain.out / "pretrain").mkdir()
    assert chain.call(EPOCHS="8", PREPARE_FLAGS="--size 0")[0] == ["check", *ALL[3:]]
    assert len(list(chain.out.glob("pretrain-before-*"))) == 2 and not (chain.out / "pretrain").exists()


def test_what_was_begun_and_left_goes_on_and_an_out_can_be_moved(chain):
    """Also where power went off before a mark was on the disk: what lies there is kept, not taken for ours."""
    begun = f'{{ mkdir "{chain.out}/pretrain"; kill -9 $PPID; }}'
    chain.hook.write_text(f'[[ "$*" != *"--pretrained none"* ]] || {begun}')
    assert chain.call(status=-9)[0] == ALL[:4]
    chain.hook.unlink()
    chain.out = chain.out.rename(chain.root / "moved")
    assert chain.call(OUT="moved", REFLACX="./mimic jpg/../reflacx")[0] == ALL[3:]
    assert (chain.out / "pretrain").exists() and not list(chain.out.glob("pretrain-before-*"))
    assert chain.call(OUT="moved")[0] == []
    (chain.out / "steps/pretrain").write_text("")
    assert chain.call(OUT="moved")[0] == ALL[3:]
    assert len(list(chain.out.glob("pretrain-before-*"))) == 1


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"REFLACX": "", "IMAGES": ""}, "set REFLACX"),
        ({"NIH": "nowhere"}, "NIH={root}/nowhere: no such directory"),
        ({"PRETRAINED": "no.pth"}, "PRETRAINED={root}/no.pth: no such file"),
        ({"PREDICTED_GAZE": "true"}, "PREDICTED_GAZE=true: expected yes or no"),
        ({"GPUS": "3"}, "GPUS=3: torch sees 2"),
        ({"BATCH_SIZE": "5"}, "BATCH_SIZE=5: 2 GPUs can't share it"),
        ({"PRETRAIN_FLAGS": "--epochs 5"}, "PRETRAIN_FLAGS=--epochs 5: set EPOCHS"),
        (
            {"PREDICTED_GAZE": "yes", "PREPARE_FLAGS": "--split train"},
            "PREPARE_FLAGS=--split train: PREDICTED_GAZE=yes",
        ),
        ({"OUT": "hook"}, "{root}/hook"),
    ],
    ids=str,
)
def test_what_can_not_work_is_refused_at_once(chain, wrong, told):
    chain.hook.touch()
    steps, err = chain.call(status=1, **wrong)
    assert steps == [] and err.startswith("error: " + told.format(root=chain.root)) and err.count("\n") == 1
    assert not chain.notes.read_text()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_lets_the_step_save_and_ends_the_script(chain, signum, status):
    """Also where the step has come to its end meanwhile. Before its time is up a job goes back into the queue."""
    chain.tool("scontrol", '#!/usr/bin/env bash\necho "$*" >> "$NOTES"\n')
    chain.hook.write_text(
        """trap 'sleep 0.2; echo saved >> "$NOTES"; exit 0' TERM
        if [ "$1" = run_pretrain.py ]; then echo started >> "$NOTES"; while :; do sleep 0.02; done; fi"""
    )
    process = chain.start(SLURM_JOB_ID="77")
    chain.until_noted("started")
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.splitlines()[1] == "stopped before step 'rsna-linear-check'; the same command continues from here"
    assert chain.notes.read_text().split("saved\n")[1] == ("requeue 77\n" if status == 75 else "")


def test_one_at_a_time_in_an_out_even_where_the_script_was_killed(chain):
    chain.hook.write_text('if [ "$1" = run_pretrain.py ]; then echo $$ >> "$NOTES.pid"; exec sleep 60; fi')
    process = chain.start()
    chain.until_noted("run_pretrain.py")
    process.kill()
    process.wait(60)  # the step goes on
    steps, err = chain.call(status=1)
    assert steps == [] and err.count("\n") == 1
    assert err.startswith("error: OUT=") and f"is in use by process {process.pid} on" in err
    os.kill(int(Path(f"{chain.notes}.pid").read_text()), signal.SIGKILL)
    chain.hook.unlink()
    assert chain.call()[0] == ALL[1:]


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_command_of_the_ablation_is_understood(chain, preset):
    """In a place with blanks and signs. Its table compares settings seed by seed."""
    out, gpu = chain.root / "an out & 100%", preset == "gpu"
    (out / "downstream/s0").mkdir(parents=True)
    seed_results().to_csv(out / "downstream/s0/results.csv", index=False)
    settings = {"script": "ablate.sh", "PRESET": preset, "SEEDS": "0 1", "JOBS": "1", "OUT": str(out)}
    chain.call(**settings)
    parsed = chain.parsed()
    studies, pretrained, probes = (
        parsed[name] for name in ("scripts/make_phantom.py", "run_pretrain.py", "run_downstream.py")
    )
    assert len({args.seed for args in studies}) == len(studies) == (16 if gpu else 2)
    assert sum(args.n_images for args in studies) == (8000 if gpu else 368)
    assert len({(args.masking, args.gaze_weighted, args.seed) for args in pretrained}) == len(pretrained) == 12
    model = ("cxrmim_vit_base_patch16", 224, "cuda") if gpu else ("cxrmim_vit_tiny_patch16", 96, "cpu")
    assert {(args.model, args.input_size, args.device) for args in pretrained} == {model}
    read, judged_on = set(pretrained[0].data_path), set(probes[0].data_path)
    assert read | judged_on == {str(Path(args.out).parent / "tree") for args in studies} and not read & judged_on
    files = {f"{args.masking}_{'' if args.gaze_weighted else 'un'}weighted_s{args.seed}" for args in pretrained}
    files = {f"{name}={out}/runs/{name}/backbone.pth" for name in files}
    assert {weight for args in probes for weight in args.weights} == {*files, "random", "pixels"}
    assert set(pd.read_csv(out / "table.csv")["label"]) == {"Mass", "mean"}
    assert "can't share" in chain.call(1, **settings, PARTS="3")[1]
    assert gpu or chain.call(**settings)[0] == []


AUCS = {"random_unweighted": [0.6, 0.7, 0.8], "attention_weighted": [0.7, 0.75, 0.95]}


def seed_results() -> pd.DataFrame:
    """Of two settings with three seeds each; and raw pixels, which the table leaves out."""
    rows = [["Mass", f"{name}_s{seed}, cls", auc] for name, runs in AUCS.items() for seed, auc in enumerate(runs)]
    rows += [["Mass", "pixels", 0.5], ["mean", "random_unweighted_s0, cls", 0.7]]
    return pd.DataFrame(rows, columns=["label", "weights", "auc"]).assign(seed=0)


def test_settings_of_the_ablation_are_paired_by_seed():
    table = seed_table([seed_results()]).loc["cls", "Mass"]
    half = 4.302653 * np.std([0.7, 0.75, 0.95], ddof=1) / np.sqrt(3)  # t quantile of 2 degrees of freedom
    row = table.loc["attention_weighted"]
    assert (row["auc"], row["high"] - row["auc"], row["seeds"]) == pytest.approx((0.8, half, 3))
    assert row["difference"] == pytest.approx(0.1)  # of 0.1, 0.05, 0.15
    assert row["diff_high"] - 0.1 == pytest.approx(0.1 - row["diff_low"]) == pytest.approx(4.302653 * 0.05 / np.sqrt(3))
    assert table["difference"].isna().tolist() == [False, True]
