import json

import pytest
from onnx import TensorProto
from onnx_networks import small_graph

from ptq.config import PtqConfig
from ptq.errors import UsageError
from ptq.networks.preprocessing import with_own_preprocessing

V1, V2 = "resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"


def config(checkpoint, name="resnet50", **preprocessing):
    model = {"name": name, "checkpoint": checkpoint} if name else {"checkpoint": checkpoint}
    return PtqConfig.model_validate({"model": model, "data": {"path": "images", "preprocessing": preprocessing}})


@pytest.mark.parametrize(("file", "resize", "top1"), [(V1, 256, 76.13), (f"s3://models/{V2}", 232, 80.858)])
def test_a_file_of_torchvision_has_the_preprocessing_that_torchvision_states(file, resize, top1):
    found, own = with_own_preprocessing(config(file))
    assert (found.data.preprocessing.resize, found.data.preprocessing.crop) == (resize, 224)
    assert "torchvision" in own.source
    assert own.top1_percent == top1


@pytest.mark.parametrize(("file", "name"), [("mine.pth", "resnet50"), (V2, "resnet18"), (V2, "package.module:factory")])
def test_of_other_weights_nobody_states_anything(file, name):
    before = config(file, name)
    assert with_own_preprocessing(before) == (before, None)


def test_what_is_set_stays():
    found, _ = with_own_preprocessing(config(V2, resize=300, mean=[0.5]))
    kept = found.data.preprocessing
    assert (kept.resize, kept.crop, kept.mean) == (300, 224, (0.5, 0.5, 0.5))
    assert kept.std == (0.229, 0.224, 0.225)


def test_a_grey_network_keeps_its_mean_and_std():
    found, _ = with_own_preprocessing(config(V2, channels=1, mean=[0.4], std=[0.2]))
    kept = found.data.preprocessing
    assert (kept.resize, kept.channels, kept.mean, kept.std) == (232, 1, (0.4,), (0.2,))


def beside(folder, **content):
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return config(str(folder / "model.onnx"), name=None)


NORMAL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 3}


@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [
        ({"size": {"height": 224, "width": 224}}, 224, 224),
        ({"size": 224}, 224, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 256, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, 256, 256),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 256, 224),
    ],
)
def test_a_file_of_transformers_beside_an_onnx_file_states_it(tmp_path, size, resize, crop):
    found, own = with_own_preprocessing(beside(tmp_path, **NORMAL, **size))
    taken = found.data.preprocessing
    assert (taken.resize, taken.crop, taken.interpolation) == (resize, crop, "bicubic")
    assert (taken.mean, taken.std) == ((0.5,) * 3, (0.25,) * 3)
    assert str(tmp_path) in own.source


def test_images_that_are_not_normalized_keep_their_values(tmp_path):
    found, _ = with_own_preprocessing(beside(tmp_path, size=224, do_normalize=False))
    assert (found.data.preprocessing.mean, found.data.preprocessing.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("content", [{}, {**NORMAL, "size": "large"}, {**NORMAL, "size": 224, "resample": 9}])
def test_a_file_of_transformers_that_states_something_else_is_refused(tmp_path, content):
    with pytest.raises(UsageError, match=r"preprocessor_config\.json cannot be read"):
        with_own_preprocessing(beside(tmp_path, **content))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8])
def test_an_onnx_file_states_nothing_unless_it_reads_pixels(tmp_path, kind):
    path = small_graph().save(tmp_path / "model.onnx", kind=kind)
    found, own = with_own_preprocessing(config(str(path), name=None))
    taken = found.data.preprocessing
    if kind == TensorProto.FLOAT:
        assert own is None
    else:
        assert (taken.mean, taken.std) == ((0.0,) * 3, (1 / 255,) * 3)
        assert "reads pixels" in own.source


def test_a_folder_of_transformers_has_its_own_file_and_its_own_weights(tmp_path):
    beside(tmp_path, **NORMAL, size=224)
    before = PtqConfig.model_validate({"model": {"name": f"hf/{tmp_path}"}, "data": {"path": "images"}})
    assert before.model.checkpoint == str(tmp_path)
    assert with_own_preprocessing(before)[0].data.preprocessing.std == (0.25,) * 3


def test_timm_states_it_for_each_of_its_networks():
    pytest.importorskip("timm", reason="the extra timm is not installed")
    found, own = with_own_preprocessing(config("mine.pth", name="timm/efficientnet_b0"))
    taken = found.data.preprocessing
    assert (taken.resize, taken.crop, taken.interpolation) == (256, 224, "bicubic")
    assert own.top1_percent is None
