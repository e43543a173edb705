"""Files by http(s) address, through torch.hub's download and cache."""

from __future__ import annotations

import hashlib
import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import torch

from util.errors import UserError

# The beginning of the SHA-256 in a name, as torch.hub's names have it: resnet18-5c106cde.pth. Shorter
# digits are numbers: checkpoint-399.pth.
_HASH = re.compile(r"-([a-f0-9]{8,64})\.")


def address_name(text: str | None) -> str | None:
    """The name of the file that an address names, "" if it names none; None for what is not an address."""
    if not re.match("https?:", text or "", re.IGNORECASE):
        return None
    return Path(unquote(urlsplit(text).path)).name


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
        raise UserError(f"{name}: has no file name at its end")
    path = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(name.encode()).hexdigest()[:12], file_name)
    if path.exists():
        return str(path)
    part, digest = path.with_name(f"{file_name}.{os.getpid()}.part"), _HASH.search(file_name)
    print(f"downloading {name} to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(Request(name, headers={"User-Agent": "torch.hub"})) as answer:
            length = answer.length
        torch.hub.download_url_to_file(name, str(part), digest and digest.group(1))
        got = part.stat().st_size
        if length not in (None, got):  # torch.hub takes a broken connection for the end of the file
            raise OSError(f"it broke off after {got} of {length} bytes; start again")
        part.rename(path)
    except (OSError, HTTPException, ValueError, RuntimeError) as error:  # torch.hub's for another SHA-256
        part.unlink(missing_ok=True)
        raise UserError(f"{name}: can't be downloaded to {path}: {error}") from None
    return str(path)
