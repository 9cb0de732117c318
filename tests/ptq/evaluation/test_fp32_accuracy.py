import pytest

from ptq.evaluation.fp32_accuracy import fp32_warning
from ptq.records.evaluation import SplitMetrics


def metrics(top1, images=500):
    return SplitMetrics("test", images, top1, top1, 1.0, None, None)


@pytest.mark.parametrize(
    ("top1", "classes", "stated", "says"),
    [
        (0.1, 1000, None, "as good as guessing among 1000 classes"),
        (27.0, 4, None, "as good as guessing among 4 classes"),
        (40.0, 4, None, ""),
        (50.0, 1000, 80.9, "80.9 % is stated for these weights"),
        (70.0, 1000, 80.9, ""),
        (50.0, 37, 80.9, ""),
        (100.0, 1, None, ""),
    ],
)
def test_what_is_said_of_an_fp32_accuracy(top1, classes, stated, says):
    found = fp32_warning(metrics(top1), classes=classes, stated_percent=stated)
    assert says in found
    assert bool(found) == bool(says)


def test_of_few_images_chance_alone_may_be_much():
    assert fp32_warning(metrics(40.0, images=20), classes=4, stated_percent=None)
    assert not fp32_warning(metrics(40.0, images=2000), classes=4, stated_percent=None)
