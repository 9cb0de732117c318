import pytest
import torch
from networks import (
    PLACEMENT,
    Inception,
    Mixer,
    PermutedIntoLayer,
    PermutedLogits,
    PoolBesideGate,
    SecondConvNeXt,
    Untraceable,
    small_convnext,
    small_densenet,
    small_resnet,
    small_swin,
    small_vision_transformer,
)
from torch import nn

from ptq.errors import UsageError
from ptq.networks.factory import create_model
from ptq.networks.folding import fold_model
from ptq.quantization.rules import identity_operand, place_quantizers, residual_adds
from ptq.quantization.torch_view import view_of


def plan_of(model, **options):
    folded = fold_model(model)
    return place_quantizers(view_of(folded.module, traced=folded.traced), **{**PLACEMENT, **options})


def spec(plan, name):
    return next(quantizer for quantizer in plan.quantizers if quantizer.name == name)


def test_every_layer_of_a_resnet_reads_quantized_input_and_weight():
    plan = plan_of(small_resnet())
    assert set(plan.quantized_layers) == {
        "conv1", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block2.downsample.0", "fc",
    }  # fmt: skip
    assert {weight.readers[0] for weight in plan.weights} == set(plan.quantized_layers)


def test_the_identity_of_a_residual_add_shares_the_quantizer_of_the_convolution_beside_it():
    plan = plan_of(small_resnet())
    assert spec(plan, "maxpool").readers == ("maxpool",)
    assert spec(plan, "maxpool").tensors == ("relu",)


def test_the_downsample_branch_is_quantized_and_the_other_stays_bare():
    plan = plan_of(small_resnet())
    quantized = {tensor for activation in plan.activations for tensor in activation.tensors}
    assert "block2_downsample_0" in quantized
    assert "block2_conv2" not in quantized
    assert (plan.residual_adds, plan.quantized_residual_adds) == (2, 2)


def test_without_residuals_no_add_has_a_quantized_operand():
    plan = plan_of(small_resnet(), residuals=False)
    assert plan.quantized_residual_adds == 0
    assert "block2_downsample_0" not in {tensor for activation in plan.activations for tensor in activation.tensors}


def test_without_commuting_pools_the_quantizer_sits_behind_the_pool():
    plan = plan_of(small_resnet(), commuting_pools=False)
    assert spec(plan, "maxpool").tensors == ("maxpool",)
    assert spec(plan, "maxpool").readers == ("block1_conv1", "add")


def test_the_average_pool_reads_quantized_input_only_if_asked():
    assert "avgpool" in spec(plan_of(small_resnet()), "block2_relu_1").readers
    assert all("avgpool" not in a.readers for a in plan_of(small_resnet(), pools=False).activations)


def test_first_and_last_layer_can_stay_in_float():
    plan = plan_of(small_resnet(), first_layer=False, last_layer=False)
    assert plan.float_layers == ("conv1", "fc")
    assert "conv1" not in plan.quantized_layers


def test_an_unknown_layer_to_skip_lists_those_there_are():
    with pytest.raises(UsageError, match=r"skip_layers names layer9; the model has no such layer.*conv1"):
        plan_of(small_resnet(), skip_layers=("layer9",))


def test_skipping_every_layer_is_refused():
    layers = plan_of(small_resnet()).quantized_layers
    with pytest.raises(UsageError, match="No layer is left to quantize"):
        plan_of(small_resnet(), skip_layers=layers)


@pytest.mark.parametrize(
    ("name", "adds"), [("resnet18", 8), ("resnet50", 16), ("mobilenet_v2", 10), ("regnet_y_400mf", 16)]
)
def test_every_residual_add_of_a_torchvision_network_gets_exactly_one_quantized_operand(name, adds):
    view = view_of(fold_model(create_model(name, num_classes=10, channels=3)).module)
    plan = place_quantizers(view, **PLACEMENT)
    found = residual_adds(view, plan.quantized_layers)
    assert len(found) == adds
    for add in found:
        reads = [a for a in plan.activations if add.name in a.readers]
        # A pool between quantizer and add passes the quantized value on.
        through_pool = [
            a for a in plan.activations
            if any(reader in [operand.name for operand in add.inputs] for reader in a.readers)
            and "pool" in a.readers[0]
        ]  # fmt: skip
        assert len(reads) + len(through_pool) == 1
        assert identity_operand(add) in add.inputs


def test_in_mobilenet_v2_the_operand_from_which_the_other_is_computed_is_the_identity():
    add = residual_adds(view_of(fold_model(create_model("mobilenet_v2", num_classes=10, channels=3)).module), ())[0]
    assert identity_operand(add).name == "features_2_conv_2"


def test_the_operands_of_a_concat_share_one_quantizer():
    folded = fold_model(create_model("squeezenet1_1", num_classes=10, channels=3))
    plan = place_quantizers(view_of(folded.module, traced=folded.traced), **PLACEMENT)
    shared = [activation for activation in plan.activations if len(activation.tensors) > 1]
    assert len(shared) == 8
    assert all(len(activation.tensors) == 2 and activation.never_negative for activation in shared)


