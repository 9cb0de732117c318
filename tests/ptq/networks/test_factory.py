import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import SmallResNet, small_resnet
from safetensors.torch import save_file
from torch import nn

from ptq.errors import CheckpointError, ExportError, UsageError
from ptq.networks.checkpoint import (
    checkpoint_digest,
    head_size,
    load_weights_,
    read_state_dict,
    read_weights,
    weights_for,
)
from ptq.networks.factory import create_model, factory_digest
from ptq.networks.folding import check_runs, fold_model, require_statistics
from ptq.networks.unfolding import unfolded_state

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_folding_leaves_no_batchnorm_and_the_same_logits():
    model = small_resnet()
    folded = fold_model(model)
    assert folded.traced
    assert not [module for module in folded.module.modules() if isinstance(module, nn.BatchNorm2d)]
    # Folding multiplies weights instead of activations: the same up to float rounding.
    torch.testing.assert_close(folded.module(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_modules_called_by_keyword_are_folded_too():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(input=self.norm(input=self.conv(input=x))).mean((2, 3))

    network = ByKeyword().eval()
    nn.init.uniform_(network.norm.running_mean)
    folded = fold_model(network, input_shape=(3, 16, 16))
    assert [node.target for node in folded.module.graph.nodes if node.op == "call_module"] == ["conv"]
    torch.testing.assert_close(folded.module(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
    state = unfolded_state(network, folded, folded.module)
    torch.testing.assert_close(state["norm.running_mean"], -folded.module.conv.bias)


def test_batchnorm_without_statistics_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ExportError, match="The BatchNorm 1 keeps no running statistics"):
        require_statistics(model)
    require_statistics(small_resnet())


def test_folding_does_not_change_the_model():
    model = small_resnet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fold_model(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_one_channel_stem_replaces_the_first_convolution():
    model = create_model("resnet18", num_classes=2, channels=1)
    assert model.conv1.weight.shape == (64, 1, 7, 7)
    assert model.conv1.bias is None
    assert model.fc.out_features == 2


def test_weights_are_the_same_for_the_same_seed_and_leave_the_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = create_model("resnet18", num_classes=2, channels=1, seed=5)
    assert torch.equal(torch.rand(1), expected)
    second = create_model("resnet18", num_classes=2, channels=1, seed=5)
    assert torch.equal(first.conv1.weight, second.conv1.weight)


def test_an_unknown_network_names_some_that_are_close():
    with pytest.raises(UsageError, match="'resnet51'; torchvision has no such classifier.*resnet50"):
        create_model("resnet51", num_classes=2, channels=3)


def test_a_factory_of_ones_own_is_imported():
    assert isinstance(create_model("networks:SmallResNet", num_classes=7, channels=3), SmallResNet)


def test_a_factory_that_is_not_there_says_so():
    with pytest.raises(UsageError, match="networks:Missing.*cannot be imported"):
        create_model("networks:Missing", num_classes=7, channels=3)


@pytest.mark.parametrize("key", [None, "model_state_dict", "state_dict", "model", "net", "weights", "state_dict_ema"])
def test_a_state_dict_is_found_plain_or_under_the_usual_keys(tmp_path, key):
    state = {f"module.{name}": value for name, value in small_resnet().state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "a.pth")
    assert set(read_state_dict(tmp_path / "a.pth")) == set(small_resnet().state_dict())


NAME = "networks:SmallResNet"


def fits(weights):
    load_weights_(SmallResNet(), weights.state, name=NAME, source="m.pth")
    return weights.notes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "a.b."])
def test_names_below_another_module_are_those_of_the_network(tmp_path, prefix):
    torch.save({f"{prefix}{key}": value for key, value in SmallResNet().state_dict().items()}, tmp_path / "a.pth")
    assert fits(weights_for(tmp_path / "a.pth", name=NAME, channels=3)) == ()


def test_what_a_training_module_has_beside_the_network_is_left_out_and_named(tmp_path):
    state = {f"model.{key}": value for key, value in SmallResNet().state_dict().items()}
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(4)}, "epoch": 3}, tmp_path / "a.ckpt")
    (note,) = fits(weights_for(tmp_path / "a.ckpt", name=NAME, channels=3))
    assert "the weights under model. were taken; 1 others (loss.weight) belong to no layer" in note


