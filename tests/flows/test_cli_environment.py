"""Does a command run where others do not: without a home, behind a proxy, with a server that is away?"""

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from flows.cli_environment import prepare_environment

ROOT = Path(__file__).parents[2]


FOLDERS = ("PREFECT_HOME", "PTQ_CACHE_DIR", "PTQ_LOCK_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")


@pytest.fixture(autouse=True)
def restored(monkeypatch, tmp_path):
    """What the command sets is as it was after the test; until then no folder is named."""
    for name in ("HOME", "NO_PROXY", "no_proxy", *FOLDERS):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_no_proxy_stands_before_this_machine(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    prepare_environment()
    assert all(urllib.request.proxy_bypass(host) for host in ("127.0.0.1:4200", "localhost:4200", "example.org"))
    assert not urllib.request.proxy_bypass("example.com")


def test_no_proxy_for_anything_stays_so(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("no_proxy")
    prepare_environment()
    assert os.environ["NO_PROXY"] == "*"
    assert "no_proxy" not in os.environ


def test_a_folder_set_to_nothing_is_not_set():
    prepare_environment()
    assert not set(FOLDERS) & set(os.environ)


def test_what_is_set_stays(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_SERVER_LOGGING_LEVEL", "DEBUG")
    prepare_environment()
    assert os.environ["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert os.environ["PREFECT_SERVER_LOGGING_LEVEL"] == "DEBUG"


def test_without_a_home_another_folder_is_used_and_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    monkeypatch.setenv("PTQ_LOCK_DIR", str(tmp_path / "locks"))
    prepare_environment()
    kept = tmp_path / f"ptq-home-{os.getuid()}"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert os.environ["PREFECT_HOME"] == str(kept / "prefect")
    assert os.environ["PTQ_LOCK_DIR"] == str(tmp_path / "locks")
    assert os.environ["HOME"] == str(tmp_path / "absent")  # where credentials may lie
    assert f"{tmp_path / 'absent'} cannot be written, {kept} is used" in capsys.readouterr().err


def test_a_user_whom_the_system_does_not_know_has_no_home(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    prepare_environment()
    assert os.environ["PREFECT_HOME"].startswith(str(tmp_path))


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_another_user_put_there_is_not_used(monkeypatch, tmp_path, kind):
    theirs = tmp_path / f"ptq-home-{os.getuid()}"
    if kind == "link":
        (tmp_path / "theirs").mkdir()
        theirs.symlink_to(tmp_path / "theirs")
    else:
        theirs.write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    prepare_environment()
    assert not os.environ["PREFECT_HOME"].startswith(f"{theirs}/")


@pytest.mark.slow
def test_a_server_that_is_away_is_named(tmp_path):
    command = [sys.executable, "-m", "flows.cli", "quantize", "absent.onnx", "--data", str(tmp_path)]
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    assert "The Prefect server at http://127.0.0.1:9/api, which PREFECT_API_URL names, does not answer" in found.stderr
    assert "Traceback" not in found.stderr
