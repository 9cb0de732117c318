"""Does every run of the main flow wait for its model's turn?"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from tasks.service import model_lock as service
from tasks.service.model_lock import model_lock


def in_another_context(function, *args):
    """Runs the function as a process of its own would: it holds no turn."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function, *args).result()


@pytest.mark.usefixtures("prefect_backend")
def test_the_main_flow_takes_the_turn_of_its_model_whatever_started_it(tmp_path, monkeypatch):
    config = PtqConfig.model_validate(
        {
            "model": {"name": "resnet18", "checkpoint": str(tmp_path / "absent.pth"), "publish_as": "taken"},
            "data": {"path": str(tmp_path)},
            "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "out")},
        }
    )
    with model_lock("taken", config.output.store):
        # From here on: the lock itself may take a while to come from a busy server.
        monkeypatch.setattr(service, "_LONGEST_WAIT_S", 0.5)
        with pytest.raises(TimeoutError, match="concurrency slots timed out"):
            in_another_context(quantize_model, config)
    assert not any((tmp_path / "out").iterdir())
