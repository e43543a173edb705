"""Files by address: http(s) through torch.hub's download and cache, file:// where it lies."""

from __future__ import annotations

import hashlib
import re
import socket
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, url2pathname, urlopen

import torch

from util.errors import UserError
from util.locks import file_lock

_ADDRESS = re.compile(r"(https?|file):", re.IGNORECASE)
# The beginning of the SHA-256 in a name, as torch.hub's names have it: resnet18-5c106cde.pth. Shorter
# digits are numbers: checkpoint-399.pth.
_HASH = re.compile(r"-([a-f0-9]{8,64})\.")
_TIMEOUT = 30.0  # seconds without an answer


def address_name(text: str | None) -> str | None:
    """The name of the file that an address names, "" where it names none; None for what is no address."""
    if not _ADDRESS.match(text or ""):
        return None
    try:
        name = Path(unquote(urlsplit(text).path)).name
    except ValueError as error:
        _refuse(text, f"is no address ({error})")
    return "" if name == ".." else name


def local_file(name: str | None) -> str | None:
    """The path of a file named by a path (returned as it is) or by an address.

    http and https are downloaded once, into torch.hub's cache (TORCH_HOME), in a folder of the address's own: two
    addresses may end in the same name. A name that carries the beginning of its SHA-256 is checked against it.

    Raises:
        UserError: no answer, no such file there, a download that broke off, or another SHA-256.
    """
    file_name = address_name(name)
    if file_name is None:
        return name
    parts = urlsplit(name)
    if parts.scheme == "file":
        return url2pathname(parts.path) if parts.netloc in ("", "localhost") else _refuse(name, "names a host")
    if not file_name:
        _refuse(name, "ends in no file name")
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(name.encode()).hexdigest()[:12])
    path = folder / file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_suffix(".lock"), what=f"the download of {name}", wait=True):
            if not path.exists():
                _download(name, path)
    except URLError as error:  # HTTPError is one
        _refuse(name, f"can't be downloaded ({getattr(error, 'reason', error)})")
    except RuntimeError as error:  # torch.hub's word for another SHA-256
        _refuse(name, f"is damaged or another file: {error}")
    except (OSError, HTTPException, ValueError) as error:
        _refuse(name, f"can't be downloaded into {folder} ({getattr(error, 'strerror', None) or error})")
    return str(path)


def _download(address: str, path: Path) -> None:
    """Download whole or not at all: torch.hub takes a broken connection for the end of the file."""
    with urlopen(Request(address, headers={"User-Agent": "torch.hub"}), timeout=_TIMEOUT) as answer:
        length = answer.headers.get("Content-Length")
    digest = _HASH.search(path.name)
    print(f"downloading {address} to {path}", flush=True)
    part = path.with_name(f"{path.name}.part")
    others = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torch.hub waits for ever
    try:
        torch.hub.download_url_to_file(address, str(part), digest and digest.group(1), progress=True)
    finally:
        socket.setdefaulttimeout(others)
    if length is not None and part.stat().st_size != int(length):
        got = part.stat().st_size
        part.unlink()
        _refuse(address, f"broke off after {got} of {length} bytes; start again")
    part.rename(path)


def _refuse(address: str, why: str) -> str:
    raise UserError(f"{address}: {why}")
