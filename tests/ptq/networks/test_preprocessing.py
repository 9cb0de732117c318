import json

import pytest
from onnx import TensorProto
from onnx_networks import small_graph

from ptq.config import PtqConfig
from ptq.errors import UsageError
from ptq.networks.preprocessing import own_preprocessing, with_own_preprocessing


def taken(settings):
    """The preprocessing that is used, and what states it."""
    own = own_preprocessing(settings.model)
    return with_own_preprocessing(settings.data, own).preprocessing, own


V1, V2 = "resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"


def config(checkpoint, name="resnet50", **preprocessing):
    model = {"name": name, "checkpoint": checkpoint} if name else {"checkpoint": checkpoint}
    return PtqConfig.model_validate({"model": model, "data": {"path": "images", "preprocessing": preprocessing}})


@pytest.mark.parametrize(("file", "resize", "top1"), [(V1, 256, 76.13), (f"s3://models/{V2}", 232, 80.858)])
def test_a_file_of_torchvision_has_the_preprocessing_that_torchvision_states(file, resize, top1):
    used, own = taken(config(file))
    assert (used.resize, used.crop) == (resize, 224)
    assert "torchvision" in own.source
    assert own.top1_percent == top1


@pytest.mark.parametrize(("file", "name"), [("mine.pth", "resnet50"), (V2, "resnet18"), (V2, "package.module:factory")])
def test_of_other_weights_nobody_states_anything(file, name):
    before = config(file, name)
    assert taken(before) == (before.data.preprocessing, None)


def test_what_is_set_stays():
    used, _ = taken(config(V2, resize=300, mean=[0.5]))
    assert (used.resize, used.crop, used.mean) == (300, 224, (0.5, 0.5, 0.5))
    assert used.std == (0.229, 0.224, 0.225)


def test_a_grey_network_keeps_its_mean_and_std():
    used, _ = taken(config(V2, channels=1, mean=[0.4], std=[0.2]))
    assert (used.resize, used.channels, used.mean, used.std) == (232, 1, (0.4,), (0.2,))


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
        ({"size": {"shortest_edge": 224}, "crop_size": 224, "crop_pct": 0.9}, 248, 224),
        ({"size": {"shortest_edge": 224}, "image_processor_type": "ConvNextImageProcessor"}, 256, 224),
        (
            {"size": {"shortest_edge": 384}, "crop_pct": 0.875, "image_processor_type": "ConvNextImageProcessor"},
            384,
            384,
        ),
        ({"size": {"shortest_edge": 224}, "crop_size": 224, "image_processor_type": "LevitImageProcessor"}, 256, 224),
    ],
)
def test_a_file_of_transformers_beside_an_onnx_file_states_it(tmp_path, size, resize, crop):
    used, own = taken(beside(tmp_path, **NORMAL, **size))
    assert (used.resize, used.crop, used.interpolation) == (resize, crop, "bicubic")
    assert (used.mean, used.std) == ((0.5,) * 3, (0.25,) * 3)
    assert str(tmp_path) in own.source


def test_images_that_are_not_normalized_keep_their_values(tmp_path):
    used, _ = taken(beside(tmp_path, size=224, do_normalize=False))
    assert (used.mean, used.std) == ((0.0,) * 3, (1.0,) * 3)


def test_who_divides_twice_has_the_square_of_std(tmp_path):
    assert taken(beside(tmp_path, **NORMAL, size=224, include_top=True))[0].std == (0.0625,) * 3


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {**NORMAL, "size": "large"},
        {**NORMAL, "size": 224, "resample": 9},
        {**NORMAL, "size": {"height": 224, "width": 384}},
        {**NORMAL, "size": 224, "do_flip_channel_order": True},
        {**NORMAL, "size": 224, "do_rescale": False},
        {**NORMAL, "size": 224, "rescale_factor": 1 / 127.5},
    ],
)
def test_a_file_of_transformers_that_states_something_else_is_refused(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"preprocessor_config\.json cannot be done"):
        taken(config(str(tmp_path / "model.onnx"), name=None))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_onnx_file_that_reads_pixels_gets_them(tmp_path, channels):
    path = small_graph().save(tmp_path / "model.onnx", kind=TensorProto.UINT8)
    grey = {"channels": 1, "mean": [0.0], "std": [1 / 255]} if channels == 1 else {}
    used, own = taken(config(str(path), name=None, **grey))
    assert (used.mean, used.std) == ((0.0,) * channels, (1 / 255,) * channels)
    assert "reads pixels" in own.source


def test_another_mean_for_a_file_that_reads_pixels_is_refused(tmp_path):
    path = small_graph().save(tmp_path / "model.onnx", kind=TensorProto.UINT8)
    with pytest.raises(UsageError, match=r"reads pixels, normalises them itself, and mean is \[0\.5.*leave both out"):
        taken(config(str(path), name=None, mean=[0.5], std=[0.5]))


def test_an_onnx_file_alone_states_nothing(tmp_path):
    path = small_graph().save(tmp_path / "model.onnx")
    assert taken(config(str(path), name=None))[1] is None


def test_a_folder_of_transformers_has_its_own_file_and_its_own_weights(tmp_path):
    beside(tmp_path, **NORMAL, size=224)
    before = PtqConfig.model_validate({"model": {"name": f"hf/{tmp_path}"}, "data": {"path": "images"}})
    assert before.model.checkpoint == str(tmp_path)
    assert taken(before)[0].std == (0.25,) * 3


def test_timm_states_it_for_each_of_its_networks():
    pytest.importorskip("timm", reason="the extra timm is not installed")
    used, own = taken(config("mine.pth", name="timm/efficientnet_b0"))
    assert (used.resize, used.crop, used.interpolation) == (256, 224, "bicubic")
    assert own.top1_percent is None