def test_all_that_a_dense_block_concatenates_shares_one_quantizer():
    plan = plan_of(small_densenet().eval())
    first, second = (activation for activation in plan.activations if len(activation.tensors) > 1)
    layer = "features_denseblock1_denselayer{}_conv2"
    # The pool commutes with its quantizer; the last concat holds every operand, so that its range serves all.
    assert first.tensors == ("features_relu0", *(layer.format(number) for number in (1, 2, 3)))
    assert first.readers == ("cat", "cat_1", "cat_2", "cat_3", "features_pool0")
    assert first.observed == "cat_3"
    assert not first.never_negative
    assert second.tensors[0] == "features_transition1_pool"
    assert len(second.tensors) == 3


def test_without_commuting_pools_a_dense_block_is_quantized_behind_its_pool():
    plan = plan_of(small_densenet().eval(), commuting_pools=False)
    assert spec(plan, "cat_3").tensors[0] == "features_pool0"


@pytest.mark.parametrize("build", [small_vision_transformer, small_swin])
def test_the_adds_of_transformers_stay_in_float(build):
    plan = plan_of(build().eval())
    assert (plan.residual_adds, plan.quantized_residual_adds) == (0, 0)
    assert not [reader for activation in plan.activations for reader in activation.readers if "add" in reader]


def test_an_identity_that_a_convolution_reads_is_read_quantized_by_the_add_as_in_convnext():
    plan = plan_of(small_convnext().eval())
    assert plan.quantized_residual_adds == plan.residual_adds == 3
    # The first block's is quantized before the permutation that both read it behind.
    shared = [set(quantizer.readers) for quantizer in plan.activations if any("add" in r for r in quantizer.readers)]
    assert shared == [{"add_1", "features_3_0_block_0"}, {"add_2", "features_3_1_block_0"}]


def test_what_a_layer_hands_to_a_permutation_alone_is_quantized_before_it():
    assert spec(plan_of(Permuted().eval()), "depthwise").readers == ("permute",)
    plan = plan_of(small_convnext().eval())
    linear = [name for name in plan.quantized_layers if name.endswith("block.5")]
    assert all(spec(plan, name.replace(".", "_")).readers[0].startswith("permute") for name in linear)
    assert len(linear) == 3


def test_what_a_residual_add_hands_to_a_permutation_alone_is_quantized_before_it():
    plan = plan_of(small_convnext().eval())
    assert spec(plan, "add").readers == ("permute_4",)
    kept = plan_of(small_convnext().eval(), residuals=False)
    assert "add" not in {quantizer.name for quantizer in kept.activations}


def test_a_layer_in_float_hands_floats_to_a_permutation():
    plan = plan_of(Permuted().eval(), first_layer=False)
    assert "depthwise" not in {quantizer.name for quantizer in plan.activations}


def readers(plan):
    return {quantizer.name: quantizer.readers for quantizer in plan.activations}


def test_a_residual_add_reads_one_operand_quantized_where_the_other_is_a_permutation_of_what_a_layer_writes():
    plan = plan_of(SecondConvNeXt().eval())
    assert "narrow" not in readers(plan)
    assert readers(plan)["stem"] == ("depthwise", "add")
    assert (plan.residual_adds, plan.quantized_residual_adds) == (1, 1)


def test_an_identity_whose_convolution_stays_in_float_stays_in_float():
    plan = plan_of(SecondConvNeXt().eval(), skip_layers=("depthwise",))
    assert "stem" not in readers(plan)
    assert plan.residual_adds == 0


def test_an_add_that_stays_in_float_reads_floats_through_a_permutation_too():
    assert "tokens" not in readers(plan_of(Mixer().eval()))


def test_what_a_layer_reads_of_a_permutation_has_one_quantizer():
    plan = plan_of(PermutedIntoLayer().eval())
    assert spec(plan, "permute").tensors == ("conv",)
    assert "conv" not in readers(plan)
    assert "conv" not in readers(plan_of(PermutedIntoLayer().eval(), commuting_pools=False))


def test_logits_stay_in_float_behind_a_permutation_too():
    assert "head" not in readers(plan_of(PermutedLogits().eval()))


def test_a_quantizer_goes_before_a_pool_that_another_pool_reads_beside_its_layers():
    assert spec(plan_of(Inception().eval()), "max_pool2d").tensors == ("relu",)


def test_a_permutation_in_a_dense_block_leaves_its_shared_quantizer_alone():
    shared = next(found for found in plan_of(PermutedDense().eval()).activations if len(found.tensors) > 1)
    assert len(shared.tensors) == 3
    assert len(shared.readers) == 2


def test_a_permutation_commutes_with_the_quantizer_behind_it():
    plan = plan_of(Permuted().eval())
    assert spec(plan, "permute_1").tensors == ("layer_norm",)
    behind = plan_of(Permuted().eval(), commuting_pools=False)
    assert spec(behind, "permute_1").tensors == ("permute_1",)


