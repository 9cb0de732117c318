"""Does every run of the main flow wait for its model's turn?"""

import pytest

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from tasks import service
from tasks.service import turn_of


@pytest.mark.usefixtures("prefect_backend")
def test_the_main_flow_takes_the_turn_of_its_model_whatever_started_it(tmp_path, monkeypatch):
    config = PtqConfig.model_validate(
        {
            "model": {"name": "resnet18", "checkpoint": str(tmp_path / "absent.pth"), "publish_as": "taken"},
            "data": {"path": str(tmp_path)},
            "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "out")},
        }
    )
    monkeypatch.setattr(service, "_LONGEST_WAIT_S", 0.5)
    with turn_of("taken"), pytest.raises(TimeoutError, match="concurrency slots timed out"):
        quantize_model(config)
    assert not (tmp_path / "out").exists()
