"""What is stored by a run during which sources are edited? Each run is a process with a copy of them.

What is edited before it is imported is refused: `tests/ptq/test_provenance.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import networks
import pytest
import torch
from prefect.settings import get_current_settings

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import sys
from pathlib import Path
from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from tasks.runtime.progress import add_listener

config, after, edited, old, new = sys.argv[1:]

class Edit:
    def advanced(self, what, done, total):
        pass

    def said(self, text):
        pass

    def finished(self, stage, seconds, cached):
        if stage == after:
            source = Path(edited).read_text()
            assert source.count(old) == 1
            Path(edited).write_text(source.replace(old, new))
        if stage == "compute_amax":
            # What comes after it would show nothing more.
            os._exit(0)

add_listener(Edit())
quantize_model(PtqConfig.model_validate_json(config))
"""


@pytest.fixture
def config(image_folder, tmp_path):
    """Settings of a small run whose store is empty."""
    torch.save(networks.small_resnet().state_dict(), tmp_path / "small.pth")
    return {
        "model": {"name": "networks:SmallResNet", "checkpoint": str(tmp_path / "small.pth")},
        "data": {"path": str(image_folder), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"methods": ["percentile"], "percentiles": [99.9], "trials": 1, "images": 24},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.02, "warmup_ms": 1.0, "rounds": 1},
        "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
        "output": {"store": str(tmp_path / "store"), "directory": str(tmp_path / "output")},
    }


@pytest.fixture
def run(config, tmp_path, prefect_backend):
    """Runs the flow in a copy of the sources; `edit` says after which stage what is replaced in which file."""
    for package in ("ptq", "tasks", "flows"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests/support")]),
        "PREFECT_API_URL": get_current_settings().api.url,
    }

    def start(*edit):
        # A run that ended in the middle keeps the turn of its model for a while.
        config["model"]["publish_as"] = uuid.uuid4().hex
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(config), *(edit or ("", "", "", ""))],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    return start


def keys_of(config, done, stage):
    """The keys under which results of a stage are stored, now that a run has got so far."""
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem for path in (Path(config["output"]["store"]) / "stages" / stage).glob("*.json")}


@pytest.mark.slow
def test_a_module_edited_during_a_run_leaves_nothing_under_the_new_codes_key(config, run):
    # In use already: what runs is what the run began with, and so is the key.
    edit = ("ptq/calibration/amax_tables.py", "names = observed_names(plan)", "names = list(observed_names(plan))")
    computed = run("collect_statistics", *edit)
    (old,) = keys_of(config, computed, "compute_amax")
    again = run()
    assert len(keys_of(config, again, "collect_statistics")) == len(keys_of(config, again, "prepare_model")) == 1
    (new,) = keys_of(config, again, "compute_amax") - {old}
    assert new != old