def test_a_permutation_that_an_operation_in_float_reads_too_keeps_its_quantizer_behind_it():
    assert spec(plan_of(Permuted(reads_twice=True).eval()), "permute_1").tensors == ("permute_1",)


def test_a_shortcut_that_is_cut_and_padded_from_a_quantized_tensor_shares_its_quantizer():
    plan = plan_of(ZeroPadded().eval())
    assert spec(plan, "relu").readers == ("conv", "getitem")
    assert plan.quantized_residual_adds == 1


@pytest.mark.parametrize(
    "pad",
    [nn.ZeroPad2d((0, 0, 1, 1)), nn.ConstantPad2d((0, 0, 1, 1), 0.0),
     lambda x: torch.constant_pad_nd(x, (0, 0, 1, 1), 0.0)],
)  # fmt: skip
def test_zeros_may_be_padded_by_whatever_name(pad):
    assert spec(plan_of(ZeroPadded(pad=pad).eval()), "relu").readers == ("conv", "getitem")


def test_a_module_that_pads_with_other_numbers_does_not_commute():
    plan = plan_of(ZeroPadded(pad=nn.ConstantPad2d((0, 0, 1, 1), 2.0)).eval())
    assert spec(plan, "relu").readers == ("conv",)


@pytest.mark.parametrize("options", [{"value": 1.0}, {"mode": "replicate"}], ids=str)
def test_a_shortcut_that_is_padded_with_other_numbers_has_a_quantizer_of_its_own(options):
    plan = plan_of(ZeroPadded(**options).eval())
    assert spec(plan, "relu").readers == ("conv",)
    assert spec(plan, "pad").readers == ("add",)


class ZeroPadded(nn.Module):
    """A residual block whose shortcut is a slice of what its convolution reads, with rows added around it."""

    def __init__(self, pad=None, **options):
        super().__init__()
        self.pad = pad or (lambda x: nn.functional.pad(x, (0, 0, 1, 1), **options))
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return (self.conv(x) + self.pad(x[:, :, 1:-1])).mean((2, 3))


class PermutedDense(nn.Module):
    """Two concats, the second of which reads again what the first one reads, a permutation among it."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        moved = nn.functional.gelu(x).permute(0, 1, 3, 2)
        rectified = torch.relu(x + 1.0)
        grown = torch.relu(self.first(torch.sigmoid(torch.cat([moved, rectified], 1))))
        return self.second(torch.sigmoid(torch.cat([moved, rectified, grown], 1))).mean((2, 3))


class Permuted(nn.Module):
    """A depthwise convolution, a LayerNorm over channels, and a convolution."""

    def __init__(self, reads_twice=False):
        super().__init__()
        self.reads_twice = reads_twice
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.depthwise(x).permute(0, 2, 3, 1)
        x = torch.nn.functional.layer_norm(x, (3,)).permute(0, 3, 1, 2)
        last = self.last(x)
        return last.mean((2, 3)) + x.sum() if self.reads_twice else last.mean((2, 3))


class Means(nn.Module):
    """A mean over the pixels is a global average pool, one over the channels is not."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = x.mul(torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))
        x = torch.relu(x - x.mean(1, keepdim=True))
        return self.fc(x.mean([2, 3]) + torch.mean(x, dim=(-1, -2)))


def test_a_mean_over_height_and_width_is_an_average_pool():
    plan = plan_of(Means())
    readers = [reader for activation in plan.activations for reader in activation.readers]
    assert sorted(readers) == ["conv", "fc", "gate", "mean", "mean_2", "mean_3", "mul"]


def test_a_gate_multiplies_what_its_pool_reads_by_one_quantizer():
    (spec,) = [spec for spec in plan_of(Means()).activations if "mean" in spec.readers]
    assert (spec.tensors, spec.readers) == (("relu",), ("mean", "mul"))
    readers = [reader for spec in plan_of(Means(), pools=False).activations for reader in spec.readers]
    assert "mul" not in readers


def test_a_multiplication_that_does_not_follow_the_pool_stays_in_float():
    readers = [spec.readers for spec in plan_of(PoolBesideGate()).activations]
    assert readers == [("conv",), ("pool",), ("pool_1",), ("fc",)]


def test_what_stays_in_float_by_choice_is_named_by_its_operators():
    assert plan_of(small_resnet()).float_operators == ()
    assert plan_of(small_resnet(), residuals=False).float_operators == ("Add",)
    assert "GlobalAveragePool" in plan_of(small_resnet(), pools=False).float_operators


def test_a_model_that_cannot_be_traced_keeps_its_adds_in_float_and_says_so():
    folded = fold_model(Untraceable())
    assert not folded.traced
    assert "Untraceable cannot be traced" in folded.warning
    plan = plan_of(Untraceable())
    assert plan.quantized_layers == ("conv", "fc")
    assert [activation.name for activation in plan.activations] == ["conv", "fc"]
    assert plan.warnings
