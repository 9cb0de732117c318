"""The checks together: a sound graph, files of other makers, and a seeded fault for every check."""

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from checked_graphs import CLASSES, insert, message_of, node_of, problems, remove_pair, sound_graph, write
from onnx import TensorProto, helper

from ptq.checks import run
from ptq.checks.run import CHECKS, check_graph
from ptq.report.terminal import table_of_checks
from tests.ptq.checks import test_file, test_layers, test_pairs, test_placement, test_scales, test_weights

SEEDED = (test_file, test_layers, test_pairs, test_scales, test_weights, test_placement)


@pytest.mark.parametrize("dialect", ["tensorrt", "cpu"])
def test_a_sound_graph_has_no_error_and_no_warning(tmp_path, dialect):
    checks = check_graph(
        write(sound_graph(dialect), tmp_path), dialect=dialect, input_shape=(3, 16, 16), num_classes=CLASSES
    )
    assert problems(checks) == set()
    assert checks.checks_run == tuple(check.identifier for check in CHECKS)


def test_every_check_has_a_seeded_fault_or_is_a_report():
    reports = {"batch-dimension", "layer-coverage", "qdq-absent"}
    with_own_tests = {"activation-depthwise", "whole-operator"}
    seeded = {case.check for theme in SEEDED for case in theme.CASES.values()}
    assert seeded | reports | with_own_tests == {check.identifier for check in CHECKS}


def test_no_two_checks_have_one_identifier():
    assert len({check.identifier for check in CHECKS}) == len(CHECKS)


def test_every_module_of_the_room_takes_part():
    found = {path.stem for path in Path(run.__file__).parent.glob("*.py")} - {"__init__", "run", "subject"}
    assert found == {theme.__name__.rpartition(".")[2] for theme in run.THEMES}


def test_a_float_model_gets_the_checks_of_the_file_alone(tmp_path):
    model = sound_graph()
    for node in [node for node in model.graph.node if node.name.endswith("/Q")]:
        remove_pair(model, node.name.removesuffix("/Q"))
    checks = check_graph(write(model, tmp_path), num_classes=CLASSES)
    assert problems(checks) == set()
    assert "it is a float model" in message_of(checks, "qdq-absent")
    assert checks.checks_run == tuple(check.identifier for check in CHECKS if not check.needs_qdq)


def test_a_node_without_a_name_is_named_by_its_operator_and_output(tmp_path):
    model = sound_graph()
    remove_pair(model, "left.weight")
    node_of(model, "left").name = ""
    (finding,) = [found for found in check_graph(write(model, tmp_path)).findings if found.check == "layer-quantized"]
    assert finding.node == "Conv -> left.out"


class _Images:
    """Two seeded batches for onnxruntime's calibrator."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._batches = [{"images": random.normal(size=(2, 3, 16, 16)).astype(np.float32)} for _ in range(2)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._batches.pop() if self._batches else None


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    model = sound_graph()
    for node in [node for node in model.graph.node if node.name.endswith("/Q")]:
        remove_pair(model, node.name.removesuffix("/Q"))
    del model.metadata_props[:]
    path = tmp_path / "float.onnx"
    onnx.save(model, str(path))
    return path


def quantized_by_onnxruntime(float_file: Path, **options: object) -> Path:
    quantization = pytest.importorskip("onnxruntime.quantization")
    path = float_file.with_name("ort.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_static(str(float_file), str(path), _Images(), **options)
    return path


def test_the_asymmetric_qdq_file_of_onnxruntime_is_read_and_its_faults_are_named(float_file):
    from onnxruntime.quantization import QuantFormat, QuantType

    path = quantized_by_onnxruntime(float_file, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8)
    checks = check_graph(path, input_shape=(3, 16, 16), num_classes=CLASSES)
    assert problems(checks) == {
        ("bias-float", "warning"),
        ("concat-scales", "warning"),
        ("output-float", "warning"),
        ("residual-add", "warning"),
        # The quantizer drops the ReLU before a Q whose zero point is 0: the Q then clips in its place.
        ("uint8-never-negative", "error"),
        # Without `reduce_range`.
        ("weight-pair-sums", "warning"),
        ("weight-per-channel", "warning"),
        ("zero-point-zero", "warning"),
    }


def test_the_qoperator_file_of_onnxruntime_is_read_and_refused(float_file):
    from onnxruntime.quantization import QuantFormat

    checks = check_graph(quantized_by_onnxruntime(float_file, quant_format=QuantFormat.QOperator))
    assert ("integer-operators", "error") in problems(checks)
    assert "QLinearConv" in message_of(checks, "integer-operators")


def test_the_same_file_has_errors_for_tensorrt(float_file):
    from onnxruntime.quantization import QuantFormat, QuantType

    path = quantized_by_onnxruntime(float_file, quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8)
    errors = {check for check, severity in problems(check_graph(path, dialect="tensorrt")) if severity == "error"}
    assert {"bias-float", "output-float", "residual-add", "zero-point-zero", "zero-point-type"} <= errors


def test_the_table_has_one_row_for_each_check_with_a_count_and_the_first_nodes(tmp_path):
    model = sound_graph()
    for name in ("stem", "left", "right", "mix"):
        remove_pair(model, f"{name}.weight")
    table = table_of_checks(check_graph(write(model, tmp_path)))
    (row,) = (row for row in table.rows if row[1] == "layer-quantized")
    assert row[:4] == ("error", "layer-quantized", "4", "stem, left, right and 1 more")


def test_the_checks_print_nothing(tmp_path, capsys):
    model = sound_graph()
    cast = helper.make_node("Cast", ["mix/relu.out"], ["cast.out"], name="cast", to=TensorProto.BFLOAT16)
    insert(model, "gap", cast)
    check_graph(write(model, tmp_path))
    assert capsys.readouterr() == ("", "")
