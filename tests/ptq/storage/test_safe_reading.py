"""Is nothing unpickled, in all of the sources and with a checkpoint that would run code?"""

import ast
import pickle
from pathlib import Path

import pytest
import torch

from ptq.errors import CheckpointError
from ptq.networks.checkpoint import read_state_dict

ROOT = Path(__file__).resolve().parents[3]
# What Dask's scheduler and workers send each other they pickle; it is neither kept nor read from anywhere else.
EXEMPT = {ROOT / "tasks" / "runtime" / "dask_runner.py"}
FILES = [
    path for layer in ("ptq", "tasks", "flows") for path in sorted((ROOT / layer).rglob("*.py")) if path not in EXEMPT
]
PICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "pickletools"}
# Callables that unpickle unless one argument says otherwise, by the two last parts of their name.
GUARDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "lib.format.read_array": ("allow_pickle", False),
    "np.fromfile": (None, None),
}
UNPICKLING = {"read_pickle", "UnpicklingError", "Unpickler", "unsafe_load", "full_load"}


def faults_of(source):
    """What in a source could unpickle, one word each."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            faults += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
            if (node.module or "").split(".")[0] in PICKLING:
                faults.append(node.module)
            if node.module in ("torch", "numpy") and "load" in names:
                faults.append(f"{node.module}.load")
        elif isinstance(node, ast.Attribute) and node.attr in UNPICKLING:
            faults.append(node.attr)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            option, wanted = GUARDED.get(called, (None, None))
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if option and not (isinstance(given.get(option), ast.Constant) and given[option].value is wanted):
                faults.append(called)
    return faults


def test_sources_of_every_layer_were_found():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {"ptq", "tasks", "flows"}
    sources = "".join(path.read_text() for path in FILES)
    assert "torch.load(" in sources
    assert "np.load(" in sources


def test_nothing_in_the_sources_unpickles():
    found = {path.relative_to(ROOT).as_posix(): faults_of(path.read_text()) for path in FILES}
    assert {file: faults for file, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import joblib.parallel", "def f():\n    import cloudpickle",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "from torch import load", "pandas.read_pickle(path)",
    ],
)  # fmt: skip
def test_a_source_that_unpickles_is_noticed(source):
    assert faults_of(source) != []


class _RunsCode:
    """What an attacker puts into a checkpoint: unpickling it creates a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def plain_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


def legacy_checkpoint(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def zip_checkpoint(path, content):
    torch.save(content, path)


@pytest.mark.parametrize("write", [plain_pickle, legacy_checkpoint, zip_checkpoint])
@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(write, ending, tmp_path):
    path, mark = tmp_path / f"weights{ending}", tmp_path / "was here"
    write(path, {"state_dict": {"weight": torch.zeros(2)}, "config": _RunsCode(mark)})
    assert not mark.exists()
    with pytest.raises(CheckpointError, match="holds no weights that can be read safely"):
        read_state_dict(path)
    assert not mark.exists()


def test_the_same_pickle_does_run_where_it_is_unpickled(tmp_path):
    mark = tmp_path / "was here"
    plain_pickle(tmp_path / "weights.pth", _RunsCode(mark))
    pickle.loads((tmp_path / "weights.pth").read_bytes())
    assert mark.exists()
