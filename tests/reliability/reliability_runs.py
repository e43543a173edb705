"""Real pretraining processes for the tests of this directory: started, disturbed, waited for, compared.

A fork server imports torch once, and each run is a fresh fork of it: a real process of its own session that
costs no import. Faults are callables that patch the forked process before it calls `run_pretrain.main`, so
the program itself has no hook for them. Run as a script, this file is `run_pretrain.py` with a fault, for
torchrun: `reliability_runs.py FAULT_NAME [ARGUMENT ...] -- FLAGS`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import engine_pretrain
import run_pretrain
from datasets import tree
from util import checkpoint, files
from util.errors import run_cli
from util.images import write_gray

CONTEXT = multiprocessing.get_context("forkserver")

MODEL = (
    "--model cxrmim_vit_tiny_patch16 --input_size 64 --id_list 0 1 --scale_list 4.0 0.5 --device cpu "
    "--pretrained none --warmup_epochs 1 --blr 0.05 --save_every 1 --print_every 2"
).split()
TIMES = ("time_s",)
N_SAMPLES = 13


def make_tree(root: Path, n: int = N_SAMPLES) -> Path:
    """A processed REFLACX tree of noise pictures, each with one attended spot."""
    generator = np.random.default_rng(0)
    entries = []
    for i in range(n):
        size = 40 + i % 3
        image = generator.integers(0, 256, (size, size), dtype=np.uint8)
        y, x = np.mgrid[:size, :size] - generator.integers(8, size - 8, (2, 1, 1))
        attention = np.round(255 * np.exp(-(x**2 + y**2) / 100)).astype(np.uint8)
        entry = {"image_path": f"files/{i}.png", "study_id": i, "reflacx_id": f"P300R{i:06d}"}
        for path, array in (
            (entry["image_path"], image),
            (f"attention/{i}/P300R{i:06d}.png", attention),
            (f"foreground/{i}/P300R{i:06d}.png", (attention > 100) * np.uint8(255)),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            write_gray(root / path, array)
        entries.append(entry)
    (root / "reflacx.json").write_text(json.dumps(entries))
    return root


def start_process(target: Callable, *args) -> multiprocessing.Process:
    """A fork of the fork server, which starts with the first."""
    # The server looks for what it should import in PYTHONPATH only, and ignores what it doesn't find.
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(run_pretrain.__file__).parent)])
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = paths if earlier is None else os.pathsep.join([paths, earlier])
    CONTEXT.set_forkserver_preload(["reliability_runs", "downstream.main", "downstream.figure"])
    try:
        forkserver.ensure_running()
    finally:
        if earlier is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = earlier
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


class Run:
    """A run of `run_pretrain.py`, or of another program's `main`, in a process, or one of its ranks, with all it
    prints in `output`."""

    def __init__(
        self,
        argv: list[str],
        log: Path,
        *,
        fault: Callable | None = None,
        env: dict | None = None,
        main: Callable = run_pretrain.main,
    ):
        self.log = log
        self.began = time.monotonic()
        self.process = start_process(_run, main, argv, str(log), fault, env or {})

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout: float = 60) -> int:
        """Exit status; negative for a signal. Fails if the run doesn't end in time."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s:\n{self.output}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, text: str, timeout: float = 60) -> None:
        """Wait until the run has printed `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            assert time.monotonic() < deadline and self.process.is_alive(), self.output
            time.sleep(0.01)


def _run(main: Callable, argv: list[str], log: str, fault: Callable | None, env: dict[str, str]) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = [f"{main.__module__}.py", *argv]
    shrink_model()
    if fault is not None:
        fault()
    run_cli(partial(main, argv))


def run(argv: list[str], log: Path, **kwargs) -> tuple[int, str]:
    """Exit status and output of a run."""
    one = Run(argv, log, **kwargs)
    return one.wait(), one.output


def start_ranks(
    argv: list[str], log: Path, *, faults: dict[int, Callable] | None = None, n: int = 2, **kwargs
) -> list[Run]:
    """A run of `n` ranks, as a launcher would start it, each with its own fault and log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Run(
            argv,
            log.with_name(f"{log.name}.{rank}"),
            fault=(faults or {}).get(rank),
            env={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            **kwargs,
        )
        for rank in range(n)
    ]


def run_ranks(argv: list[str], log: Path, **kwargs) -> tuple[list[int], list[str]]:
    """Exit status and output of every rank."""
    ranks = start_ranks(argv, log, **kwargs)
    return [rank.wait() for rank in ranks], [rank.output for rank in ranks]


