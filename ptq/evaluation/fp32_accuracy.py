"""Is the FP32 network as good as it should be, before anybody asks what INT8 costs?"""

from ptq.records.evaluation import SplitMetrics

# In percentage points: other images than ImageNet's own, or another crop, cost a few.
_FAR_BELOW_PP = 15.0
# The classes of ImageNet-1K, on which torchvision states its accuracies.
_IMAGENET_CLASSES = 1000
_WHAT_TO_CHECK = (
    "Check mean and std, the order of the classes, and that the checkpoint is the one you mean: what INT8 loses says "
    "little about a network that does not work."
)


def fp32_warning(found: SplitMetrics, *, classes: int, stated_percent: float | None) -> str:
    """Says what is wrong with an FP32 accuracy; empty where nothing seems to be.

    It is as good as guessing where it is within two standard errors of 1 / classes, or below.

    Args:
        found: FP32's metrics on a split.
        classes: outputs of the network.
        stated_percent: top-1 that its source states on ImageNet-1K, None where it states none.
    """
    chance = 1 / classes
    error = (chance * (1 - chance) / found.images) ** 0.5
    top1 = f"FP32 top-1 on {found.split} is {found.top1_percent:.2f} % of {found.images} images"
    if classes > 1 and found.top1_percent <= 100 * (chance + 2 * error):
        return f"{top1}: as good as guessing among {classes} classes. {_WHAT_TO_CHECK}"
    if stated_percent and classes == _IMAGENET_CLASSES and found.top1_percent < stated_percent - _FAR_BELOW_PP:
        return f"{top1}, and {stated_percent:.1f} % is stated for these weights on ImageNet. {_WHAT_TO_CHECK}"
    return ""
