"""What is changed, and which stages run again for it? The expected sets are written by hand."""

import ast
import json
import shutil
import sys
import uuid
from functools import cache, partial
from pathlib import Path

import networks
import pytest
import torch
from PIL import Image

from flows.quantize_model import quantize_model
from ptq import provenance
from ptq.config import PtqConfig
from ptq.provenance import read_sources
from ptq.storage.store import open_store
from tasks.runtime import code_digest
from tasks.runtime.code_digest import NOT_COUNTED, SourceTree

slow = partial(pytest.param, marks=pytest.mark.slow)
ROOT = Path(__file__).parents[2]
STAGES = {
    (f"tasks.stages.{path.stem}", node.name)
    for path in (ROOT / "tasks/stages").glob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
    and any(isinstance(item, ast.Call) and getattr(item.func, "id", "") == "stage" for item in node.decorator_list)
}
# Stages that build a graph for the engine and run it, and those that do so to observe activations.
EVALUATIONS = {"evaluate", "evaluate_baseline", "evaluate_each_isa", "evaluate_published"}
ON_ENGINE = {*EVALUATIONS, "compare_with_file", "build_engine", "benchmark", "benchmark_published", "prepare_model"}
ON_READERS = {"collect_statistics", "collect_shard", "carry_amax", "equalize_channels"}
# The methods, and the rule that ends an adaptive draw by them.
ON_METHODS = {"compute_amax", "collect_statistics", "collect_shard", "carry_amax"}
FAKE_QUANTIZED = {"export_qdq", "choose_methods", "rank_layers", "fine_tune"}