def processes_of(session: int) -> list[int]:
    """Living processes of a run's session: the run itself and its data workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def processes_with(token: str) -> list[int]:
    """Living processes that were started with `token` in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if token.encode() in environ.read_bytes():
                found.append(int(environ.parent.name))
    return found


def wait_until_gone(find: Callable[[], list[int]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := find():
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.05)


def shrink_model() -> None:
    """Two narrow blocks behind the name of the tiny model: a checkpoint is 1 MB, and a run a second."""
    run_pretrain.models_cxrmim.ENCODERS["cxrmim_vit_tiny_patch16"] = partial(
        run_pretrain.models_cxrmim.CXRMIM, embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32
    )


# --- Faults: call one in a run's process before it starts ---------------------------------------------------


def at_step(epoch: int, step: int, action: Callable[[], None]) -> None:
    """Do `action` before the forward pass of a step."""
    original = engine_pretrain.mask_generator

    def patched(seed, its_epoch, its_step, *args):
        if (its_epoch, its_step) == (epoch, step):
            action()
        return original(seed, its_epoch, its_step, *args)

    engine_pretrain.mask_generator = patched


def send_self(signum: int) -> None:
    os.kill(os.getpid(), signum)


def signal_at(epoch: int, step: int, signum: int) -> None:
    """Send this process a signal before a step."""
    at_step(epoch, step, partial(send_self, signum))


def signal_at_call(module: str, name: str, number: int, signum: int) -> None:
    """Send this process a signal before the `number`-th call of a module's function."""
    place = importlib.import_module(module)
    original, calls = getattr(place, name), []

    def patched(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            send_self(signum)
        return original(*args, **kwargs)

    setattr(place, name, patched)


def pause_at(epoch: int, step: int) -> None:
    """Wait for a signal before a step."""

    def pause() -> None:
        print("paused", flush=True)
        signal.pause()

    at_step(epoch, step, pause)


def kill_in_save(boundary: str, name: str) -> None:
    """kill -9 at a boundary of the save of the checkpoint called `name`.

    In order: "before write", "in write", "before fsync", "after fsync", "before rename", "after rename",
    "after directory fsync", "before prune", "after unlink" (of a superseded file), "after prune".
    """
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    active = {"save": False, "prune": False}
    fsyncs = []

    def around(original: Callable, before: Callable | None = None, after: Callable | None = None) -> Callable:
        def patched(*args, **kwargs):
            if before is not None and active["save"]:
                before()
            result = original(*args, **kwargs)
            if after is not None and active["save"]:
                after()
            return result

        return patched

    def on_fsync_done() -> None:
        fsyncs.append(None)
        if boundary == ("after fsync" if len(fsyncs) == 1 else "after directory fsync"):
            die()

    atomic_write = checkpoint.atomic_write

    @contextlib.contextmanager
    def dying_write(path):
        with atomic_write(path) as file:

            def write_half(content) -> None:
                file.write(content[: len(content) // 2])
                file.flush()
                die()

            if active["save"] and boundary == "before write":
                die()
            yield SimpleNamespace(write=write_half) if active["save"] and boundary == "in write" else file

    def die_at(*boundaries: str) -> Callable | None:
        return die if boundary in boundaries else None

    os.fsync = around(os.fsync, die_at("before fsync"), on_fsync_done)
    os.replace = around(os.replace, die_at("before rename"), die_at("after rename"))
    checkpoint.atomic_write = dying_write
    unlink = Path.unlink

    def patched_unlink(path, *args, **kwargs):
        unlink(path, *args, **kwargs)
        if boundary == "after unlink" and active["prune"]:
            die()

    Path.unlink = patched_unlink
    save, prune = checkpoint.save_checkpoint, checkpoint.prune

    def patched_save(state, path):
        active["save"] = Path(path).name == name
        save(state, path)
        active["prune"], active["save"] = active["save"], False

    def patched_prune(*args, **kwargs):
        if active["prune"] and boundary == "before prune":
            die()
        prune(*args, **kwargs)
        if active["prune"] and boundary == "after prune":
            die()

    checkpoint.save_checkpoint, checkpoint.prune = patched_save, patched_prune


def loss_at(epoch: int, step: int, value: float) -> None:
    """Make the finest scale's loss `value` at a step."""
    due = []
    at_step(epoch, step, partial(due.append, True))
    original = run_pretrain.models_cxrmim.CXRMIM.scale_losses

    def patched(self, *args, **kwargs):
        losses = original(self, *args, **kwargs)
        if due:
            due.clear()
            losses = losses * torch.tensor([value] + [1.0] * (len(losses) - 1))
        return losses

    run_pretrain.models_cxrmim.CXRMIM.scale_losses = patched


def gradient_at(epoch: int, step: int, value: float) -> None:
    """Make one gradient `value` at a step, in the backward pass, with a finite loss."""

    def arm() -> None:
        handles = []

        def spoil(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * value)
                handles.pop().remove()

        handles.append(
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, inputs, output: (
                    spoil(module, inputs, output) if isinstance(module, torch.nn.LayerNorm) and handles else None
                )
            )
        )

    at_step(epoch, step, arm)


def limit_file_size(n_bytes: int, epoch: int, step: int) -> None:
    """From a step on, the kernel refuses to let any file grow beyond `n_bytes`, as a full disk would."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = (n_bytes, resource.RLIM_INFINITY)
    at_step(epoch, step, partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits))


def together(*faults: Callable[[], None]) -> None:
    """Several faults in one process."""
    for fault in faults:
        fault()


def pause_in_build() -> None:
    """Wait for a signal in the building of the cache, while a plane is half-written."""
    original = tree.read_gray

    def patched(file):
        print("paused", flush=True)
        time.sleep(1)  # in one of several threads; a signal goes to the main thread, which waits for it
        return original(file)

    tree.read_gray = patched


def impatient() -> None:
    """Do not wait long for a lock that another run holds."""
    files.PATIENCE_SECONDS = 0.1


def dead_output() -> None:
    """Nobody reads what is printed any more, as after Ctrl-C at `run | tee log`."""
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)


def full_output() -> None:
    """What is printed goes to a full disk."""
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(full, descriptor)


def say_hash_at_end() -> None:
    """Print a digest of the trained weights of this rank when training ends."""
    original = run_pretrain.distributed.stop
    trainings = []
    training_class = run_pretrain.Training

    def patched_training(*args, **kwargs):
        trainings.append(training_class(*args, **kwargs))
        return trainings[-1]

    def patched_stop():
        import hashlib

        sha256 = hashlib.sha256()
        for tensor in trainings[-1].core.state_dict().values():
            sha256.update(tensor.contiguous().numpy().tobytes())
        print("weights", sha256.hexdigest(), flush=True)
        original()

    run_pretrain.Training, run_pretrain.distributed.stop = patched_training, patched_stop


# --- Comparing ----------------------------------------------------------------------------------------------


def differences(left, right, where: str = "checkpoint") -> list[str]:
    """Where two checkpoints differ, at tolerance zero."""
    if type(left) is not type(right):
        return [f"{where}: {type(left).__name__} != {type(right).__name__}"]
    if isinstance(left, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
        return [] if same else [f"{where}: tensors differ"]
    if isinstance(left, dict):
        if list(left) != list(right):
            return [f"{where}: keys differ"]
        return [text for key in left for text in differences(left[key], right[key], f"{where}.{key}")]
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return [f"{where}: lengths differ"]
        return [
            text
            for i, (one, other) in enumerate(zip(left, right, strict=True))
            for text in differences(one, other, f"{where}[{i}]")
        ]
    return [] if left == right else [f"{where}: {left!r} != {right!r}"]


# What the compared runs are free to differ in: where they write, what disturbs them, and how data is loaded.
FREE_ARGS = ("output_dir", "resume", "num_workers", "max_minutes", "local_rank", "keep", "skip_nonfinite")


def load(path: Path) -> dict:
    state = torch.load(path, weights_only=True)
    state["args"] = {key: value for key, value in state["args"].items() if key not in FREE_ARGS}
    return state


def log_lines(output_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def tensorboard_points(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(x, value) of every scalar, as TensorBoard shows them, less those that tell of time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag not in ("samples_per_s", "data_wait")
    }


def assert_same_run(output_dir: Path, reference: Path) -> None:
    """The disturbed run left what the undisturbed one did: every checkpoint, the log, the curves."""
    names = {path.name for path in checkpoint.list_checkpoints(reference)}
    shared = [path for path in checkpoint.list_checkpoints(output_dir) if path.name in names]
    assert shared and shared[0].name == checkpoint.list_checkpoints(reference)[0].name
    for path in shared:
        assert differences(load(path), load(reference / path.name)) == []
    assert log_lines(output_dir) == log_lines(reference)
    assert tensorboard_points(output_dir) == tensorboard_points(reference)
    assert not list(output_dir.glob(".tmp-*"))


if __name__ == "__main__":
    split = sys.argv.index("--")
    fault_name, *arguments = sys.argv[1:split]
    flags = sys.argv[split + 1 :]
    shrink_model()
    if fault_name != "none":
        globals()[fault_name](*map(int, arguments))
    run_cli(partial(run_pretrain.main, flags))
