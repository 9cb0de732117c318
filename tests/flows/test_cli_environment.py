"""Does a command run where others do not: without a home, behind a proxy, with a server that is away?"""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from flows.cli_environment import prepare_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What the command sets is as it was after the test."""
    for name in ("HOME", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_no_proxy_stands_before_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    prepare_environment()
    assert all(urllib.request.proxy_bypass(host) for host in ("127.0.0.1:4200", "localhost:4200", "example.org"))
    assert not urllib.request.proxy_bypass("example.com")


@pytest.mark.parametrize("name", ["PREFECT_HOME", "PTQ_CACHE_DIR", "PTQ_LOCK_DIR"])
def test_a_folder_set_to_nothing_is_not_set(monkeypatch, name):
    monkeypatch.setenv(name, "")
    prepare_environment()
    assert name not in os.environ


def test_what_is_set_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "DEBUG")
    prepare_environment()
    assert (os.environ["PREFECT_HOME"], os.environ["PREFECT_SERVER_LOGGING_LEVEL"]) == (str(tmp_path), "DEBUG")


def test_without_a_home_another_folder_is_used_and_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    prepare_environment()
    home = Path.home()
    assert home.parent == tmp_path
    assert home.stat().st_mode & 0o777 == 0o700
    assert f"{tmp_path / 'absent'} cannot be written, {home} is used" in capsys.readouterr().err


def test_a_folder_that_another_user_put_there_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"ptq-home-{os.getuid()}").symlink_to(tmp_path / "theirs")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    prepare_environment()
    assert Path.home().resolve() != (tmp_path / "theirs").resolve()


@pytest.mark.slow
def test_a_server_that_is_away_is_named(tmp_path):
    command = [sys.executable, "-m", "flows.cli", "quantize", "absent.onnx", "--data", str(tmp_path)]
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    assert "The Prefect server at http://127.0.0.1:9/api, which PREFECT_API_URL names, does not answer" in found.stderr
    assert "Traceback" not in found.stderr
