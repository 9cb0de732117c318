"""Whatever is done to a graph, the checks return findings or say with an ExportError why they cannot."""

import numpy as np
import onnx
import pytest
from checked_graphs import sound_graph
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ptq.checks.run import check_graph
from ptq.errors import ExportError
from ptq.records.graph import GraphChecks


def drop_an_input(model: ModelProto, random: np.random.Generator) -> None:
    node = pick(model.graph.node, random)
    if node.input:
        del node.input[int(random.integers(len(node.input)))]


def empty_a_name(model: ModelProto, random: np.random.Generator) -> None:
    node = pick(model.graph.node, random)
    names = node.input if random.random() < 0.5 else node.output
    if names:
        names[int(random.integers(len(names)))] = ""


def rewire(model: ModelProto, random: np.random.Generator) -> None:
    """May close a cycle."""
    node, source = pick(model.graph.node, random), pick(model.graph.node, random)
    if node.input and source.output:
        node.input[int(random.integers(len(node.input)))] = source.output[0]


def drop_an_initializer(model: ModelProto, random: np.random.Generator) -> None:
    del model.graph.initializer[int(random.integers(len(model.graph.initializer)))]


def change_a_type(model: ModelProto, random: np.random.Generator) -> None:
    tensor = pick(model.graph.initializer, random)
    kinds = [np.uint8, np.int8, np.int32, np.int64, np.float16, np.float64, np.bool_]
    values = np.nan_to_num(numpy_helper.to_array(tensor).astype(np.float64)).clip(0, 100)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(kinds[int(random.integers(len(kinds)))]), tensor.name))


def change_a_shape(model: ModelProto, random: np.random.Generator) -> None:
    tensor = pick(model.graph.initializer, random)
    shape = tuple(int(size) for size in random.integers(0, 4, int(random.integers(0, 4))))
    tensor.CopyFrom(numpy_helper.from_array(random.normal(size=shape).astype(np.float32), tensor.name))


def lie_about_a_shape(model: ModelProto, random: np.random.Generator) -> None:
    pick(model.graph.initializer, random).dims[:] = [int(size) for size in random.integers(0, 9, 2)]


def change_an_operator(model: ModelProto, random: np.random.Generator) -> None:
    kinds = ["Conv", "Gemm", "MatMul", "Add", "Concat", "Relu", "Constant", "QuantizeLinear", "DequantizeLinear",
             "ReduceMean", "Clip", "Transpose", "Pad", "QLinearConv", "DynamicQuantizeLinear", "Nonsense"]  # fmt: skip
    pick(model.graph.node, random).op_type = kinds[int(random.integers(len(kinds)))]


def change_an_attribute(model: ModelProto, random: np.random.Generator) -> None:
    node = pick(model.graph.node, random)
    values = [7, -9, 0.5, "text", [1, 2], [0.5], np.int64(3).item()]
    name = ["axis", "perm", "axes", "transB", "group", "training_mode"][int(random.integers(6))]
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, values[int(random.integers(len(values)))])])


def drop_a_node(model: ModelProto, random: np.random.Generator) -> None:
    del model.graph.node[int(random.integers(len(model.graph.node)))]


def copy_a_node(model: ModelProto, random: np.random.Generator) -> None:
    model.graph.node.append(pick(model.graph.node, random))


def change_an_end(model: ModelProto, random: np.random.Generator) -> None:
    ends = model.graph.input if random.random() < 0.5 else model.graph.output
    shape = [None, "n", 0, 3][int(random.integers(4))]
    rank = int(random.integers(0, 6))
    ends.append(helper.make_tensor_value_info(f"end{len(ends)}", TensorProto.FLOAT, [shape] * rank))
    if random.random() < 0.5:
        del ends[0]


MUTATIONS = [
    drop_an_input, empty_a_name, rewire, drop_an_initializer, change_a_type, change_a_shape, lie_about_a_shape,
    change_an_operator, change_an_attribute, drop_a_node, copy_a_node, change_an_end,
]  # fmt: skip


def pick(items, random):
    return items[int(random.integers(len(items)))]


def checked(path) -> GraphChecks | ExportError:
    try:
        return check_graph(path)
    except ExportError as error:
        return error


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("dialect", ["tensorrt", "cpu"])
def test_one_kind_of_damage_after_the_other_never_crashes_the_checks(mutation, dialect, tmp_path):
    random = np.random.default_rng(0)
    path, original = tmp_path / "a.onnx", sound_graph(dialect)
    for _ in range(6):
        model = ModelProto()
        model.CopyFrom(original)
        for _ in range(int(random.integers(1, 4))):
            mutation(model, random)
        path.write_bytes(model.SerializeToString())
        assert isinstance(checked(path), GraphChecks | ExportError)


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 24))])
@pytest.mark.slow
def test_several_kinds_of_damage_together_never_crash_the_checks(seed, tmp_path):
    random = np.random.default_rng(seed)
    path, model = tmp_path / "a.onnx", sound_graph("cpu" if seed % 2 else "tensorrt")
    for _ in range(6):
        MUTATIONS[int(random.integers(len(MUTATIONS)))](model, random)
        path.write_bytes(model.SerializeToString())
        found = checked(path)
        assert isinstance(found, GraphChecks | ExportError)
        assert str(path) in str(found) or isinstance(found, GraphChecks)


def test_a_cycle_is_found_and_walked_only_once(tmp_path):
    model = sound_graph()
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    adds[0].input[0] = adds[-1].output[0]
    path = tmp_path / "a.onnx"
    onnx.save(model, str(path))
    assert "onnx-checker" in {found.check for found in check_graph(path).findings}
