"""Does the installed pytorch-quantization compute what its published tutorial prints?"""

import pytest
import torch

# pytorch-quantization 2.1.3 decorates a function with torch.jit.script, which torch 2.13 deprecates, when it is first
# imported in a process. To be removed with pytorch-quantization itself.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated:DeprecationWarning")


@pytest.fixture
def tensor_quant():
    from pytorch_quantization import tensor_quant

    return tensor_quant


@pytest.fixture
def values():
    state = torch.random.get_rng_state()
    torch.manual_seed(12345)
    yield torch.rand(10)
    torch.random.set_rng_state(state)


def test_fake_quantization_gives_the_numbers_of_the_tutorial(tensor_quant, values):
    expected = [0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359, 0.2109]
    # The tutorial prints four decimals.
    assert tensor_quant.fake_tensor_quant(values, values.abs().max()).tolist() == pytest.approx(expected, abs=5.1e-5)


def test_quantization_gives_the_integers_and_the_inverse_scale_of_the_tutorial(tensor_quant, values):
    integers, inverse_scale = tensor_quant.tensor_quant(values, values.abs().max())
    assert integers.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    # The library calls 127 / amax the scale; it is the inverse of ONNX's.
    assert inverse_scale.item() == pytest.approx(128.0057, abs=5.1e-5)


def test_the_inverse_scale_is_127_over_the_largest_value(tensor_quant, values):
    _, inverse_scale = tensor_quant.tensor_quant(values, values.abs().max())
    assert inverse_scale.item() == (127.0 / values.abs().max()).item()
