"""util/download.py against a server on 127.0.0.1."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from downstream.encoders import named_files, read_candidates
from util.download import local_file
from util.errors import UserError

WEIGHTS = b"some weights" * 1000
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


ASKED: list[str] = []  # paths that the server was asked for


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        ASKED.append(self.path)
        if "none" in self.path:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(WEIGHTS)))
        self.end_headers()
        self.wfile.write(WEIGHTS[:500] if "broken" in self.path else WEIGHTS)

    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    ASKED.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_downloaded_once_and_two_addresses_of_one_name_are_two_files(address):
    first = local_file(f"{address}/a/checkpoint-399.pth")
    asked = len(ASKED)
    assert local_file(f"{address}/a/checkpoint-399.pth") == first and len(ASKED) == asked
    second = local_file(f"{address}/b/checkpoint-399.pth")
    assert second != first and Path(first).read_bytes() == Path(second).read_bytes() == WEIGHTS


def test_the_sha_256_in_a_name_is_checked(address):
    assert Path(local_file(f"{address}/vit-{DIGEST[:8]}.pth")).read_bytes() == WEIGHTS
    for _ in range(2):
        with pytest.raises(UserError, match="vit-0123abcd.pth: .*invalid hash value"):
            local_file(f"{address}/vit-0123abcd.pth")


@pytest.mark.parametrize(
    "name, words", [("none.pth", "Not Found"), ("broken.pth", "broke off after 500 of"), ("", "no file name")]
)
def test_what_cannot_be_had_is_named_and_not_kept(address, name, words):
    for _ in range(2):
        with pytest.raises(UserError, match=words) as error:
            local_file(f"{address}/{name}")
        assert str(error.value).startswith(address)


def test_nobody_there_and_paths(address):
    with pytest.raises(UserError, match="can't be downloaded"):
        local_file("http://127.0.0.1:9/x.pth")
    assert local_file(None) is None and local_file("") == "" and local_file("a/b.pth") == "a/b.pth"


def test_encoders_to_compare_may_be_addresses(address):
    alone, named = f"{address}/a/x.pth?a=b", f"{address}/b/x.pth?c=d"
    [(first, one, _), (second, two, _)] = named_files([alone, f"ours={named}"])
    assert (first, second) == ("x", "ours") and one != two
    assert Path(one).read_bytes() == Path(two).read_bytes() == WEIGHTS
    for texts, imagenet in (([f"ours={named}"], ""), (["imagenet"], named)):
        with pytest.raises(UserError, match="torch home/.*/x.pth: not a readable"):
            read_candidates(texts, imagenet=imagenet)