SOURCES = read_sources(ROOT)


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """A file that is as it was is not parsed again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_digest, "_parsed", cache(code_digest._parsed))
        yield


def digests(edits):
    """The digest of every stage with other content of some files."""
    tree = SourceTree(SOURCES | edits)
    return {stage: tree.code_of(module, stage).sha256 for module, stage in STAGES}


def edited(source, function, line):
    """The source, as bytes, with a line before the last statement of a function or method."""
    body = ast.parse(source).body
    for name in function.split("."):
        (node,) = [item for item in body if getattr(item, "name", "") == name]
        body = node.body
    lines = source.decode().splitlines()
    lines.insert(body[-1].lineno - 1, " " * body[-1].col_offset + line)
    return ("\n".join(lines) + "\n").encode()


@pytest.fixture(scope="module")
def before():
    return digests({})


def test_there_are_stages_to_look_at():
    assert len(STAGES) >= 20


@pytest.mark.parametrize(
    ("file", "function", "expected"),
    [
        ("ptq/numerics/amax.py", "entropy_bin", ON_METHODS),
        ("ptq/numerics/amax.py", "amax_from_weight", FAKE_QUANTIZED),
        ("ptq/data/sampling.py", "draw_trials", {"draw_calibration_images"}),
        ("ptq/data/decoding.py", "decode_rows", {"draw_calibration_images", "prepare_split"}),
        ("ptq/data/index.py", "index_images", {"index_images"}),
        ("ptq/data/images.py", "network_input", {
            *ON_READERS, *EVALUATIONS, "compare_with_file", "choose_methods", "rank_layers", "fine_tune",
            "train_classifier",
        }),
        ("ptq/checks/run.py", "check_graph", {"validate_graph"}),
        ("ptq/evaluation/gate.py", "decide", {"decide"}),
        ("ptq/numerics/saturation.py", "neighbours", {"limit_pair_sums", "validate_graph", "compare_with_file"}),
        ("ptq/numerics/paired_test.py", "mcnemar_p", {"select_candidate", "compare_with_published"}),
        ("ptq/evaluation/versus_published.py", "compare", {"compare_with_published"}),
        ("tasks/runtime/machine_lock.py", "shared_machine", set()),
        ("ptq/numerics/metrics.py", "split_metrics", EVALUATIONS),
        ("ptq/engines/openvino.py", "OpenVinoEngine.build", ON_ENGINE),
        ("ptq/engines/openvino_activations.py", "open_activation_readers", ON_READERS),
        ("ptq/engines/tensorrt.py", "TensorRtEngine.build", ON_ENGINE),
        ("ptq/report/html.py", "html_report", set()),
        ("ptq/report/deliver.py", "compose_verdict", set()),
        ("ptq/storage/store.py", "Store.put_file", set()),
        ("ptq/storage/cache.py", "ObjectCache.find", set()),
        ("tasks/stages/evaluation.py", "_evaluate", EVALUATIONS - {"evaluate_each_isa"}),
        ("tasks/stages/amax.py", "compute_amax", {"compute_amax"}),
        ("tasks/runtime/stage.py", "stage", set()),
    ],
)  # fmt: skip
def test_a_line_of_code_changes_the_stages_that_reach_it(before, file, function, expected):
    after = digests({file: edited(SOURCES[file], function, "_edited = 1")})
    assert {stage for stage in before if after[stage] != before[stage]} == expected


@pytest.mark.parametrize("line", ["# a comment", "\n\n"])
def test_comments_and_blank_lines_change_no_stage(before, line):
    file = "ptq/numerics/amax.py"
    assert digests({file: edited(SOURCES[file], "entropy_bin", line)}) == before


def test_a_docstring_changes_no_stage(before):
    file = "ptq/numerics/amax.py"
    source = SOURCES[file].decode()
    docstring = ast.get_docstring(next(n for n in ast.parse(source).body if getattr(n, "name", "") == "mse_bin"), False)
    assert source.count(docstring) == 1
    assert digests({file: source.replace(docstring, "Another sentence.").encode()}) == before


@pytest.mark.parametrize(
    ("source", "edit"),
    [
        ("from ptq.below import *\n\ndef top(): return low()\n", ("low", "_edited = 1")),
        ("from ptq import below\n\ndef top(): return getattr(below, 'lo' + 'w')()\n", ("low", "_edited = 1")),
        ("import ptq.below as b\n\ndef top(): return b.low()\n", ("low", "_edited = 1")),
        ("def top():\n    from .below import low\n    return low()\n", ("low", "_edited = 1")),
        ("from ptq.below import Low\n\ndef top() -> 'Low': ...\n", ("Low.low", "_edited = 1")),
        ("from ptq.below import TABLE\n\ndef top(): return TABLE\n", ("low", "_edited = 1")),
    ],
    ids=["star", "getattr", "module", "deferred", "quoted annotation", "constant"],
)
def test_every_way_to_reach_code_is_followed(tmp_path, source, edit):
    (tmp_path / "ptq").mkdir()
    (tmp_path / "ptq/__init__.py").touch()
    (tmp_path / "ptq/top.py").write_text(source)
    below = tmp_path / "ptq/below.py"
    below.write_text(
        "def low():\n    return 1\n\nclass Low:\n    def low(self):\n        return 1\n\nTABLE = {1: low}\n"
    )
    first = SourceTree(read_sources(tmp_path)).code_of("ptq.top", "top").sha256
    below.write_bytes(edited(below.read_bytes(), *edit))
    assert SourceTree(read_sources(tmp_path)).code_of("ptq.top", "top").sha256 != first


def test_what_a_module_does_on_import_counts_and_what_it_only_defines_does_not(tmp_path):
    (tmp_path / "ptq").mkdir()
    module = tmp_path / "ptq/one.py"

    def digest_with(more):
        module.write_text(f"import numpy\n\ndef used(): return 1\n{more}")
        return SourceTree(read_sources(tmp_path)).code_of("ptq.one", "used").sha256

    assert digest_with("def other(): return 2\n") == digest_with("OTHER = 3\n") == digest_with("")
    assert digest_with("numpy.seterr(all='raise')\n") != digest_with("")


REGISTRY = "CHECKS = {}\n\ndef check(function):\n    CHECKS[function.__name__] = function\n"


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("from ptq.registry import check\n\n@check\ndef new(): return {}\n", True),
        ("from ptq.registry import CHECKS\n\nCHECKS['new'] = {}\n", True),
        ("from ptq import registry\n\nif True:\n    registry.CHECKS.update(new={})\n", True),
        ("def new(): return {}\n", False),
        ("NEW = {}\n", False),
    ],
    ids=["decorator", "assignment", "branch", "function", "constant"],
)
def test_what_a_module_registers_on_import_counts_for_whoever_imports_it(tmp_path, source, changes):
    (tmp_path / "ptq").mkdir()
    (tmp_path / "ptq/__init__.py").write_text("from ptq import between\n")
    (tmp_path / "ptq/between.py").write_text("from ptq import below\n")
    (tmp_path / "ptq/registry.py").write_text(REGISTRY)
    (tmp_path / "ptq/top.py").write_text("from ptq.registry import CHECKS\n\ndef top(): return CHECKS\n")

    def digest_with(value):
        (tmp_path / "ptq/below.py").write_text(source.format(value))
        return SourceTree(read_sources(tmp_path)).code_of("ptq.top", "top").sha256

    assert (digest_with(1) != digest_with(2)) is changes


# Modules that import by a name they compute, and why the digest need not know what.
COMPUTED_IMPORTS = {
    "ptq/networks/factory.py": "imports the network, whose source is an input of the stage by its digest",
    "tasks/runtime/dask_runner.py": "imports a stage, which has a digest of its own",
}
# Libraries that no result depends on as a number, and why. Any other that `ptq` imports is in LIBRARIES.
NO_NUMBERS = {
    "absl": "logs", "boto3": "moves bytes", "botocore": "moves bytes", "google": "reads protobuf for onnx",
    "jaxtyping": "names shapes", "jinja2": "writes pages", "llvmlite": "comes with the version of numba",
    "matplotlib": "draws pictures", "polars": "reads and writes tables", "psutil": "tells the load of the machine",
    "pydantic": "reads settings", "pydantic_core": "reads settings", "safetensors": "reads and writes weights",
    "sklearn": "holds the images of the demo, which are files to a run",
    "timm": "its version is the digest of its networks, an input", "transformers": "so is its version",
    "tensorrt": "its version is part of the engine's identity, an input", "yaml": "reads settings",
}  # fmt: skip


@cache
def nodes_of(package):
    paths = sorted((ROOT / package).rglob("*.py"))
    return [
        (path.relative_to(ROOT).as_posix(), node) for path in paths for node in ast.walk(ast.parse(path.read_text()))
    ]


def all_nodes():
    return [*nodes_of("ptq"), *nodes_of("tasks")]


def test_every_library_that_computes_is_part_of_the_key():
    names = {
        name
        for _, node in nodes_of("ptq")
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in ([each.name for each in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"ptq"}
    assert tops == {*provenance.LIBRARIES, *NO_NUMBERS}


def test_no_other_module_imports_by_a_name_that_cannot_be_read():
    found = {
        file
        for file, node in all_nodes()
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        and not isinstance(node.args[0], ast.Constant)
    }
    assert found == set(COMPUTED_IMPORTS)


def test_no_class_registers_its_subclasses():
    assert [file for file, node in all_nodes() if getattr(node, "name", "") == "__init_subclass__"] == []
    assert [file for file, node in all_nodes() if getattr(node, "arg", "") == "metaclass"] == []


def test_what_is_not_counted_exists():
    assert [name for name in NOT_COUNTED if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


# From here on the small flow runs: one run is the base, each row changes one thing and runs again.

DOWN_FROM_SELECTION = {"write_graph", "validate_graph", "compare_with_file", "build_engine", "benchmark", "decide"}
DOWN_FROM_AMAX = {"compute_amax", "evaluate", "select_candidate", *DOWN_FROM_SELECTION}
EXPORTED = {"export_qdq", "limit_pair_sums"}
DOWN_FROM_DRAWS = {"equalize_channels", "collect_statistics", "correct_biases", *EXPORTED, *DOWN_FROM_AMAX}


@pytest.fixture(scope="module")
def base(prefect_backend, image_folder, tmp_path_factory):
    """A finished run: its config and the folder of its images."""
    directory = tmp_path_factory.mktemp("base")
    torch.save(networks.small_resnet().state_dict(), directory / "small.pth")
    shutil.copytree(image_folder, directory / "images")
    config = PtqConfig.model_validate({
        "model": {"name": "networks:SmallResNet", "checkpoint": str(directory / "small.pth"), "publish_as": "small"},
        "data": {"path": str(directory / "images"), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"methods": ["percentile"], "percentiles": [99.9], "trials": 1, "images": 24},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1], "duration_s": 0.02, "warmup_ms": 1.0, "rounds": 1},
        "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
        "output": {"store": str(directory / "store"), "directory": str(directory / "output")},
    })  # fmt: skip
    assert computed(config) == {note["stage"] for note in notes(config, quantize_model(config).run_id)}
    return config


def notes(config, run_id):
    return open_store(config.output.store).run_stages(run_id)


def computed(config):
    """Runs the flow and returns the stages that were computed rather than found.

    Under a name that nothing was published under: what is in service is no setting.
    """
    config = changed(config, "model.publish_as", f"model-{uuid.uuid4().hex}")
    return {note["stage"] for note in notes(config, quantize_model(config).run_id) if not note["cached"]}


def changed(config, field, value):
    content = config.model_dump()
    *sections, name = field.split(".")
    section = content
    for each in sections:
        section = section[each]
    section[name] = value
    return PtqConfig.model_validate(content)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        slow("calibration.percentiles", [90.0], DOWN_FROM_AMAX),
        slow("calibration.seed", 7, {"draw_calibration_images", *DOWN_FROM_DRAWS}),
        ("gate.max_drop_pp", 99.0, {"decide"}),
        ("quantization.weight_method", "mse", {*EXPORTED, "correct_biases", *DOWN_FROM_AMAX}),
        slow("calibration.bins", 1024, {"collect_statistics", *DOWN_FROM_AMAX}),
        slow("benchmark.duration_s", 0.03, {"benchmark", "decide"}),
        slow("benchmark.batch_sizes", [2], {"build_engine", "benchmark", "decide"}),
        slow("quantization.skip_layers", ["block1.conv1"], {"prepare_model", *DOWN_FROM_DRAWS}),
        slow("data.preprocessing.mean", (0.5, 0.5, 0.5), {"evaluate_baseline", *DOWN_FROM_DRAWS}),
    ],
)  # fmt: skip
def test_a_setting_repeats_the_stages_that_use_it(base, tmp_path, monkeypatch, field, value, expected):
    monkeypatch.chdir(tmp_path)
    assert computed(changed(base, field, value)) == expected


def test_settings_that_change_no_result_repeat_nothing(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = base
    settings = {"model.publish_as": "a", "output.directory": "another", "engine.name": "auto", "fallback.images": 8}
    for field, value in settings.items():
        config = changed(config, field, value)
    assert computed(config) == set()


def drawn_and_other_image(config):
    """A calibration image that the base run drew and one that it did not."""
    store = open_store(config.output.store)
    (note,) = [n for n in notes(config, quantize_model(config).run_id) if n["stage"] == "draw_calibration_images"]
    record = store.read_stage(note["stage"], note["key"]).record
    files = json.loads((store.backend.root / "objects" / record["prepared"]["sha256_of_files"]["sha256"][:2]
                        / record["prepared"]["sha256_of_files"]["sha256"]).read_bytes())  # fmt: skip
    drawn = {path for path, _ in files}
    root = Path(config.data.path)
    every = sorted(path.relative_to(root).as_posix() for path in (root / "train").rglob("*.png"))
    return root / sorted(drawn)[0], root / next(path for path in every if path not in drawn)


@pytest.fixture
def images(base, tmp_path):
    """A config on a copy of the images, and the copy."""
    shutil.copytree(base.data.path, tmp_path / "images")
    config = changed(base, "data.path", str(tmp_path / "images"))
    assert computed(config) == {"index_images", "draw_calibration_images"}
    return config, tmp_path / "images"


def repaint(path):
    with Image.open(path) as picture:
        turned = picture.rotate(90)
    turned.save(path)


@pytest.mark.slow
def test_a_changed_image_that_was_drawn_repeats_all_but_the_other_splits_and_the_model(base, images):
    config, root = images
    repaint(root / drawn_and_other_image(base)[0].relative_to(base.data.path))
    assert computed(config) == {"index_images", "draw_calibration_images", *DOWN_FROM_DRAWS} - EXPORTED


@pytest.mark.slow
def test_a_changed_image_that_was_not_drawn_repeats_the_draw_alone(base, images):
    config, root = images
    repaint(root / drawn_and_other_image(base)[1].relative_to(base.data.path))
    assert computed(config) == {"index_images", "draw_calibration_images"}


def test_an_image_more_to_test_on_repeats_its_split_and_the_evaluations(images):
    config, root = images
    first = min((root / "test").rglob("*.png"))
    shutil.copy(first, first.with_name("more.png"))
    repaint(first.with_name("more.png"))
    assert computed(config) == {
        "index_images", "draw_calibration_images", "prepare_split", "evaluate_baseline", "evaluate",
        "select_candidate", "compare_with_file", "decide",
    }  # fmt: skip


@pytest.mark.slow
def test_another_checkpoint_repeats_all_but_the_images(base, tmp_path):
    state = networks.small_resnet().state_dict()
    torch.save({name: value * 1.5 for name, value in state.items()}, tmp_path / "other.pth")
    config = changed(base, "model.checkpoint", str(tmp_path / "other.pth"))
    assert computed(config) == {"prepare_model", "evaluate_baseline", *DOWN_FROM_DRAWS}


def test_what_an_engine_computed_under_one_instruction_set_is_not_used_under_another(base, monkeypatch):
    monkeypatch.setattr("ptq.engines.openvino.current_isa", lambda: "another")
    expected = {"evaluate_baseline", "evaluate", "compare_with_file", "build_engine", "benchmark", "decide"}
    assert computed(base) == expected


@pytest.mark.slow
def test_a_version_in_service_is_compared_with_once(base):
    published = changed(base, "model.publish_as", "in-service")
    quantize_model(published)
    again = changed(published, "calibration.seed", 11)
    quantize_model(again)
    quantize_model(published)
    against = {"evaluate_published", "benchmark_published", "compare_with_published", "decide_on_published"}
    found = [notes(config, quantize_model(config).run_id) for config in (again, published, again)]
    assert [against <= {note["stage"] for note in run} for run in found] == [True] * 3
    assert [{note["stage"] for note in run if not note["cached"]} for run in found] == [set()] * 3


def test_the_same_checkpoint_elsewhere_repeats_nothing(base, tmp_path):
    shutil.copy(base.model.checkpoint, tmp_path / "copy.pth")
    assert computed(changed(base, "model.checkpoint", str(tmp_path / "copy.pth"))) == set()


@pytest.mark.parametrize(
    ("library", "expected"),
    [
        slow("pillow", {"draw_calibration_images", "prepare_split"}),
        ("scipy", {"equalize_channels"}),
        slow("onnx-graphsurgeon", {"prepare_model", "equalize_channels", "export_qdq", "validate_graph"}),
        ("boto3", set()),
    ],
)
def test_another_version_of_a_library_repeats_the_stages_that_name_it(base, monkeypatch, library, expected):
    known = provenance._version
    monkeypatch.setattr(provenance, "_version", lambda name: "0.0" if name == library else known(name))
    provenance.library_versions.cache_clear()
    found = computed(base)
    provenance.library_versions.cache_clear()
    assert found == expected
