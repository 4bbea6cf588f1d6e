"""Stores for tests: moto's S3 server, and a local HTTP server that misbehaves on request."""

import http.server
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer


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
            middle, "short" sends half of it as if it were all, "flip" a changed byte, "busy" answers 503.
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
