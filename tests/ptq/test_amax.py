import numpy as np
import pytest
import torch
from pytorch_quantization.calib import histogram as reference
from pytorch_quantization.tensor_quant import fake_tensor_quant

from ptq.amax import amax_from_histograms, entropy_bin, mse_bin, percentile_bin
from ptq.errors import CalibrationError
from ptq.histogram import empty_histograms, histograms_of

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
    assert percentile_bin(np.array([[1, 1, 1, 1]]), percentile=100.0).tolist() == [4]


def test_percentile_returns_the_upper_edge_of_the_bin_that_holds_the_share():
    assert percentile_bin(np.array([[6, 3, 1], [1, 0, 9]]), percentile=60.0).tolist() == [1, 3]


def test_a_percentile_that_floats_cannot_hold_does_not_ask_for_one_value_too_many():
    assert percentile_bin(np.array([[9990, 9, 1]]), percentile=99.9).tolist() == [1]


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ValueError, match=r"must be in \(0, 100\]"):
        percentile_bin(np.array([[1]]), percentile=percentile)


def from_values(values, method, **options):
    histograms = histograms_of([np.asarray(values, np.float32)], bins=1024, names=["relu"], image="a.png")
    settings = {"percentile": 99.99, "bounds": INT8, "names": ["relu"], **options}
    return float(amax_from_histograms(histograms, method=method, **settings)[0])


def test_max_is_the_exact_maximum():
    assert from_values([0.1, -0.7], "max") == np.float32(0.7)


def test_the_four_methods_are_four():
    values = activations("heavy-tailed")
    assert len({from_values(values, method) for method in ("max", "percentile", "mse", "entropy")}) == 4


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_no_method_exceeds_the_maximum(method):
    values = activations("uniform")
    assert 0 < from_values(values, method, percentile=100.0) <= values.max()


def test_an_unreached_layer_says_what_to_check():
    with pytest.raises(CalibrationError, match="Quantizer relu has seen no value.*not on the path"):
        amax_from_histograms(empty_histograms(1, bins=1024), method="max", percentile=99.9, bounds=INT8, names=["relu"])


def test_a_dead_layer_says_what_to_check():
    with pytest.raises(CalibrationError, match="all of them 0.*dead for these images"):
        from_values([0.0, 0.0], "entropy")
