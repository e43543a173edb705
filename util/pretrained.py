"""Initial weights from timm's collection of pretrained models."""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path

import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

from util.download import local_file
from util.errors import UserError
from util.files import atomic_write
from util.weights import VIT_SIZES, read_state_dict

# ViT pretrained on ImageNet-21k and fine-tuned on ImageNet-1k by the "AugReg" recipe (Steiner et al.,
# 2021). timm 0.5 to 0.8 gave these for the bare name vit_base_patch16_224; since 0.9 the bare name means
# others (augreg2), so the tag is spelt out.
TAG = "augreg_in21k_ft_in1k"
HUB = "https://huggingface.co"
FOLDER = Path(__file__).resolve().parents[1] / "preTrain"
SIZES = [size for size, _, patch_size in VIT_SIZES.values() if patch_size == 16]
_VIT = re.compile(rf"(?:(?:cxrmim_)?vit_)?({'|'.join(SIZES)})(?:_patch16(?:_224)?(?:\.{TAG})?)?")


def weights_name(size: str) -> str:
    """The file that pretraining looks for: vit_base_p16_224_timm.pth for "base"."""
    return f"vit_{size}_p16_224_timm.pth"


def stored_weights(timm_name: str) -> Path:
    """Where the weights of a timm model are kept, whether they are there or not."""
    size = _VIT.fullmatch(timm_name)
    return FOLDER / (weights_name(size.group(1)) if size else f"{timm_name}_timm.pth")


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


def fetch_weights(name: str, out: str | os.PathLike, *, file: str | os.PathLike | None = None) -> str:
    """Save timm's pretrained weights at `out`, under "state_dict", with timm's name and a ViT's number of attention
    heads under "metadata"; and their checksum beside it.

    Args:
        name: of `tagged_name`.
        out: file to write; `out`.sha256 is written too, in the format of sha256sum.
        file: weights downloaded by hand (model.safetensors of timm's page, or a torch file); None: download them from
            the Hugging Face hub, or the mirror that HF_ENDPOINT names (`local_file`).

    Returns:
        The checksum.

    Raises:
        UserError: the download failed, with the manual steps; or a file of another model.
    """
    out = Path(out)
    if file is None:
        page = f"{os.environ.get('HF_ENDPOINT', HUB)}/{get_pretrained_cfg(name).hf_hub_id}"
        try:
            file = local_file(f"{page}/resolve/main/model.safetensors")
        except UserError as error:
            raise UserError(
                f"{error}; or download model.safetensors from {page} elsewhere, copy it here and run "
                f"`python scripts/fetch_weights.py --model {name} --file model.safetensors --out {out}`"
            ) from None
    read_state_dict(file)  # refuses what could run code, and names what is wrong with it
    try:
        # Older timm keeps the original JAX file's own loader for some names; ours is a state dict.
        overlay = {"file": str(file), "custom_load": False}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:  # load_state_dict: keys or shapes don't fit
        raise UserError(f"{file}: not the weights of {name}: {' '.join(str(error).split())[:160]}") from None
    buffer = io.BytesIO()
    metadata = {"timm_model": name}
    if isinstance(model, VisionTransformer):
        metadata["num_heads"] = str(model.blocks[0].attn.num_heads)
    torch.save({"state_dict": model.state_dict(), "metadata": metadata}, buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as target:
        target.write(content)
    with atomic_write(f"{out}.sha256", "w") as target:
        target.write(f"{digest}  {out.name}\n")
    return digest
