"""Does a model have one run at a time?"""

import threading

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.service import turn_of


def holders(model):
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(f"ptq-model-{model}").active_slots


@pytest.mark.usefixtures("prefect_backend")
def test_a_second_run_of_a_model_waits_for_the_first_and_another_model_does_not():
    entered = threading.Event()

    def second():
        with turn_of("one"):
            entered.set()

    waiting = threading.Thread(target=second)
    with turn_of("one"):
        waiting.start()
        with turn_of("other"):
            assert (holders("one"), holders("other")) == (1, 1)
        assert not entered.wait(1)
    waiting.join(60)
    assert entered.is_set()
    assert holders("one") == 0


def test_without_a_server_that_stays_nobody_waits():
    reached = []
    with temporary_settings(restore_defaults={PREFECT_API_URL}), turn_of("alone"), turn_of("alone"):
        reached.append("both inside")
    assert reached == ["both inside"]
