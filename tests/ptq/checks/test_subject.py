"""Files that are no models, damaged files, external data, and the dialect of a file."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from checked_graphs import problems, sound_graph, write

from ptq.checks.run import check_graph
from ptq.checks.subject import PROTOBUF_LIMIT_BYTES
from ptq.errors import ExportError


def test_the_dialect_is_read_off_the_activations(tmp_path):
    assert problems(check_graph(write(sound_graph("cpu"), tmp_path))) == set()
    assert problems(check_graph(write(sound_graph("cpu"), tmp_path), dialect="tensorrt")) == {
        ("zero-point-type", "error")
    }


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ExportError, match=r"absent\.onnx is not a file\. Give the path of an ONNX file"):
        check_graph(tmp_path / "absent.onnx")


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ExportError, match=r"empty\.onnx holds 0 nodes and 0 opsets.*export it again"):
        check_graph(tmp_path / "empty.onnx")


@pytest.mark.parametrize("content", ["A plain text about convolutions.\n" * 20, "<html></html>", "{}"])
def test_a_text_file_is_an_error(tmp_path, content):
    (tmp_path / "text.onnx").write_text(content)
    with pytest.raises(ExportError, match=r"text\.onnx (has|holds) .*export it again"):
        check_graph(tmp_path / "text.onnx")


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_an_error(tmp_path, kept):
    path = write(sound_graph(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ExportError, match=r"model\.onnx (has|holds) .*cut off"):
        check_graph(path)


def test_a_file_beyond_the_limit_of_protobuf_is_refused_unread(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as stream:
        stream.truncate(PROTOBUF_LIMIT_BYTES)
    with pytest.raises(ExportError, match=r"2,147,483,648 bytes.*Save the weights as external data"):
        check_graph(path)


def test_external_data_is_read_and_its_absence_is_an_error(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(sound_graph(), str(path), save_as_external_data=True, location="weights.bin", size_threshold=64)
    assert problems(check_graph(path)) == set()
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ExportError, match=r"external data of .*model\.onnx cannot be read.*Copy the data files"):
        check_graph(path)


def refusal(path: Path) -> str | None:
    """The text of the ExportError, None if the checks run through."""
    try:
        check_graph(path)
    except ExportError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_file_is_reported_and_never_crashes_the_checks(tmp_path, seed):
    path = write(sound_graph(), tmp_path)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for position in random.integers(0, len(content), 6):
        content[position] = random.integers(0, 256)
    path.write_bytes(bytes(content))
    if (problem := refusal(path)) is not None:
        assert str(path) in problem
