"""Get the ImageNet weights that pretraining, or a gaze predictor's encoder, starts from, into preTrain/.

For pretraining they are timm's vit_*_patch16_224.augreg_in21k_ft_in1k: ImageNet-21k, fine-tuned on ImageNet-1k (AugReg);
for other names of timm's those that timm prefers, or those of the tag in the name.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from timm.models import get_pretrained_cfg

from util.cli import Parser
from util.download import local_file
from util.errors import UserError, run_cli
from util.export import attention_heads_of, load_timm, stored_weights
from util.files import atomic_write
from util.weights import VIT_SIZES, read_state_dict

# ViT pretrained on ImageNet-21k and fine-tuned on ImageNet-1k by the "AugReg" recipe (Steiner et al.,
# 2021). timm 0.5 to 0.8 gave these for the bare name vit_base_patch16_224; since 0.9 the bare name means
# others (augreg2), so the tag is spelt out.
TAG = "augreg_in21k_ft_in1k"
VITS = {size: f"vit_{size}_patch16_224" for size, _, patch_size in VIT_SIZES.values() if patch_size == 16}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    # fmt: off
    parser.add_argument("--model", default="base",
        help=f"a size of ViT ({', '.join(VITS)}), or timm's name of a model, with or without tag, such as resnet50")
    parser.add_argument("--file", help="model.safetensors of that model's page, if the Hugging Face hub can't be reached from here")
    parser.add_argument("--out", help="file to write (default: where the programs look for it in preTrain/)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    model = args.model
    name = VITS.get(model, model)
    name += f".{TAG}" if name in VITS.values() else ""
    config = get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"--model {model}: timm has no pretrained model of this name; expected one of "
            f"timm.list_pretrained(), such as resnet50, or a size of ViT: {', '.join(VITS)}"
        )
    name = f"{config.architecture}.{config.tag}"
    out = Path(args.out or stored_weights(config.architecture))
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{config.hf_hub_id}"
    state, info = read_state_dict(args.file or local_file(f"{page}/resolve/main/model.safetensors"))
    network, _, _ = load_timm(name, state, info.path)
    metadata = {"timm_model": name}
    if heads := attention_heads_of(network):
        metadata["num_heads"] = str(heads)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as target:
        torch.save({"state_dict": network.state_dict(), "metadata": metadata}, target)
    print(f"wrote {out}: timm's {name}")
    return 0


if __name__ == "__main__":
    run_cli(main)
