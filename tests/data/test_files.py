import http.server
import json
import threading

import pytest

from kedit_lightning.data.datasets import load
from kedit_lightning.errors import DataError

FLAT = {"prompt": "{} is a", "subject": "Ann", "target_new": "pilot"}


class TestFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"gone\.json: no such file"):
            load("jsonl", tmp_path / "gone.json")

    def test_folder(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            load("jsonl", tmp_path)

    @pytest.mark.parametrize("text", ["", " \n", "[]"])
    def test_empty(self, tmp_path, text):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(DataError, match="the file is empty"):
            load("jsonl", tmp_path / "own.json")

    def test_truncated(self, tmp_path):
        (tmp_path / "own.json").write_text(json.dumps([FLAT, FLAT])[:-9])
        with pytest.raises(DataError, match=r"not valid JSON: .* \(line 1, column \d+\); is the file truncated"):
            load("jsonl", tmp_path / "own.json", on_bad_record="skip")

    def test_not_text(self, tmp_path):
        (tmp_path / "own.json").write_bytes(b"\x1f\x8b\xff\x00")
        with pytest.raises(DataError, match="expected UTF-8 text"):
            load("jsonl", tmp_path / "own.json")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one JSONL file, breaks off in the middle of another, knows no third."""

    def do_GET(self):
        body = json.dumps(FLAT).encode()
        self.send_response(404 if "gone" in self.path else 200)
        self.send_header("Content-Length", str(len(body) + (99 if "broken" in self.path else 0)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class TestDownload:
    def test_is_kept_and_used_again(self, server, tmp_path):
        assert load("jsonl", f"{server}/own.jsonl") == load("jsonl", f"{server}/own.jsonl")
        assert [file.name[9:] for file in (tmp_path / "cache").iterdir()] == ["own.jsonl"]

    @pytest.mark.parametrize(("file", "reason"), [("gone.json", "404"), ("broken.json", r"got \d+ of \d+ bytes")])
    def test_failure_is_one_line_and_leaves_nothing(self, server, tmp_path, file, reason):
        with pytest.raises(DataError, match=f"cannot download {server}/{file} .*{reason}.*give its path") as caught:
            load("jsonl", f"{server}/{file}")
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
        with pytest.raises(DataError, match=r"cannot download http://127\.0\.0\.1:9/x\.json"):
            load("jsonl", "http://127.0.0.1:9/x.json")

    def test_cache_folder_that_cannot_be_made(self, server, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(DataError, match="cannot download"):
            load("jsonl", f"{server}/own.jsonl")
