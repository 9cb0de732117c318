import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_quantization.calib import histogram as reference
from pytorch_quantization.tensor_quant import fake_tensor_quant

from ptq.config import METHODS, LabelledMethod
from ptq.errors import CalibrationError
from ptq.numerics.amax import amax_from_histograms, amax_from_weight, entropy_bin, mse_bin, percentile_bins
from ptq.numerics.histogram import empty_histograms, histograms_of

INT8, UINT8 = np.array([127]), np.array([255])


def activations(kind, seed=0):
    generator = np.random.default_rng(seed)
    if kind == "relu":
        return np.maximum(generator.standard_normal(60_000), 0).astype(np.float32)
    if kind == "heavy-tailed":
        return np.abs(generator.standard_t(3, 60_000)).astype(np.float32)
    return generator.uniform(0, 3, 60_000).astype(np.float32)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("kind", ["relu", "heavy-tailed", "uniform"])
def test_entropy_chooses_the_bin_of_the_reference_library(kind, unsigned):
    counts, edges = np.histogram(activations(kind), bins=512)
    expected = reference._compute_amax_entropy(counts.copy(), edges, 8, unsigned)
    (found,) = entropy_bin(counts[None], bounds=UINT8 if unsigned else INT8)
    assert np.float32(edges[found]) == np.float32(expected)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("kind", ["relu", "heavy-tailed", "uniform"])
def test_mse_chooses_the_bin_of_the_reference_formula(kind, unsigned):
    # The library's own loop, which calls .cuda(), on the CPU and in double precision.
    counts, edges = np.histogram(activations(kind), bins=512)
    centres = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    weights = torch.from_numpy(counts).double()
    errors = [
        float(((fake_tensor_quant(centres, centres[i], 8, unsigned) - centres) ** 2 * weights).mean())
        for i in range(128, len(centres))
    ]
    assert mse_bin(counts[None], bounds=UINT8 if unsigned else INT8).tolist() == [128 + int(np.argmin(errors))]


def test_percentile_100_never_clips_an_observed_value():
    assert percentile_bins(np.array([[1, 1, 1, 1]]), percentiles=[100.0]).tolist() == [[4]]


def test_percentile_returns_the_upper_edge_of_the_bin_that_holds_the_share():
    assert percentile_bins(np.array([[6, 3, 1], [1, 0, 9]]), percentiles=[60.0]).tolist() == [[1], [3]]


def test_several_percentiles_are_those_of_each_alone():
    counts = np.stack([np.histogram(activations(kind), bins=512)[0] for kind in ("relu", "heavy-tailed", "uniform")])
    asked = [99.99, 50.0, 100.0, 99.9]
    alone = [percentile_bins(counts, percentiles=[percentile]) for percentile in asked]
    assert percentile_bins(counts, percentiles=asked).tolist() == np.hstack(alone).tolist()


def test_a_percentile_that_floats_cannot_hold_does_not_ask_for_one_value_too_many():
    assert percentile_bins(np.array([[9990, 9, 1]]), percentiles=[99.9]).tolist() == [[1]]


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ValueError, match=rf"must be in \(0, 100\], got {percentile}"):
        percentile_bins(np.array([[1]]), percentiles=[99.9, percentile])


def labelled(method, percentile=99.99):
    return LabelledMethod(label=method, method=method, percentile=percentile if method == "percentile" else None)


def from_values(values, *methods, percentile=99.99):
    """The amax of one int8 tensor by each method, a number where one method is asked for."""
    histograms = histograms_of([np.asarray(values, np.float32)], bins=1024, names=["relu"], image="a.png")
    asked = [labelled(method, percentile) for method in methods]
    found = amax_from_histograms(histograms, methods=asked, bounds=INT8, names=["relu"])
    amax = [float(found[method][0]) for method in methods]
    return amax[0] if len(methods) == 1 else amax


def test_max_is_the_exact_maximum():
    assert from_values([0.1, -0.7], "max") == np.float32(0.7)


def test_the_four_methods_are_four():
    values = activations("heavy-tailed")
    assert len(set(from_values(values, "max", "percentile", "mse", "entropy"))) == 4


def test_methods_computed_together_are_those_computed_alone():
    values = activations("heavy-tailed")
    alone = [from_values(values, method) for method in METHODS]
    assert from_values(values, *METHODS) == alone


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_no_method_exceeds_the_maximum(method):
    values = activations("uniform")
    assert 0 < from_values(values, method, percentile=100.0) <= values.max()


def test_an_unreached_layer_says_what_to_check():
    with pytest.raises(CalibrationError, match="Quantizer relu has seen no value.*not on the path"):
        amax_from_histograms(empty_histograms(1, bins=1024), methods=[labelled("max")], bounds=INT8, names=["relu"])


def test_a_dead_layer_says_what_to_check():
    with pytest.raises(CalibrationError, match="all of them 0.*dead for these images"):
        from_values([0.0, 0.0], "entropy")


def squared_errors(weight, amax):
    """The definition, one array operation a step: QuantizeLinear to int8 and back, with a scale in float32."""
    steps = (amax / np.float32(127)).astype(np.float64)[:, None]
    exact = np.asarray(weight, np.float64)
    return ((exact - np.clip(np.rint(exact / steps), -128, 127) * steps) ** 2).sum(axis=1)


# The first call compiles.
@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e20]),
    st.sampled_from([1.0, 1.5, 30.0]),
)
def test_weight_mse_is_never_worse_than_max_on_any_channel(seed, channels, values, size, degrees):
    weight = (np.random.default_rng(seed).standard_t(degrees, (channels, values)) * size).astype(np.float32)
    found, largest = (squared_errors(weight, amax_from_weight(weight, method=m)) for m in ("mse", "max"))
    # The order in which float64 squares are added.
    assert np.all(found <= largest * (1 + 1e-12))


@pytest.mark.parametrize("values", [2, 9, 64])
def test_weight_mse_is_what_a_search_over_all_candidates_finds(values):
    weight = np.random.default_rng(values).standard_normal((16, values)).astype(np.float32)
    largest = np.abs(weight).max(axis=1)
    candidates = [(largest * (k / 1024)).astype(np.float32) for k in range(1088, 255, -1)]
    errors = np.stack([squared_errors(weight, candidate) for candidate in candidates])
    expected = np.stack(candidates)[errors.argmin(axis=0), np.arange(16)]
    assert amax_from_weight(weight, method="mse").tolist() == expected.tolist()


def test_weight_mse_clips_the_one_channel_with_an_outlier():
    weight = np.tile(np.arange(-127, 128, dtype=np.float32) / 127, (3, 40))
    weight[1, 0] = 1.2
    assert amax_from_weight(weight, method="mse")[[0, 2]].tolist() == [1.0, 1.0]
    assert amax_from_weight(weight, method="mse")[1] < np.float32(1.2)


def test_weight_mse_of_equal_errors_takes_the_larger_amax():
    assert amax_from_weight(np.array([[127.0, 64.0, -2.0]], np.float32), method="mse").tolist() == [127.0]


@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_channel_of_zeros_gets_an_amax_whose_scale_is_a_normal_number(method):
    (amax,) = amax_from_weight(np.zeros((1, 3), np.float32), method=method)
    assert np.float32(amax) / np.float32(127) >= np.finfo(np.float32).tiny
