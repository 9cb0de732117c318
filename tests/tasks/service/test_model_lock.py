"""Does a model have one run at a time?"""

import threading

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.service import model_lock as service
from tasks.service.model_lock import model_lock

STORE = "file:///store"


def holders(model):
    with get_client(sync_client=True) as client:
        limits = client.read_global_concurrency_limits(limit=200)
    return sum(limit.active_slots for limit in limits if limit.name.startswith(f"ptq-model-{model}-"))


@pytest.mark.usefixtures("prefect_backend")
def test_a_second_run_of_a_model_waits_for_the_first_and_another_model_does_not():
    entered = threading.Event()
    # Seconds: of the other model, then of the second run.
    waits = []

    def second():
        with model_lock("one", STORE) as waited_s:
            waits.append(waited_s)
            entered.set()

    waiting = threading.Thread(target=second)
    with model_lock("one", STORE):
        waiting.start()
        with model_lock("other", STORE) as waited_s:
            waits.append(waited_s)
            assert (holders("one"), holders("other")) == (1, 1)
        assert not entered.wait(1)
    waiting.join(60)
    assert entered.is_set()
    assert holders("one") == 0
    assert waits[1] > max(1.0, waits[0])


@pytest.mark.usefixtures("prefect_backend")
def test_a_run_that_has_the_turn_does_not_wait_for_itself_and_another_store_is_another_matter(monkeypatch):
    monkeypatch.setattr(service, "_LONGEST_WAIT_S", 5.0)
    with model_lock("mine", STORE):
        with model_lock("mine", STORE), model_lock("mine", "file:///elsewhere"):
            assert holders("mine") == 2
        assert holders("mine") == 1
    assert holders("mine") == 0


def test_without_a_server_that_stays_nobody_is_asked_and_nobody_waits(monkeypatch):
    monkeypatch.setattr(service, "get_client", None)
    reached = []
    with temporary_settings(restore_defaults={PREFECT_API_URL}), model_lock("alone", STORE), model_lock("alone", STORE):
        reached.append("both inside")
    assert reached == ["both inside"]
