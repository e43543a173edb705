"""Get the ImageNet weights that pretraining, or a gaze predictor's encoder, starts from, into preTrain/.

For pretraining they are timm's vit_*_patch16_224.augreg_in21k_ft_in1k: ImageNet-21k, fine-tuned on ImageNet-1k (AugReg);
for other names of timm's those that timm prefers, or those of the tag in the name.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

from util.cli import Parser
from util.download import local_file
from util.errors import UserError, run_cli
from util.export import load_timm, stored_weights
from util.files import atomic_write
from util.weights import VIT_SIZES, read_state_dict

# ViT pretrained on ImageNet-21k and fine-tuned on ImageNet-1k by the "AugReg" recipe (Steiner et al.,
# 2021). timm 0.5 to 0.8 gave these for the bare name vit_base_patch16_224; since 0.9 the bare name means
# others (augreg2), so the tag is spelt out.
TAG = "augreg_in21k_ft_in1k"
HUB = "https://huggingface.co"
SIZES = [size for size, _, patch_size in VIT_SIZES.values() if patch_size == 16]
_VIT = re.compile(rf"(?:(?:cxrmim_)?vit_)?({'|'.join(SIZES)})(?:_patch16(?:_224)?(?:\.{TAG})?)?")


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    parser.add_argument("--model", default="vit_base_patch16_224",
        help="timm's or this program's name of the model, with or without tag, or a ViT's size")
    parser.add_argument("--file", help="weights downloaded by hand, instead of asking the Hugging Face hub")
    parser.add_argument("--out", help="file to write (default: where the programs look for it in preTrain/)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    name = tagged_name(args.model)
    out = Path(args.out or stored_weights(name.partition(".")[0]))
    state, info = read_state_dict(args.file or download(name, out))
    model, _, _ = load_timm(name, state, info.path)
    metadata = {"timm_model": name}
    if isinstance(model, VisionTransformer):
        metadata["num_heads"] = str(model.blocks[0].attn.num_heads)
    buffer = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "metadata": metadata}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((out, buffer.getvalue()), (f"{out}.sha256", f"{digest}  {out.name}\n".encode())):
        with atomic_write(path) as target:
            target.write(content)
    print(f"wrote {out}: timm's {name}, SHA-256 {digest}")
    return 0


def tagged_name(text: str) -> str:
    """timm's name, with its tag, of the pretrained model that `text` names: a size ("base"), this program's or
    timm's name; of timm's name without tag the weights that timm prefers, but of the ViTs those of `TAG`.

    Raises:
        UserError: timm has no pretrained model of this name.
    """
    if size := _VIT.fullmatch(text):
        return f"vit_{size.group(1)}_patch16_224.{TAG}"
    config = get_pretrained_cfg(text) if timm.is_model(text.partition(".")[0]) else None
    if config is None or not config.hf_hub_id:
        raise UserError(
            f"--model {text}: timm has no pretrained model of this name; expected one of timm's "
            f"(timm.list_pretrained()), such as resnet50, or a size of ViT: {', '.join(SIZES)}"
        )
    return f"{config.architecture}.{config.tag}"


def download(name: str, out: Path) -> str:
    """The weights of timm's model from the Hugging Face hub, or the mirror that HF_ENDPOINT names, as a local file."""
    page = f"{os.environ.get('HF_ENDPOINT', HUB)}/{get_pretrained_cfg(name).hf_hub_id}"
    try:
        return local_file(f"{page}/resolve/main/model.safetensors")
    except UserError as error:
        raise UserError(
            f"{error}; or download model.safetensors from {page} elsewhere, copy it here and run "
            f"`python scripts/fetch_weights.py --model {name} --file model.safetensors --out {out}`"
        ) from None


if __name__ == "__main__":
    run_cli(main)
