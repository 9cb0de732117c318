"""Do attention blocks that call their projections compute what the originals compute?"""

import pytest
import torch
from torch import nn

from ptq.networks.attention import original_name
from ptq.networks.factory import create_model
from ptq.networks.folding import fold_model
from ptq.networks.unfolding import unfolded_state
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of
from tests.support.networks import PLACEMENT, small_vision_transformer

GENERATOR = torch.Generator()


def images(side):
    return torch.randn(2, 3, side, side, generator=GENERATOR.manual_seed(3))


def with_large_weights(model, *, seed=0):
    """Gives biases, position tables and heads weights that matter."""
    generator = GENERATOR.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "relative" in name or not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        elif parameter.ndim == 2:
            parameter.data *= 2
    return model.eval()


@pytest.fixture(scope="module")
def vision_transformer():
    return with_large_weights(small_vision_transformer())


@pytest.fixture(scope="module", params=[pytest.param("swin_t", marks=pytest.mark.slow), "swin_v2_t"])
def swin(request):
    return with_large_weights(create_model(request.param, num_classes=5, channels=3))


def test_a_vision_transformer_computes_the_same_logits_with_explicit_projections(vision_transformer):
    folded = fold_model(vision_transformer, input_shape=(3, 32, 32))
    assert folded.traced
    # The fused kernel of nn.MultiheadAttention adds in another order.
    torch.testing.assert_close(folded.module(images(32)), vision_transformer(images(32)), rtol=1e-4, atol=1e-5)


# 64 pixels: every window covers the picture. 112: windows are shifted and masked. 100: the picture is padded.
@pytest.mark.parametrize("side", [100, *(pytest.param(side, marks=pytest.mark.slow) for side in (64, 112))])
def test_a_swin_transformer_computes_the_same_logits_with_explicit_projections(swin, side):
    folded = fold_model(swin, input_shape=(3, side, side))
    assert folded.traced
    torch.testing.assert_close(folded.module(images(side)), swin(images(side)), rtol=1e-4, atol=1e-5)


def test_every_linear_layer_of_a_vision_transformer_gets_quantizers(vision_transformer):
    folded = fold_model(vision_transformer)
    plan = place_quantizers(view_of(folded.module), **PLACEMENT)
    block = "encoder.layers.encoder_layer_1"
    assert plan.float_layers == ()
    assert len(plan.quantized_layers) == 1 + 2 * 4 + 1
    assert {f"{block}.self_attention.in_proj", f"{block}.self_attention.out_proj", f"{block}.mlp.0"} < set(
        plan.quantized_layers
    )


def test_every_linear_layer_of_a_swin_transformer_gets_quantizers(swin):
    plan = place_quantizers(view_of(fold_model(swin).module), **PLACEMENT)
    own = [name for name, module in swin.named_modules()
           if isinstance(module, nn.Linear | nn.Conv2d) and "cpb_mlp" not in name]  # fmt: skip
    assert sorted(plan.quantized_layers) == sorted(own)


def test_folding_leaves_the_model_with_its_own_attention(vision_transformer):
    fold_model(vision_transformer)
    assert isinstance(vision_transformer.encoder.layers[0].self_attention, nn.MultiheadAttention)


def test_changed_projections_become_a_checkpoint_of_the_original(vision_transformer):
    folded = fold_model(vision_transformer)
    changed = fold_model(vision_transformer).module
    name = "encoder.layers.encoder_layer_0.self_attention"
    changed.get_submodule(f"{name}.in_proj").weight.data *= 1.5

    state = unfolded_state(vision_transformer, folded, changed)

    expected = vision_transformer.state_dict()
    assert state.keys() == expected.keys()
    torch.testing.assert_close(state[f"{name}.in_proj_weight"], 1.5 * expected[f"{name}.in_proj_weight"])
    torch.testing.assert_close(state[f"{name}.out_proj.weight"], expected[f"{name}.out_proj.weight"])


def test_a_changed_swin_is_a_checkpoint_of_the_original(swin):
    folded = fold_model(swin)
    changed = fold_model(swin).module
    changed.get_submodule("features.1.0.attn.qkv").weight.data *= 1.5
    before = {name: value.clone() for name, value in swin.state_dict().items()}

    swin.load_state_dict(unfolded_state(swin, folded, changed))
    found = swin(images(64))
    swin.load_state_dict(before)

    torch.testing.assert_close(found, changed(images(64)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(swin(images(64)), found, rtol=1e-4, atol=1e-5)


class Masked(nn.Module):
    """Attention that sees only what came before, which is left to the original block."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("mask", torch.triu(torch.full((16, 16), float("-inf")), diagonal=1))

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x, attn_mask=self.mask, need_weights=False)
        return self.fc(x.mean(1))


def test_attention_with_a_mask_stays_as_it_is():
    model = with_large_weights(Masked())
    folded = fold_model(model, input_shape=(3, 32, 32))
    assert folded.traced
    assert isinstance(folded.module.attention, nn.MultiheadAttention)
    torch.testing.assert_close(folded.module(images(32)), model(images(32)), rtol=1e-4, atol=1e-5)


def test_a_parameter_that_the_original_does_not_have_has_no_name_there():
    assert original_name("attn.position_bias", {"attn.qkv.weight": 1}) is None
    assert original_name("attn.qkv.weight", {"attn.qkv.weight": 1}) == "attn.qkv.weight"
    assert original_name("a.in_proj.bias", {"a.in_proj_bias": 1}) == "a.in_proj_bias"