def test_options_numbers_and_counters_of_training_scripts_are_no_weights(tmp_path):
    counters = {"total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)}
    content = {
        "model": {**SmallResNet().state_dict(), **counters}, "args": argparse.Namespace(lr=0.1, data=Path("/data")),
        "best": np.float64(0.97), "epoch": np.int64(3), "losses": np.ones(3),
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pth")
    assert fits(weights_for(tmp_path / "a.pth", name=NAME, channels=3)) == ()


@pytest.mark.parametrize(
    ("name", "pattern", "before"),
    [
        ("densenet121", r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2"),
        pytest.param("vit_b_16", r"\.mlp\.0\.", ".mlp.linear_1.", marks=pytest.mark.slow),
    ],
)
def test_names_of_older_releases_become_todays(tmp_path, name, pattern, before):
    state = create_model(name, num_classes=2, channels=3).state_dict()
    older = {re.sub(pattern, before, key): torch.zeros(1) for key in state}
    assert older.keys() != state.keys()
    torch.save(older, tmp_path / "a.pth")
    assert weights_for(tmp_path / "a.pth", name=name, channels=3).state.keys() == state.keys()


def test_an_average_beside_the_weights_is_named_and_taken_where_it_is_alone(tmp_path):
    state = SmallResNet().state_dict()
    average = {key: value * 0.5 for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, tmp_path / "both.pth")
    torch.save({"state_dict_ema": average}, tmp_path / "alone.pth")
    both, alone = (read_weights(tmp_path / name) for name in ("both.pth", "alone.pth"))
    assert torch.equal(both.state["fc.weight"], state["fc.weight"])
    assert "(EMA) under state_dict_ema: state_dict was taken" in both.notes[0]
    assert torch.equal(alone.state["fc.weight"], average["fc.weight"])
    assert "The weights themselves are not there" in alone.notes[0]


def test_safetensors_and_half_precision_become_float32(tmp_path):
    save_file({"fc.weight": torch.ones(2, 2, dtype=torch.float16)}, tmp_path / "a.safetensors")
    assert read_state_dict(tmp_path / "a.safetensors")["fc.weight"].dtype == torch.float32


def test_a_missing_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist"):
        read_state_dict(tmp_path / "none.pth")


def test_a_pickled_model_is_refused_without_running_it(tmp_path):
    torch.save(small_resnet(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no weights that can be read safely"):
        read_state_dict(tmp_path / "a.pth")


def test_a_pickle_of_something_else_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3, "loss": [1.0]}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds a dict with the keys \['epoch', 'loss'\], not a state dict"):
        read_state_dict(tmp_path / "a.pth")


def test_rubbish_is_no_checkpoint(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"a\.pth \(16 bytes\) holds no weights"):
        read_state_dict(tmp_path / "a.pth")


def test_weights_of_another_network_name_the_first_differing_keys():
    state = create_model("mobilenet_v2", num_classes=4, channels=3).state_dict()
    with pytest.raises(CheckpointError, match=r"lacks \d+ keys \(conv1\.weight.*unknown keys \(features\.0\.0\.weight"):
        load_weights_(create_model("resnet18", num_classes=4, channels=3), state, name="resnet18", source="m.pth")


def test_weights_for_other_classes_name_the_head():
    with pytest.raises(CheckpointError, match=r"fc\.weight is \(4, 16\), the model has \(7, 16\)"):
        load_weights_(SmallResNet(num_classes=7), SmallResNet(4).state_dict(), name="small", source="m.pth")


def test_weights_that_are_not_finite_are_refused():
    state = small_resnet().state_dict()
    state["fc.bias"] = torch.tensor([1.0, float("nan"), 0, 0])
    with pytest.raises(CheckpointError, match=r"NaN or infinity in 1 tensors \(fc\.bias\)"):
        load_weights_(small_resnet(), state, name="small", source="m.pth")


def test_the_head_gives_the_number_of_classes():
    state = small_resnet(num_classes=9).state_dict()
    assert head_size(state, name="networks:SmallResNet", channels=3) == 9
    assert head_size(dict(sorted(state.items())), name="networks:SmallResNet", channels=3) == 9


def test_a_checkpoint_without_the_network_s_last_weight_says_what_it_has():
    with pytest.raises(CheckpointError, match=r"no fc\.weight, the last weight of networks:SmallResNet; it has a"):
        head_size({"a": torch.ones(2, 2)}, name="networks:SmallResNet", channels=3)


class Twice(nn.Module):
    """One convolution and one BatchNorm, both called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x):
        for _ in range(2):
            x = torch.relu(self.bn(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class ReadsWhatWasChanged(nn.Module):
    """Its ReLU changes a tensor in place that the add reads afterwards."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.Linear(3, 4)

    def forward(self, x):
        x = x * 1.0
        y = self.relu(x)
        return self.fc((self.conv(y) + x).mean((2, 3)))


def test_a_layer_that_is_called_twice_is_not_folded_twice():
    model = Twice().eval()
    model.bn.running_var.fill_(0.25)
    folded = fold_model(model, input_shape=(3, 16, 16))
    assert folded.traced
    torch.testing.assert_close(folded.module(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


class ChangesAPart(ReadsWhatWasChanged):
    """Changes one channel of a tensor in place, and reads all of it afterwards."""

    def forward(self, x):
        x = x * 1.0
        x[:, :1].relu_()
        return self.fc((self.conv(x) + x).mean((2, 3)))


def test_what_is_changed_in_place_and_read_again_is_read_behind_the_change():
    model = ReadsWhatWasChanged().eval()
    folded = fold_model(model, input_shape=(3, 16, 16))
    assert folded.traced
    torch.testing.assert_close(folded.module(IMAGES), model(IMAGES))


def test_a_model_that_changes_a_part_of_a_tensor_in_place_is_left_as_it_is():
    model = ChangesAPart().eval()
    folded = fold_model(model, input_shape=(3, 16, 16))
    assert not folded.traced
    assert "computes something else" in folded.warning
    torch.testing.assert_close(folded.module(IMAGES), model(IMAGES))


def test_a_network_of_timm_is_asked_for_by_name_and_its_absence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for ask in (lambda name: create_model(name, num_classes=2, channels=3), factory_digest):
        with pytest.raises(UsageError, match=r"model\.name 'timm/resnet18' needs the module timm.*'\.\[timm\]'"):
            ask("timm/resnet18")


def test_timm_is_given_classes_and_channels_and_its_version_is_the_digest(monkeypatch):
    asked = {}
    timm = SimpleNamespace(
        __version__="1.2.3", is_model=lambda name: name == "resnet18", list_models=lambda *pattern: ["resnet18d"],
        create_model=lambda name, **options: asked.update(options, name=name) or small_resnet(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert isinstance(create_model("timm/resnet18", num_classes=7, channels=1), SmallResNet)
    assert asked == {"name": "resnet18", "pretrained": False, "num_classes": 7, "in_chans": 1}
    assert factory_digest("timm/resnet18") == "timm 1.2.3"
    with pytest.raises(UsageError, match=r"'timm/resnet17'; timm 1\.2\.3 has no such network.*resnet18d"):
        create_model("timm/resnet17", num_classes=7, channels=3)


def test_the_sources_of_a_factory_have_a_digest_that_changes_with_them(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_network.py").write_text("first = 1\n")
    before = factory_digest("own_network:build")
    (tmp_path / "own_network.py").write_text("first = 2\n")
    assert factory_digest("own_network:build") != before
    assert factory_digest("resnet50") == ""


def test_a_model_that_cannot_read_the_image_says_what_to_check():
    with pytest.raises(ExportError, match=r"cannot read an image of shape \(1, 16, 16\).*Check crop and channels"):
        check_runs(small_resnet(), input_shape=(1, 16, 16), num_classes=4)


def test_a_model_with_other_outputs_is_no_classifier():
    with pytest.raises(ExportError, match=r"returns \(1, 4\) for one image; expected \(1, 5\)"):
        check_runs(small_resnet(), input_shape=(3, 16, 16), num_classes=5)


def test_a_network_that_asks_for_the_version_of_its_weights_gets_it():
    """MNASNet changed its layers once, and refuses weights without a version."""
    network = create_model("mnasnet0_5", num_classes=2, channels=3)
    load_weights_(
        network,
        dict(create_model("mnasnet0_5", num_classes=2, channels=3, seed=1).state_dict()),
        name="mnasnet0_5",
        source="a.pth",
    )


def in_shards(folder, state):
    """Two files of safetensors and their index, as transformers writes large models."""
    shards = {f"model-0000{number}-of-00002.safetensors": {} for number in (1, 2)}
    for position, (key, value) in enumerate(state.items()):
        shards[list(shards)[position % 2]][key] = value.contiguous()
    for file, part in shards.items():
        save_file(part, folder / file)
    weight_map = {key: file for file, part in shards.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_weights_in_several_files_are_read_by_their_index_and_by_their_folder(tmp_path):
    state = small_resnet().state_dict()
    in_shards(tmp_path, state)
    for path in (tmp_path / "model.safetensors.index.json", tmp_path):
        found = read_state_dict(path)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], value) for key, value in state.items())
        before = checkpoint_digest(path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"other")
    assert checkpoint_digest(tmp_path) != before


def test_one_file_in_a_folder_is_taken_before_an_index(tmp_path):
    in_shards(tmp_path, {"a": torch.zeros(1), "b": torch.zeros(1)})
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path)["a"] == 1


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "absent.safetensors"}}, r"of which 1 are absent \(absent\.safetensors\)"),
        ({"weight_map": {"a": "../other.safetensors"}}, r"it names \.\./other\.safetensors"),
        ({"weight_map": {"a": "code.bin"}}, "it names code.bin"),
        ({"weight_map": {}}, "is no index"),
        ({"weight_map": ["a"]}, "is no index"),
        ({}, "KeyError 'weight_map'"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(tmp_path, index, says):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=says):
        read_state_dict(tmp_path)


def test_a_folder_without_weights_says_what_is_expected(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist.*a folder of transformers"):
        read_state_dict(tmp_path)
