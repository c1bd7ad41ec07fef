"""Tests of archives on the Hugging Face Hub: its own package talks to a small hub in this process.

    python -m pytest tests/test_hub.py

They are skipped where huggingface_hub is not installed (pip install -r requirements-hub.txt).
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import export_model
import predict_papsmear
from checkpoints import load_model
from conftest import PROJECT, lively_model, tensors_equal, write_checkpoint
from exporting import hub

TOKEN = "hf_of_a_test"
COMMIT = "0" * 39 + "1"


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers to a commit and to a download, for one repository and one token."""

    files: dict[str, bytes] = {}
    made: list[dict] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self.answer(200, {"url": f"http://{self.headers['Host']}/me/nuclei"})
        if self.path.endswith("/validate-yaml"):
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            return self.answer(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                               for file in json.loads(body)["files"]]})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer(200, {
            "commitUrl": f"http://{self.headers['Host']}/me/nuclei/commit/{COMMIT}", "commitOid": COMMIT})

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if not self.path.startswith("/me/nuclei/resolve/") or name not in self.files:
            missing = "EntryNotFound" if self.path.startswith("/me/nuclei/") else "RepoNotFound"
            return self.answer(404, {"error": "not there"}, {"X-Error-Code": missing})
        return self.answer(200, self.files[name], {"X-Repo-Commit": COMMIT,
                                                   "ETag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"'})

    do_HEAD = do_GET

    def answer(self, code: int, content: dict | bytes, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def export(tmp_path):
    """Return what runs several exports in one process, which knows this hub alone, and gives their codes and words."""
    pytest.importorskip("huggingface_hub")
    Hub.files, Hub.made = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*commands: list[str], token: str = TOKEN) -> list[tuple[int, str]]:
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub_home"),
            "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        script = ("import contextlib, io, json, sys, export_model\n"
                  "for command in json.loads(sys.argv[1]):\n"
                  "    with contextlib.redirect_stderr(io.StringIO()) as words, contextlib.redirect_stdout(words):\n"
                  "        code = export_model.main(command)\n"
                  "    print(json.dumps([code, words.getvalue()]))\n")
        done = subprocess.run([sys.executable, "-c", script, json.dumps(commands)], cwd=PROJECT, env=environment,
                              capture_output=True, text=True, check=True)
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    yield run
    server.shutdown()


def test_an_archive_goes_to_the_hub_and_comes_back(export, tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", lively_model(4, 1, 1))
    as_archive = ["--format", "archive", "--out"]
    (pushed, words), *pulled = export(
        [str(path), *as_archive, str(tmp_path / "out.pth"), "--licence", "CC BY 4.0", "--title", "Nuclei",
         "--push_to_hub", "me/nuclei", "--private"],
        ["hf://me/nuclei", *as_archive, str(tmp_path / "back.pth")],
        [f"hf://me/nuclei/model.pth@{COMMIT}", "--format", "card", "--out", str(tmp_path / "card.md")],
        ["hf://me/nuclei/none.pth", *as_archive, str(tmp_path / "none.pth")],
        ["hf://me/other", *as_archive, str(tmp_path / "none.pth")])
    assert pushed == 0, words
    assert re.search(rf"uploaded: http://127\S+/me/nuclei/commit/{COMMIT}\n$", words)
    assert Hub.made[0]["name"] == "nuclei"
    assert "private" in json.dumps(Hub.made[0]), "'private': true before version 2, 'visibility': 'private' from it on"
    assert Hub.files["model.pth"] == (tmp_path / "out.pth").read_bytes()
    readme = Hub.files["README.md"].decode()
    assert readme.startswith("---\n")
    for line in ("license: cc-by-4.0", "pipeline_tag: image-segmentation", "# Nuclei"):
        assert f"\n{line}\n" in readme
    assert [code for code, _ in pulled] == [0, 0, 2, 2], pulled
    assert tensors_equal(load_model(tmp_path / "back.pth"), load_model(path))
    assert (tmp_path / "card.md").read_text() in readme
    for (_, refused), address in zip(pulled[2:], ("hf://me/nuclei/none.pth", "hf://me/other"), strict=True):
        assert refused.startswith(f"error: {address}: 404")
        assert refused.count("\n") == 1
    assert not (tmp_path / "none.pth").exists()


def test_what_the_hub_sends_is_checked_like_any_file(export, tmp_path):
    path = write_checkpoint(tmp_path / "a.pth", lively_model(4, 1, 1))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    Hub.files["model.pth"] = bytes(content)
    (code, words), (refused, reason) = export(
        ["hf://me/nuclei", "--format", "archive", "--out", str(tmp_path / "back.pth")],
        [str(path), "--format", "archive", "--out", str(tmp_path / "out.pth"), "--push_to_hub", "me/nuclei"],
        token="hf_wrong")
    assert (code, refused) == (2, 2)
    assert "damaged" in words
    assert not (tmp_path / "back.pth").exists()
    assert "error: me/nuclei: " in reason
    assert "hf auth login" in reason
    assert (tmp_path / "out.pth").exists(), "what was written stays"


@pytest.mark.parametrize(("options", "words"), [
    (("--format", "onnx", "--out", "a.onnx", "--push_to_hub", "me/nuclei"), "Give --format archive instead of onnx"),
    (("--format", "archive", "--out", "a.pth", "--private"), "Give both, or leave it out"),
    (("--format", "archive", "--out", "a.pth", "--push_to_hub", "nuclei"), "is named USER/NAME")])
def test_wrong_requests_upload_nothing(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path / "a_checkpoint.pth", lively_model(4, 1, 1))
    assert export_model.main([str(path), *options]) == 2
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("address", ["hf://", "hf://nuclei", "hf://me/nuclei@", "hf://me/../x y", "hf:///me/nuclei",
                                     "hf://me/nuclei/../../passwd", "hf://me/nuclei/.cache"])
def test_other_addresses_are_refused(address, tmp_path, capsys):
    assert export_model.main([address, "--format", "archive", "--out", str(tmp_path / "a.pth")]) == 2
    assert "an address of the Hub is hf://USER/NAME" in capsys.readouterr().err


def test_a_command_that_reads_files_says_how_to_download_one(tmp_path, capsys):
    assert predict_papsmear.main(["hf://me/nuclei", str(PROJECT / "data/test/images"), "--out", str(tmp_path)]) == 2
    assert "python export_model.py hf://me/nuclei --format archive --out model.pth" in capsys.readouterr().err


def test_without_the_package_it_is_said_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert export_model.main(["hf://me/nuclei", "--format", "archive", "--out", str(tmp_path / "a.pth")]) == 2
    assert "pip install -r requirements-hub.txt" in capsys.readouterr().err


@pytest.mark.parametrize(("licence", "lines"), [
    ("", []), ("MIT", ["license: mit"]), ("CC BY-SA 4.0", ["license: cc-by-sa-4.0"]),
    ("for the clinic: alone", ["license: other", "license_name: for-the-clinic-alone"])])
def test_a_licence_is_named_as_the_hub_names_it(licence, lines):
    pytest.importorskip("huggingface_hub")
    found = [line for line in hub._front_matter(licence).splitlines() if line.startswith("license")]
    assert found == lines
