import pytest

from ptq.config import PtqConfig, TrainingConfig
from ptq.config_file import config_from_mapping, load_yaml
from ptq.errors import UsageError

MODEL = {"model": {"name": "resnet18", "checkpoint": "a.pth"}, "data": {"path": "images"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gates": {}}, "gates is not a known key, expected one of model, data, quantization, calibration, engine"),
        ({"calibration": {"image": 3}}, "calibration.image is not a known key, expected one of methods, trials, imag"),
        (
            {"data": {"path": "images", "preprocessing": {"rezise": 32}}},
            "data.preprocessing.rezise is not a known key, expected one of channels, resize, crop, interpolation",
        ),
        ({"data": {}}, "data.path is missing"),
        ({"calibration": {"trials": 0}}, "calibration.trials is 0: Input should be greater than or equal to 1"),
        ({"gate": {"max_drop_pp": 101}}, "gate.max_drop_pp is 101: Input should be less than or equal to 100"),
        ({"engine": {"name": "tvm"}}, "engine.name is 'tvm': Input should be 'auto', 'openvino', 'tensorrt' or 'onnx"),
        ({"engine": 5}, "engine is 5: Input should be a valid dictionary"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_with_what_is_allowed(content, message):
    with pytest.raises(UsageError, match="^The file cannot be used: ") as raised:
        config_from_mapping(PtqConfig, {**MODEL, **content}, source="The file")
    assert message in str(raised.value)


def test_three_faults_are_described_and_the_rest_counted():
    content = {"epochs": 0, "batch_size": 1, "learning_rate": 0, "seed": -1, "data": {"path": "images"}}
    with pytest.raises(UsageError, match=r"epochs is 0: .*; batch_size is 1: .*; learning_rate is 0: .* \(1 more\)\."):
        config_from_mapping(TrainingConfig, content, source="The options given")


def test_a_mapping_that_fits_is_a_config():
    assert config_from_mapping(PtqConfig, MODEL, source="The file") == PtqConfig.model_validate(MODEL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "c.yaml cannot be read: No such file or directory. Give an existing YAML file."),
        (b"a: [", "c.yaml is not valid YAML"),
        (b"\xff\xfe\xff", "c.yaml is not UTF-8 text"),
        (b"- 3", "c.yaml holds a list; expected a mapping with the sections model, data, ..."),
    ],
)
def test_a_file_that_is_no_config_says_what_was_expected(content, message, tmp_path):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        load_yaml(path)
    assert message in str(raised.value)
