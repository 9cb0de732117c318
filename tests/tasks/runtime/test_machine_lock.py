"""A benchmark has the machine to itself, across processes, and a process that dies gives it back."""

import subprocess
import sys
import threading
import time

import pytest

from ptq.errors import ArtifactError
from tasks.runtime.machine_lock import shared_machine, whole_machine

HOLDER = (
    "import sys; from tasks.runtime.machine_lock import {0}\nwith {0}():\n print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PTQ_LOCK_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def held():
    """Starts processes that hold a lock until they are ended."""
    processes = []

    def start(lock):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER.format(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def in_thread(lock):
    """A thread that takes the lock once, and an event that tells when it has it."""
    entered = threading.Event()

    def take():
        with lock():
            entered.set()

    thread = threading.Thread(target=take)
    thread.start()
    return thread, entered


def test_stages_share_the_machine_with_each_other(held):
    held("shared_machine")
    with shared_machine():
        thread, entered = in_thread(shared_machine)
        assert entered.wait(10)
    thread.join()


@pytest.mark.parametrize(("holder", "waiting"), [("shared_machine", whole_machine), ("whole_machine", shared_machine)])
def test_a_benchmark_and_another_stage_never_run_at_once_and_a_killed_process_gives_the_machine_back(
    held, holder, waiting
):
    process = held(holder)
    thread, entered = in_thread(waiting)
    assert not entered.wait(0.5)
    process.kill()
    assert entered.wait(10)
    thread.join()


def test_stages_that_come_after_a_waiting_benchmark_wait_behind_it(held):
    process = held("shared_machine")
    benchmark, has_whole = in_thread(whole_machine)
    time.sleep(0.3)
    stage, has_shared = in_thread(shared_machine)
    assert not has_shared.wait(0.5)
    assert not has_whole.is_set()
    process.kill()
    assert has_whole.wait(10)
    assert has_shared.wait(10)
    benchmark.join()
    stage.join()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PTQ_LOCK_DIR", str(tmp_path / "file"))
    with pytest.raises(ArtifactError, match="cannot be used"), whole_machine():
        pass
