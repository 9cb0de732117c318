"""Real S3-compatible servers on loopback, started for the tests and the benchmarks and ended by their process.

moto honours conditions and accepts any credentials; rclone ignores conditions, keeps plain files and rejects wrong
credentials. Run as a script, this file is the moto server.
"""

import base64
import contextlib
import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUCKET = "models"
ACCESS_KEY = "loopback-user"
SECRET_KEY = "loopback-secret"
_READY_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server: its kind, where it listens, and the process that ends it."""

    kind: str
    port: int
    process: subprocess.Popen

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, *, endpoint: str = "", secret: str = SECRET_KEY) -> dict[str, str]:
        """What a process needs to use this server, and nothing of the machine's own S3 settings."""
        return {
            "AWS_ENDPOINT_URL_S3": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def client(self) -> Any:
        """A plain boto3 client, to look into the bucket beside the store."""
        import boto3

        return boto3.Session().client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )  # fmt: skip


@contextlib.contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """A moto server with an empty bucket; `folder` takes its log."""
    port = free_port()
    with _started("moto", [sys.executable, __file__, str(port)], port, folder) as server:
        yield server


@contextlib.contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    """An rclone server that keeps its bucket as plain files under `folder`."""
    port, kept = free_port(), folder / "served"
    kept.mkdir(parents=True)
    executable = shutil.which("rclone", path=sysconfig.get_path("scripts")) or "rclone"
    command = [
        executable, "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}",
        "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", str(kept),
    ]  # fmt: skip
    with _started("rclone", command, port, folder) as server:
        yield server


SERVERS = {"moto": moto_server, "rclone": rclone_server}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def _started(kind: str, command: list[str], port: int, folder: Path) -> Iterator[S3Server]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        server = S3Server(kind, port, process)
        _wait_until_ready(server, folder / f"{kind}.log")
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: S3Server, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.endpoint, timeout=5).close()
            except urllib.error.HTTPError as answer:
                answer.close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"{server.kind} does not answer on {server.endpoint}:\n{log.read_text()[-2000:]}")


class AsS3:
    """What S3 does and moto does not: conditions in one step, and no bytes whose MD5 is another than their sender's."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if "HTTP_CONTENT_MD5" in environ:
            body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            environ["wsgi.input"] = io.BytesIO(body)
            if base64.b64encode(hashlib.md5(body).digest()).decode() != environ["HTTP_CONTENT_MD5"]:
                start_response("400 Bad Request", [("Content-Type", "application/xml"), ("Connection", "close")])
                return [b"<?xml version='1.0'?><Error><Code>BadDigest</Code><Message>Changed.</Message></Error>"]
        is_conditional = environ["REQUEST_METHOD"] == "PUT" and not {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}.isdisjoint(
            environ
        )
        with self._lock if is_conditional else contextlib.nullcontext():
            return self._application(environ, start_response)


def _serve_moto(port: int) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = AsS3(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    _serve_moto(int(sys.argv[1]))
