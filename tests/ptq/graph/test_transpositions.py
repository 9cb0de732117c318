import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

from ptq.graph.transpositions import sink_transpositions_

FIRST, LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def graph_of(nodes, result, rank=4):
    """A graph with the input x, (2, 3, 4, 5), and nodes given as (operator, inputs, attributes)."""
    tensors = {"x": gs.Variable("x", np.float32, (2, 3, 4, 5)), "z": gs.Variable("z", np.float32, (2, 3, 4, 5))}
    made = []
    for position, (operator, inputs, attributes) in enumerate(nodes):
        name = f"t{position}"
        tensors[name] = gs.Variable(name, np.float32)
        read = [tensors[each] if isinstance(each, str) else gs.Constant(f"c{position}", each) for each in inputs]
        made.append(gs.Node(operator, name=name, inputs=read, outputs=[tensors[name]], attrs=attributes))
    tensors[result].shape = [None] * rank
    return gs.Graph(made, [tensors["x"], tensors["z"]], [tensors[result]], opset=17)


def run(graph, x, z):
    session = onnxruntime.InferenceSession(
        gs.export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {"x": x, "z": z}
    return session.run(None, {each.name: given[each.name] for each in session.get_inputs()})[0]


COLUMN, TWO = np.arange(3, dtype=np.float32), np.array(2, np.float32)
TO_LAST, TO_FIRST = ("Transpose", "x", {"perm": LAST}), ("Transpose", ["t1"], {"perm": FIRST})
CASES = {
    "meets another": ([TO_LAST, ("Relu", ["t0"], {}), TO_FIRST], 0),
    "a constant of one axis": (
        [TO_LAST, ("Add", ["t0", COLUMN], {}), TO_FIRST], 0,
    ),
    "a number": (
        [TO_LAST, ("Mul", [TWO, "t0"], {}), TO_FIRST], 0,
    ),
    "two branches": (
        [
            TO_LAST, ("Transpose", "z", {"perm": LAST}), ("Add", ["t0", "t1"], {}),
            ("Transpose", ["t2"], {"perm": FIRST}),
        ], 0,
    ),
    "a reduction": ([TO_LAST, ("ReduceMean", ["t0"], {"axes": [1, 2], "keepdims": 0})], 0),
    "a reduction counted from the end": (
        [TO_LAST, ("ReduceMean", ["t0"], {"axes": [-3, -2], "keepdims": 0})], 0,
    ),
    "other orders": (
        [TO_LAST, ("Transpose", "z", {"perm": [0, 3, 2, 1]}), ("Add", ["t0", "t0"], {})], 1,
    ),
    "a reduction that keeps its axes": (
        [TO_LAST, ("ReduceMean", ["t0"], {"axes": [1, 2], "keepdims": 1})], 1,
    ),
    "a reduction whose rest is in another order": (
        [TO_LAST, ("ReduceMean", ["t0"], {"axes": [0], "keepdims": 0})], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "left"), CASES.values(), ids=CASES)
def test_transpositions_meet_and_the_function_stays(nodes, left):
    reduced = nodes[-1][2]
    rank = 4 if reduced.get("keepdims", 1) else 4 - len(reduced["axes"])
    graph = graph_of(nodes, f"t{len(nodes) - 1}", rank)
    generator = np.random.default_rng(0)
    x, z = (generator.normal(size=(2, 3, 4, 5)).astype(np.float32) for _ in range(2))
    expected = run(graph, x, z)
    sink_transpositions_(graph)
    np.testing.assert_allclose(run(graph, x, z), expected, rtol=1e-6)
    assert [node.op for node in graph.nodes].count("Transpose") == left
