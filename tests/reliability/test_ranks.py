"""Two processes with batch b train on what one does with batch 2b, by the same gradients."""

from __future__ import annotations

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reliability_runs import start_process
from torch.nn.parallel import DistributedDataParallel

from datasets.build import build_dataset
from datasets.sampler import TrainBatches
from models_cxrmim import CXRMIM
from util import distributed
from util.distributed import Ranks, parallel

BATCH = 4


def step_gradients(rank: int, world_size: int, tree: str, folder: str) -> None:
    """Save this rank's gradients of the first step, and its samples."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CXRMIM(
        img_size=64, embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, id_list=(0, 1), scale_list=(4.0, 0.5)
    )
    dataset = build_dataset(tree, input_size=64, use_cache=False)
    keys = next(iter(TrainBatches(len(dataset), BATCH // world_size, world_size=world_size, rank=rank)))
    samples = [dataset[key] for key in keys]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    # The mask of a sample, whichever rank has it.
    mask = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(index)) < 12 for _, index in keys])
    parallel = DistributedDataParallel(model)
    parallel(batch, mask=mask.float()).backward()
    torch.save(
        {
            "samples": [index for _, index in keys],
            "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        },
        f"{folder}/{world_size}-{rank}.pth",
    )
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one_with_the_double_batch(tree, tmp_path):
    processes = [
        start_process(step_gradients, rank, world_size, str(tree), str(tmp_path))
        for world_size in (1, 2)
        for rank in range(world_size)
    ]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    one, first, second = (torch.load(Path(tmp_path) / f"{name}.pth") for name in ("1-0", "2-0", "2-1"))
    assert sorted(one["samples"]) == sorted(first["samples"] + second["samples"])
    assert one["gradients"].keys() == first["gradients"].keys() and len(one["gradients"]) > 50
    for name, gradient in one["gradients"].items():
        assert torch.equal(first["gradients"][name], second["gradients"][name])
        noise = 1e-6 * gradient.abs().max().item()  # of summing in another order, where a sum is near zero
        torch.testing.assert_close(first["gradients"][name], gradient, rtol=1e-5, atol=noise)


def parallel_steps(rank: int, folder: str) -> None:
    """Three steps as training takes them; save what ranks exchanged in the last, and all warnings."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/steps", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # ranks start alike all the same
    model = CXRMIM(img_size=64, embed_dim=48, depth=2, num_heads=2, decoder_embed_dim=32, id_list=(0, 1, 1, 1))
    model = parallel(model, Ranks(rank, 2, torch.device("cpu"), dist.group.WORLD))
    generator = torch.Generator().manual_seed(rank)
    batch = {
        "img": torch.randint(0, 256, (1, 1, 64, 64), dtype=torch.uint8, generator=generator),
        "attention": torch.randint(0, 256, (1, 64, 64), dtype=torch.uint8, generator=generator),
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        # Behind the first steps, in which gradients are sorted into buckets.
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
            with torch.profiler.profile() as profile:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = model(batch)
                loss.backward()
            model.zero_grad(set_to_none=True)
    names = [event.key for event in profile.key_averages() if event.key.startswith("gloo:")]
    torch.save({"names": names, "told": [str(one.message) for one in told]}, f"{folder}/steps-{rank}.pth")
    dist.destroy_process_group()


def test_ranks_exchange_gradients_alone_and_in_the_layout_of_the_parameters(tmp_path):
    processes = [start_process(parallel_steps, rank, str(tmp_path)) for rank in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        seen = torch.load(tmp_path / f"steps-{rank}.pth")
        assert seen["names"] == ["gloo:all_reduce"], seen
        assert not [text for text in seen["told"] if "strides" in text or "buffers" in text]


def wait_for_main(rank: int, folder: str) -> None:
    """Rank 0 works longer than ranks wait to meet, or for an exchange by NCCL."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    distributed.MEETING_TIMEOUT = timedelta(seconds=10)
    ranks = distributed.start("cpu", dist_url=f"file://{folder}/waiting")
    assert distributed.on_main(ranks, lambda: time.sleep(12) or "built") == "built"
    distributed.stop()


@pytest.mark.slow
def test_ranks_wait_for_what_one_does_alone(tmp_path):
    processes = [start_process(wait_for_main, rank, str(tmp_path)) for rank in range(2)]
    for process in processes:
        process.join(90)
        assert process.exitcode == 0
