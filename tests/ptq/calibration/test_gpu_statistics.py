import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import PLACEMENT, small_resnet
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ptq.calibration.calibrate import channel_axes
from ptq.calibration.gpu_statistics import DeviceStatistics, collect_statistics_on_device
from ptq.calibration.statistics import collect_statistics
from ptq.dialect import observed_names
from ptq.errors import CalibrationError
from ptq.networks.folding import fold_model
from ptq.networks.observed import observed_from_folded
from ptq.numerics.bias_correction import channel_sums_of, empty_channel_sums, merge_channel_sums
from ptq.numerics.histogram import MIN_EXPONENT, add_, empty_histograms, histograms_of
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of

CPU = torch.device("cpu")
NAMES = ["input", "relu"]
AXES = [1, -1]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
# An image: 4 values of each tensor at a magnitude of its own, so that ranges grow while images are added.
IMAGES = st.lists(
    st.tuples(st.lists(FLOATS, min_size=8, max_size=8), st.lists(st.booleans(), min_size=3, max_size=3)),
    min_size=1,
    max_size=7,
)
DENORMAL = [0.0, -0.0, 1e-45, -3e-39, 1e-38, 0.0, 1e-45, 1e-45]


def tensors_of(images):
    stacked = np.array([values for values, _ in images], dtype=np.float32)
    return [stacked[:, :4].reshape(-1, 2, 2), stacked[:, 4:].reshape(-1, 2, 2)]


def expected_trials(tensors, drawn, *, bins, axes=AXES):
    histograms = [empty_histograms(len(tensors), bins=bins) for _ in range(drawn.shape[1])]
    sums = [empty_channel_sums() for _ in range(drawn.shape[1])]
    for image in range(drawn.shape[0]):
        parts = [tensor[image : image + 1] for tensor in tensors]
        found = histograms_of(parts, bins=bins, names=NAMES, image=str(image))
        for trial in np.flatnonzero(drawn[image]):
            add_(histograms[trial], found)
            sums[trial] = merge_channel_sums(sums[trial], channel_sums_of(parts, axes=axes))
    return list(zip(histograms, sums, strict=True))


def device_trials(tensors, drawn, *, bins, batch_size, axes=AXES, device=CPU):
    statistics = empty_statistics(images=len(drawn), trials=drawn.shape[1], bins=bins, axes=axes, device=device)
    for start in range(0, len(drawn), batch_size):
        batch = slice(start, start + batch_size)
        parts = [torch.from_numpy(tensor[batch]).to(device) for tensor in tensors]
        statistics.add_(parts, torch.from_numpy(drawn[batch]).to(device))
    return [(trial.histograms, trial.channel_sums) for trial in statistics.trials()]


def empty_statistics(*, images, trials=1, bins=1024, axes=AXES, device=CPU):
    return DeviceStatistics(
        names=NAMES, channel_axes=axes, image_names=[f"{index}.png" for index in range(images)], trials=trials,
        bins=bins, device=device,
    )  # fmt: skip


def bits(trials):
    return [
        [
            (array.dtype, array.shape, array.tobytes())
            for array in (histograms.counts, histograms.exponents, histograms.maxima, histograms.zeros, *sums.sums)
        ]
        + [sums.images]
        for histograms, sums in trials
    ]


@given(IMAGES, st.integers(1, 7), st.sampled_from([1024, 2048, 4096, 8192]))
@example([(DENORMAL, [True, False, False]), ([1e38] * 4 + [0.0] * 4, [True, True, False])], 1, 1024)
@example([([3.4028234663852886e38] * 8, [True] * 3), (DENORMAL, [True] * 3)], 2, 8192)
@settings(deadline=None, max_examples=50)
@pytest.mark.slow
def test_histograms_have_the_bits_of_the_host_s_whatever_the_batch_size(images, batch_size, bins):
    drawn = np.array([trials for _, trials in images], dtype=np.int64)
    tensors = tensors_of(images)

    found = device_trials(tensors, drawn, bins=bins, batch_size=batch_size, axes=[None, None])

    assert bits(found) == bits(expected_trials(tensors, drawn, bins=bins, axes=[None, None]))


