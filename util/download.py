"""Files by http(s) address, through torch.hub's download and cache."""

from __future__ import annotations

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch

from util.errors import UserError
from util.files import file_lock

# The beginning of the SHA-256 in a name, as torch.hub's names have it: resnet18-5c106cde.pth. Shorter
# digits are numbers: checkpoint-399.pth.
_HASH = re.compile(r"-([a-f0-9]{8,64})\.")


def address_name(text: str | None) -> str | None:
    """The name of the file that an address names, "" if it names none; None for what is no address."""
    if not re.match("https?:", text or "", re.IGNORECASE):
        return None
    try:
        name = Path(unquote(urlsplit(text).path)).name
    except ValueError as error:
        raise UserError(f"{text}: is no address ({error})") from None
    return "" if name == ".." else name


def local_file(name: str | None) -> str | None:
    """The path of a file named by a path (returned as it is) or by an http(s) address.

    An address is downloaded once, into torch.hub's cache (TORCH_HOME), in a folder of its own: two addresses may end
    in the same name. A name that carries the beginning of its SHA-256 is checked against it.

    Raises:
        UserError: no answer, no such file there, a download that broke off, or another SHA-256.
    """
    file_name = address_name(name)
    if file_name is None:
        return name
    if not file_name:
        raise UserError(f"{name}: ends in no file name")
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(name.encode()).hexdigest()[:12])
    path = folder / file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_suffix(".lock"), what=f"the download of {name}", wait=True):
            if not path.exists():
                _download(name, path)
    except RuntimeError as error:  # torch.hub's word for another SHA-256
        raise UserError(f"{name}: is damaged or another file: {error}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"{name}: can't be downloaded into {folder} ({error})") from None
    return str(path)


def _download(address: str, path: Path) -> None:
    """Download whole or not at all: torch.hub takes a broken connection for the end of the file."""
    with urlopen(Request(address, headers={"User-Agent": "torch.hub"})) as answer:
        length = answer.length
    digest = _HASH.search(path.name)
    print(f"downloading {address} to {path}", flush=True)
    part = path.with_name(f"{path.name}.part")
    torch.hub.download_url_to_file(address, str(part), digest and digest.group(1))
    got = part.stat().st_size
    if length not in (None, got):
        raise UserError(f"{address}: broke off after {got} of {length} bytes; start again")
    part.rename(path)
