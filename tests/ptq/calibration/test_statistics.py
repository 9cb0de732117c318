import numpy as np
import pytest

from ptq.calibration.statistics import collect_statistics
from ptq.errors import CalibrationError

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 6, 6, 1), dtype=np.uint8)
NAMES = ["input", "relu"]


def reader(image):
    return [image, np.maximum(image * 3, 0)]


def collect(draws, *, workers=1, pixels=PIXELS, progress=None):
    return collect_statistics(
        [reader] * workers, pixels, draws=draws, names=NAMES, channel_axes=[1, 1],
        image_names=[f"{i}.png" for i in range(len(pixels))],
        mean=[0.5], std=[0.5], bins=256, progress=progress,
    )  # fmt: skip


def bits(trials):
    arrays = [
        [t.histograms.counts, t.histograms.exponents, t.histograms.maxima, t.histograms.zeros, *t.channel_sums.sums]
        for t in trials
    ]
    return [[array.tobytes() for array in trial] for trial in arrays]


def test_a_trial_counts_exactly_the_images_it_drew():
    first, second = collect([[0, 1, 2], [2, 8]])
    assert first.histograms.totals.tolist() == [3 * 36, 3 * 36]
    assert second.histograms.totals.tolist() == [2 * 36, 2 * 36]


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_does_not_change_a_bit(workers):
    draws = [[0, 1, 5, 8], [2, 3, 5]]
    assert bits(collect(draws, workers=workers)) == bits(collect(draws))


def test_the_order_of_a_draw_does_not_change_a_bit():
    assert bits(collect([[8, 0, 5]])) == bits(collect([[0, 5, 8]]))


def test_a_trial_does_not_depend_on_the_other_trials():
    assert bits(collect([[1, 2], [3, 4, 5, 6, 7]]))[0] == bits(collect([[1, 2]]))[0]


def test_every_drawn_image_is_read_once():
    seen = []
    collect([[0, 1], [1, 2], [1]], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)


def test_zero_images_is_an_error():
    with pytest.raises(CalibrationError, match=r"asked for 0 images; set calibration\.images"):
        collect([[], []])


def test_an_image_drawn_twice_is_refused():
    with pytest.raises(ValueError, match="Trial 1 draws an image twice"):
        collect([[0], [3, 3]])


def test_an_activation_that_is_not_finite_stops_the_pass():
    def broken(image):
        return [image, np.full((2, 2), np.nan, np.float32)]

    with pytest.raises(CalibrationError, match=r"Activation relu holds NaN or infinity for image 0\.png"):
        collect_statistics(
            [broken],
            PIXELS,
            draws=[[0]],
            names=NAMES,
            channel_axes=[1, 1],
            image_names=["0.png"],
            mean=[0.5],
            std=[0.5],
            bins=256,
        )