# Multiples of 2^-20 below 2^20: float64 adds four of them exactly, so the order of the sum does not matter.
EXACT = st.integers(-(2**23), 2**23).map(lambda units: units * 2.0**-20)


@given(
    st.lists(
        st.tuples(st.lists(EXACT, min_size=8, max_size=8), st.lists(st.booleans(), min_size=3, max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 6),
)
@settings(deadline=None)
def test_channel_sums_have_the_bits_of_the_host_s_where_their_sums_are_exact(images, batch_size):
    drawn = np.array([trials for _, trials in images], dtype=np.int64)
    tensors = tensors_of(images)

    found = device_trials(tensors, drawn, bins=1024, batch_size=batch_size)

    assert bits(found) == bits(expected_trials(tensors, drawn, bins=1024))


def test_channel_sums_are_the_host_s_to_one_unit_per_image_where_their_sums_round():
    generator = np.random.default_rng(0)
    tensors = [generator.standard_normal((5, 8, 33, 31)).astype(np.float32) for _ in NAMES]
    drawn = np.ones((5, 1), dtype=np.int64)

    ((_, found),) = device_trials(tensors, drawn, bins=1024, batch_size=2, axes=[1, 1])

    ((_, expected),) = expected_trials(tensors, drawn, bins=1024, axes=[1, 1])
    for left, right in zip(found.sums, expected.sums, strict=True):
        assert np.abs(left - right).max() <= 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_layer_and_image(bad):
    tensors = [np.ones((3, 2, 2), np.float32), np.ones((3, 2, 2), np.float32)]
    tensors[1][2, 1, 0] = bad

    with pytest.raises(CalibrationError, match=r"Activation relu holds NaN or infinity for image 2\.png"):
        device_trials(tensors, np.ones((3, 1), dtype=np.int64), bins=1024, batch_size=2)


def test_a_tensor_of_one_image_may_have_any_shape():
    windows = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    statistics = empty_statistics(images=1, axes=[None, None])

    statistics.add_([torch.from_numpy(windows)] * 2, torch.ones(1, 1, dtype=torch.int64))

    assert statistics.trials()[0].histograms.totals.tolist() == [24, 24]


def test_a_batch_whose_tensor_has_no_image_axis_is_refused():
    with pytest.raises(CalibrationError, match=r"Tensor input has shape \(6, 2, 2\) for 3 images.*batch_size 1"):
        empty_statistics(images=3).add_([torch.ones(6, 2, 2)] * 2, torch.ones(3, 1, dtype=torch.int64))


def test_an_empty_tensor_is_refused():
    with pytest.raises(CalibrationError, match=r"Tensor input is empty: its shape is \(1, 0\)"):
        empty_statistics(images=1).add_([torch.ones(1, 0)] * 2, torch.ones(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("bins", [2, 1000])
def test_bins_that_are_no_power_of_two_are_refused(bins):
    with pytest.raises(ValueError, match=f"power of two of at least 4, got {bins}"):
        empty_statistics(images=1, bins=bins)


def test_collecting_never_asks_the_device_for_a_value():
    # A fake tensor has a shape and no values: whatever needs a value on the host, or a shape that depends on one
    # (item, nonzero, bincount, a boolean index), raises. On a GPU exactly these wait for the device.
    with FakeTensorMode():
        statistics = empty_statistics(images=4, trials=2)
        for _ in range(2):
            statistics.add_([torch.empty(2, 3, 3), torch.empty(2, 3, 3)], torch.empty(2, 2, dtype=torch.int64))
        with pytest.raises(DataDependentOutputException):
            torch.empty(2).max().item()


@pytest.mark.gpu
@needs_cuda
def test_collecting_on_cuda_does_not_synchronise_and_has_the_bits_of_the_host_s():
    generator = np.random.default_rng(0)
    scales = 2.0 ** generator.integers(-30, 30, (16, 1, 1, 1))
    tensors = [(generator.integers(-99, 99, (16, 8, 9, 9)) * scales).astype(np.float32) for _ in NAMES]
    drawn = generator.integers(0, 2, (16, 3)).astype(np.int64)
    cuda = torch.device("cuda")
    parts = [torch.from_numpy(tensor).to(cuda) for tensor in tensors]
    members = torch.from_numpy(drawn).to(cuda)
    statistics = empty_statistics(images=16, trials=3, axes=[1, 1], device=cuda)
    torch.cuda.synchronize()

    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in range(0, 16, 4):
            batch = slice(start, start + 4)
            statistics.add_([part[batch] for part in parts], members[batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")

    found = [(trial.histograms, trial.channel_sums) for trial in statistics.trials()]
    assert bits(found) == bits(expected_trials(tensors, drawn, bins=1024, axes=[1, 1]))


PIXELS = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def observed():
    folded = fold_model(small_resnet(), input_shape=(3, 16, 16))
    plan = place_quantizers(view_of(folded.module, traced=folded.traced), **PLACEMENT)
    return observed_from_folded(folded.module, plan), plan


def arguments(plan, draws):
    return {
        "draws": draws, "names": observed_names(plan), "channel_axes": channel_axes(plan),
        "image_names": [f"{index}.png" for index in range(len(PIXELS))], "mean": [0.5] * 3, "std": [0.25] * 3,
        "bins": 1024,
    }  # fmt: skip


def reader_of(model):
    @torch.inference_mode()
    def read(image):
        _, *tensors = model(torch.from_numpy(image))
        return [tensor.numpy() for tensor in tensors]

    return read


def test_a_whole_pass_gives_what_the_pass_on_the_host_gives(observed):
    model, plan = observed
    draws = [[0, 1, 5, 8], [2, 5], []]

    found = collect_statistics_on_device(model, PIXELS, device="cpu", **arguments(plan, draws))

    expected = collect_statistics([reader_of(model)], PIXELS, **arguments(plan, draws))
    for left, right in zip(found, expected, strict=True):
        assert bits([(left.histograms, empty_channel_sums())]) == bits([(right.histograms, empty_channel_sums())])
        assert left.channel_sums.images == right.channel_sums.images
        for ours, host in zip(left.channel_sums.sums, right.channel_sums.sums, strict=True):
            assert np.abs(ours - host).max(initial=0) <= left.channel_sums.images


def test_a_pass_leaves_the_model_as_it_was(observed):
    model, plan = observed
    before = {key: value.clone() for key, value in model.state_dict().items()}

    collect_statistics_on_device(model, PIXELS, device="cpu", batch_size=4, **arguments(plan, [[0, 1, 2, 3, 4]]))

    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_every_drawn_image_is_counted_once_in_the_progress(observed):
    model, plan = observed
    seen = []

    collect_statistics_on_device(
        model, PIXELS, device="cpu", progress=lambda done, total: seen.append((done, total)),
        **arguments(plan, [[0, 1], [1, 2]]),
    )  # fmt: skip

    assert seen[-1] == (3, 3)


def test_zero_images_is_an_error(observed):
    with pytest.raises(CalibrationError, match=r"asked for 0 images; set calibration\.images"):
        collect_statistics_on_device(observed[0], PIXELS, device="cpu", **arguments(observed[1], [[], []]))


def test_an_image_drawn_twice_is_refused(observed):
    with pytest.raises(ValueError, match="Trial 1 draws an image twice"):
        collect_statistics_on_device(observed[0], PIXELS, device="cpu", **arguments(observed[1], [[0], [3, 3]]))


def test_the_smallest_exponent_is_the_host_s():
    statistics = empty_statistics(images=1)
    statistics.add_([torch.zeros(1, 2, 2)] * 2, torch.ones(1, 1, dtype=torch.int64))
    assert statistics.trials()[0].histograms.exponents.tolist() == [MIN_EXPONENT, MIN_EXPONENT]
