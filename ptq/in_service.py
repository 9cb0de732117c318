"""Which published version would a new model replace, and can the two be compared?"""

from ptq.config import Dialect
from ptq.errors import PtqError
from ptq.graph.summary import summarize_onnx
from ptq.records.base import ArtifactRef
from ptq.records.decision import ServedModel
from ptq.storage.store import Store


def served_version(
    store: Store,
    model: str,
    *,
    onnx_sha256: str,
    dialect: Dialect,
    input_shape: tuple[int, int, int],
    num_classes: int,
) -> ServedModel | None:
    """Returns the version of `model` in service, None where there is none, or where it is the new graph itself.

    Args:
        store: where it was published.
        model: name under which it was published.
        onnx_sha256: digest of the new graph.
        dialect: dialect of the new graph, in which the other is wanted too.
        input_shape: (c, h, w) of the new graph.
        num_classes: classes of the new graph.

    A version whose graph is gone, is of another dialect or has other images or classes comes with the obstacle in
    words.
    """
    entry = store.latest(model)
    if entry is None or entry.get("onnx_sha256") == onnx_sha256:
        return None
    version, objects = str(entry["version"]), entry.get("objects", {})
    name = "model_int8.onnx" if entry.get("dialect") == dialect else f"model_int8_{dialect}.onnx"
    if name not in objects or "amax.json" not in objects:
        return ServedModel(version, None, None, f"it has no graph of the dialect {dialect}")
    onnx, amax = ArtifactRef(**objects[name]), ArtifactRef(**objects["amax.json"])
    try:
        store.get_path(amax)
        found = summarize_onnx(store.get_path(onnx))
    except PtqError as error:
        return ServedModel(version, None, None, f"its graph cannot be read ({error})")
    if found.input_shape[1:] != input_shape or found.outputs != num_classes:
        obstacle = (
            f"it reads images of {_times(found.input_shape[1:])} and tells {found.outputs} classes apart, the new "
            f"model reads {_times(input_shape)} and tells {num_classes}"
        )
        return ServedModel(version, None, None, obstacle)
    return ServedModel(version, onnx, amax)


def _times(shape: tuple[int | None, ...]) -> str:
    return " x ".join(str(size) for size in shape)
