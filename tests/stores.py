"""Stores for tests: S3 (moto), Google's (gcp-storage-emulator), Hugging Face's, and a web server that misbehaves."""

import base64
import hashlib
import http.server
import json
import os
import re
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import boto3
import gcp_storage_emulator.server
import pytest
from moto.server import ThreadedMotoServer

from tests.ranks import free_port


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server; the environment points every client at it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, value)
        yield settings["AWS_ENDPOINT_URL"]
    server.stop()


def upload(directory: Path, bucket: str) -> str:
    """Puts the files of a directory into a new bucket; returns its URL."""
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.create_bucket(Bucket=bucket)
    for path in directory.iterdir():
        if path.is_file():
            client.upload_file(str(path), bucket, path.name)
    return f"s3://{bucket}"


class FlakyServer:
    """Serves a directory over HTTP.

    Attributes:
        url: Of the directory.
        gets: Requests for the content of each file.
        faults: File name -> what happens to its next requests, first to last: "cut" drops the connection in the
            middle, "short" sends half of it as if it were all, "flip" a changed byte, "busy" answers 503, "trickle"
            sends a byte now and then, for ever.
    """

    def __init__(self, directory: Path) -> None:
        self.gets: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        flaky, lock = self, threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(False)

            def do_GET(self) -> None:
                self._answer(True)

            def _answer(self, body: bool) -> None:
                name = self.path.lstrip("/")
                path = directory / name
                if not path.is_file():
                    self.send_error(404)
                    return
                content, fault = path.read_bytes(), ""
                if body:
                    with lock:
                        flaky.gets[name] += 1
                        waiting = flaky.faults.get(name, [])
                        fault = waiting.pop(0) if waiting else ""
                if fault == "busy":
                    self.send_error(503)
                    return
                if fault == "short":
                    content = content[: len(content) // 2]
                if fault == "flip":
                    middle = len(content) // 2
                    content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if fault == "trickle":
                    with suppress(OSError):  # until the client has had enough
                        while True:
                            self.wfile.write(b"x")
                            time.sleep(0.02)
                    self.close_connection = True
                    return
                if body:
                    self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
                if fault == "cut":
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def gcs_server(directory: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Google's store with the files of a directory: their URL, and the environment that leads clients there."""
    port = free_port()
    server = gcp_storage_emulator.server.create_server("127.0.0.1", port, in_memory=True, default_bucket="shards")
    server.start()
    where = f"http://127.0.0.1:{port}"
    try:
        for path in directory.iterdir():
            if path.is_file() and path.stat().st_size:  # the emulator fails on an empty one
                url = f"{where}/upload/storage/v1/b/shards/o?uploadType=media&name={path.name}"
                headers = {"Content-Type": "application/octet-stream"}
                with urllib.request.urlopen(urllib.request.Request(url, path.read_bytes(), headers, method="POST")):
                    pass
        yield "gs://shards", {"STORAGE_EMULATOR_HOST": where}
    finally:
        server.stop()


@contextmanager
def hub_server(directory: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """What Hugging Face's client asks of its API about a data set with the files of a directory; as `gcs_server`."""
    repo = "lab/shards"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = urllib.parse.parse_qs(sent).get("paths") or json.loads(sent)["paths"]
            self._json([entry(directory / path) for path in paths if (directory / path).exists()])

        def _answer(self) -> None:
            path = urllib.parse.unquote(self.path).split("?")[0]
            tree, files = f"/api/datasets/{repo}/tree/main", f"/datasets/{repo}/resolve/main/"
            if path.startswith(tree):
                folder = directory / path.removeprefix(tree).strip("/")
                found = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()
                self._json([entry(path) for path in sorted(found)])
            elif path in (f"/api/datasets/{repo}", f"/api/datasets/{repo}/revision/main"):
                self._json({"id": repo, "sha": "0" * 40, "private": False, "tags": [], "siblings": []})
            elif path.startswith(files) and (file := directory / path.removeprefix(files)).is_file():
                content = file.read_bytes()
                first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last or len(content)) + 1]
                self._send(206 if "Range" in self.headers else 200, "application/octet-stream", part)
            else:
                self._send(404, "application/json", b"{}")

        def _json(self, content: object) -> None:
            self._send(200, "application/json", json.dumps(content).encode())

        def _send(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    def entry(path: Path) -> dict[str, object]:
        kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
        return {"type": kind, "path": str(path.relative_to(directory)), "size": size, "oid": "0" * 40}

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"hf://datasets/{repo}", {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def model_hub(directory: Path) -> Iterator[dict[str, str]]:
    """What Hugging Face's client asks of its API to make, fill and read models: directory/OWNER/NAME each.

    Yields the environment that leads there. Who writes must have the token "secret".
    """
    sha = "1" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.split("?")[0]
            if path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif self.headers.get("Authorization") != "Bearer secret":
                self._json({"error": "Invalid credentials in Authorization header"}, 401)
            elif path == "/api/repos/create":
                asked = json.loads(sent)
                assert asked.get("private") or asked.get("visibility") == "private"  # by the client's version
                name = f"{asked['organization']}/{asked['name']}"
                (directory / name).mkdir(parents=True, exist_ok=True)
                self._json({"url": f"http://{self.headers['Host']}/{name}"})
            elif path.endswith("/preupload/main"):
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for file in json.loads(sent)["files"]]  # fmt: skip
                self._json({"files": files})
            elif path.endswith("/commit/main"):
                name = path.removeprefix("/api/models/").removesuffix("/commit/main")
                for line in map(json.loads, sent.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        (directory / name / line["value"]["path"]).write_bytes(content)
                self._json({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{sha}", "commitOid": sha})
            else:
                self._json({}, 404)

        def _answer(self) -> None:
            path = urllib.parse.unquote(self.path).split("?")[0]
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main|/tree/\w+)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)
            if api and (directory / api[1]).is_dir():
                names = sorted(path.name for path in (directory / api[1]).iterdir())
                if api[2] and "/tree/" in api[2]:
                    self._json([{"type": "file", "path": name, "size": (directory / api[1] / name).stat().st_size,
                                 "oid": "0" * 40} for name in names])  # fmt: skip
                else:
                    siblings = [{"rfilename": name} for name in names]
                    self._json({"id": api[1], "sha": sha, "private": True, "tags": [], "siblings": siblings})
            elif file and (directory / file[1] / file[2]).is_file():
                self._send(200, (directory / file[1] / file[2]).read_bytes())
            else:
                self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

        def _json(self, content: object, status: int = 200, extra: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(content).encode(), extra)

        def _send(self, status: int, content: bytes, extra: dict[str, str] | None = None) -> None:
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "X-Repo-Commit": sha,
                       "ETag": f'"{hashlib.sha256(content).hexdigest()}"', **(extra or {})}  # fmt: skip
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "secret"}
    finally:
        server.shutdown()
        server.server_close()
