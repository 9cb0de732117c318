"""Stores of each kind."""

import uuid

import pytest
import s3_servers

from ptq.storage.store import open_store


@pytest.fixture(params=["local", "moto", "rclone"])
def store(request, tmp_path, monkeypatch):
    """A store of each kind: a folder, a server that honours conditions, and one that does not."""
    if request.param == "local":
        return open_store(f"file://{tmp_path / 'store'}")
    server = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PTQ_CACHE_DIR", str(tmp_path / "cache"))
    return open_store(f"s3://{s3_servers.BUCKET}/{uuid.uuid4().hex}")


@pytest.fixture
def folder(tmp_path):
    """A store in a folder."""
    return open_store(f"file://{tmp_path / 'store'}")
