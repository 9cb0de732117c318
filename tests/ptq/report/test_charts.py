import io

import numpy as np
import pytest
from PIL import Image

from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.graph import EngineIdentity
from ptq.report.charts import box_plot_png, latency_bars_png, nights_png

METHODS = {"max": [81.2, 82.1, 83.0], "entropy": [84.6, 84.8, 84.7]}


def measurement(precision, batch_size, median_ms):
    return Measurement(
        precision=precision,
        batch_size=batch_size,
        samples_ms=(median_ms,) * 3,
        median_ms=median_ms,
        mean_ms=median_ms,
        p90_ms=median_ms,
        p95_ms=median_ms,
        p99_ms=median_ms * 1.5,
        throughput_images_per_s=1000 * batch_size / median_ms,
        rounds_median_ms=(median_ms,),
    )


def benchmark(*measurements):
    identity = EngineIdentity(name="openvino", version="2026.4", device="CPU", threads=2)
    return BenchmarkRecord(engine=identity, machine="a CPU", clock_mhz=None, measurements=measurements, warnings=())


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def is_red(image):
    return (image[..., 0] > 150) & (image[..., 1] < 100) & (image[..., 2] < 100)


def test_the_box_plot_is_a_png_of_660_by_385_pixels():
    with Image.open(io.BytesIO(box_plot_png(METHODS, fp32_top1_percent=84.9, title="test"))) as image:
        assert image.format == "PNG"
        assert image.size == (660, 385)


def test_the_box_plot_has_the_same_bytes_twice():
    first = box_plot_png(METHODS, fp32_top1_percent=84.9, title="test")
    assert box_plot_png(METHODS, fp32_top1_percent=84.9, title="test") == first


def test_the_pictures_do_not_name_the_library_that_drew_them():
    box_plot = box_plot_png(METHODS, fp32_top1_percent=84.9, title="test")
    bars = latency_bars_png(benchmark(measurement("fp32", 1, 11.2)))
    assert b"atplotlib" not in box_plot + bars


def test_the_fp32_line_moves_with_its_value():
    high = is_red(pixels(box_plot_png({"max": [80.0, 90.0]}, fp32_top1_percent=89.0, title="")))[:, 80:560]
    low = is_red(pixels(box_plot_png({"max": [80.0, 90.0]}, fp32_top1_percent=81.0, title="")))[:, 80:560]
    assert np.flatnonzero(high.any(axis=1)).max() < np.flatnonzero(low.any(axis=1)).min()


def test_an_fp32_line_far_above_every_method_is_inside_the_picture():
    picture = pixels(box_plot_png({"max": [50.0, 51.0]}, fp32_top1_percent=95.0, title=""))
    assert is_red(picture)[:, 80:560].sum() > 200


def test_a_single_trial_is_a_dot_without_a_box():
    picture = pixels(box_plot_png({"max": [80.0], "mse": [79.0]}, fp32_top1_percent=81.0, title=""))
    box_blue = (picture == (0x25, 0x63, 0xA8)).all(axis=-1)
    ink = (picture < 60).all(axis=-1)[45:315, 75:575]
    assert not box_blue.any()
    assert ink[:, :250].any()
    assert ink[:, 250:].any()


def test_a_hundred_equal_trials_are_drawn():
    png = box_plot_png({"max": [80.0] * 100}, fp32_top1_percent=80.0, title="")
    assert pixels(png).shape == (385, 660, 3)


def test_a_title_with_dollar_signs_is_drawn_as_it_is():
    plain = box_plot_png(METHODS, fp32_top1_percent=84.9, title=r"a b")
    marked = box_plot_png(METHODS, fp32_top1_percent=84.9, title=r"a $\frac$ b")
    assert plain != marked


def test_a_method_without_a_trial_is_named():
    with pytest.raises(ValueError, match=r"of which \['mse'\] have no trial"):
        box_plot_png({"max": [80.0], "mse": []}, fp32_top1_percent=81.0, title="")


def test_no_method_at_all_is_refused():
    with pytest.raises(ValueError, match="got 0 methods"):
        box_plot_png({}, fp32_top1_percent=81.0, title="")


