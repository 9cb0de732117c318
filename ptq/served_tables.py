"""What do report and terminal tell about the version in service?"""

from ptq.evaluation.versus_published import NOTABLE_DRIFT, drift_factor
from ptq.records.decision import ServedComparison
from ptq.tables import Table, fixed, interval_text, probability

LAYERS_SHOWN = 10


def tables_of_served(comparison: ServedComparison) -> tuple[Table, ...]:
    """Returns the comparison with the version in service and, where the two were compared, the drift of amax."""
    title = f"Against version {comparison.version} in service: {comparison.decision}"
    rows = [*_accuracy_rows(comparison), *_latency_rows(comparison)]
    if not rows:
        return (Table(title, ("Comparison", "Value"), tuple(("Reason", reason) for reason in comparison.reasons)),)
    return Table(title, ("Comparison", "In service", "New", "Change"), tuple(rows)), _drift_table(comparison)


def _accuracy_rows(comparison: ServedComparison) -> list[tuple[str, ...]]:
    paired = comparison.paired
    if paired is None or comparison.served_top1_percent is None or comparison.new_top1_percent is None:
        return []
    low, high = paired.drop_interval_pp
    change = f"{fixed(-paired.drop_pp, 2, sign=True)} pp"
    return [
        (
            f"Top-1 on {paired.images:,} images, %", fixed(comparison.served_top1_percent, 2),
            fixed(comparison.new_top1_percent, 2), change,
        ),
        ("95 % interval of the change, pp", "", "", interval_text((-high, -low))),
        ("McNemar test, exact, two-sided", "", "", probability(paired.mcnemar_p)),
        (
            "Images that only this one gets right", f"{paired.fp32_only_correct:,}", f"{paired.int8_only_correct:,}",
            f"{paired.flipped:,} predictions differ",
        ),
    ]  # fmt: skip


def _latency_rows(comparison: ServedComparison) -> list[tuple[str, ...]]:
    return [
        (
            f"Median latency at batch {item.batch_size}, ms", fixed(item.served_median_ms, 3),
            fixed(item.new_median_ms, 3), f"{fixed(100 * (item.ratio - 1), 1, sign=True)} %",
        )
        for item in comparison.latencies
    ]  # fmt: skip


def _drift_table(comparison: ServedComparison) -> Table:
    shown = comparison.drift[:LAYERS_SHOWN]
    rows = tuple(
        (item.quantizer, f"{item.served_amax:.4g}", f"{item.new_amax:.4g}", fixed(drift_factor(item), 2))
        for item in shown
    )
    note = f"The {len(shown)} largest of {len(comparison.drift)} quantizers that both have."
    if comparison.quantizers_of_one_alone:
        note += f" {len(comparison.quantizers_of_one_alone)} are in one of the two alone."
    alarming = tuple(index for index, item in enumerate(shown) if drift_factor(item) > NOTABLE_DRIFT)
    return Table(
        "Drift of amax", ("Quantizer", "In service", "New", "Factor"), rows, note, alarming=alarming
    )  # fmt: skip