def test_the_latency_bars_have_the_same_bytes_twice():
    record = benchmark(measurement("fp32", 1, 11.2), measurement("int8", 1, 2.9))
    assert latency_bars_png(record) == latency_bars_png(record)


def test_the_int8_bar_is_as_long_as_its_share_of_the_fp32_bar():
    picture = pixels(latency_bars_png(benchmark(measurement("fp32", 1, 8.0), measurement("int8", 1, 2.0))))
    int8 = (picture == (0x25, 0x63, 0xA8)).all(axis=-1).sum(axis=1).max()
    fp32 = (picture == (0x9F, 0xB3, 0xC8)).all(axis=-1).sum(axis=1).max()
    # Bars end between two pixels, so each length is off by at most one.
    assert int8 == pytest.approx(fp32 / 4, abs=2)


@pytest.mark.parametrize("batch_sizes", [(1,), (1, 32), (1, 8, 32), (1, 2, 4, 8, 16)])
def test_any_number_of_batch_sizes_fits_on_the_picture(batch_sizes):
    record = benchmark(*(measurement(name, size, 3.0 * size) for size in batch_sizes for name in ("fp32", "int8")))
    assert pixels(latency_bars_png(record)).shape[1] == 660


def test_a_benchmark_without_measurements_cannot_be_drawn():
    with pytest.raises(ValueError, match="holds no measurements"):
        latency_bars_png(benchmark())


BLUE = (0x25, 0x63, 0xA8)


def over_nights(*values, **named):
    options = {"labels": [str(night) for night in range(len(values))], "title": "Top-1, %", "is_from_zero": False}
    return pixels(nights_png({"INT8": values}, **(options | named)))


def has_blue(columns):
    return bool((columns == BLUE).all(axis=-1).any())


def test_a_picture_of_nights_is_a_png_of_660_by_253_pixels_with_the_same_bytes_twice():
    drawn = [
        nights_png({"INT8": [97.5, None], "FP32": [98.0, None]}, labels=["1", "2"], title="", is_from_zero=False)
        for _ in range(2)
    ]
    with Image.open(io.BytesIO(drawn[0])) as image:
        assert image.size == (660, 253)
    assert drawn[0] == drawn[1]
    assert b"atplotlib" not in drawn[0]


def test_bad_nights_are_red_and_only_they():
    good, bad = over_nights(97.0, 98.0), over_nights(97.0, 98.0, bad=[1])
    assert not is_red(good).any()
    assert is_red(bad).sum() > 10


def test_a_failed_night_is_a_red_cross_on_the_ground():
    crossed = is_red(over_nights(97.0, None, 98.0, bad=[1]))
    assert crossed.sum() > 10
    assert np.flatnonzero(crossed.any(axis=1)).min() > 180


def test_a_line_is_cut_where_another_machine_begins():
    values = (1.0,) * 8
    labels = [""] * 8
    joined, cut = (over_nights(*values, labels=labels, changes=changes) for changes in ({}, {4: "on B"}))
    # Between the dots of the fourth and the fifth night, beside the dashed line.
    between = slice(285, 300)
    assert has_blue(joined[45:200, between])
    assert not has_blue(cut[45:200, between])


def test_bars_begin_at_zero_and_a_bad_one_is_red():
    picture = over_nights(10.0, 5.0, is_bar=True, is_from_zero=True, bad=[1])
    blue, red = (picture == BLUE).all(axis=-1), is_red(picture)
    tall, short = (np.ptp(np.flatnonzero(part.any(axis=1))) for part in (blue, red))
    assert abs(tall / short - 2) < 0.05  # rows of pixels are whole


def test_ninety_nights_without_any_value_are_drawn():
    assert is_red(over_nights(*[None] * 90, bad=range(90))).sum() > 500


def test_nights_without_labels_or_with_too_few_values_are_refused():
    with pytest.raises(ValueError, match="Expected at least one night and one name, and one value a night"):
        nights_png({"INT8": []}, labels=[], title="", is_from_zero=False)
    with pytest.raises(ValueError, match=r"There are 2 labels of nights, and numbers of values \{'INT8': 1\}"):
        nights_png({"INT8": [1.0]}, labels=["1", "2"], title="", is_from_zero=False)
