"""How do the methods and the precisions compare, as pictures?

Numbers in, PNG bytes out; the same numbers give the same bytes. Only this file imports matplotlib. It draws on the
Agg canvas without pyplot, so that no display is needed and no global state is touched. Nothing is computed here
beyond positions on the paper.
"""

import io
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.report.cells import PRECISIONS
from ptq.report.inputs import ReportInputs, images_per_draw, methods_of

DPI = 110
WIDTH_INCHES = 6.0
BOX_PLOT_HEIGHT_INCHES = 3.5
NIGHTS_HEIGHT_INCHES = 2.3
# Labels of more nights than this would touch.
NIGHT_LABELS = 8
# Labels of more methods than this are set narrower, so that neighbours do not touch.
WIDE_LABELS = 4

_INK = "#1f2933"
_MUTED = "#7b8794"
_GRID = "#e4e7eb"
_BLUE = "#2563a8"
_FLOAT = "#9fb3c8"
_RED = "#b42318"
_SMALL = 8


def box_plot_png(top1_by_method: Mapping[str, Sequence[float]], *, fp32_top1_percent: float, title: str) -> bytes:
    """Returns a PNG with one box per method over the trials, every trial as a dot, and FP32 as a line.

    Args:
        top1_by_method: top-1 of each trial in percent, by method, in the order to draw; at least one value each.
        fp32_top1_percent: top-1 of the baseline, in percent.
        title: one line above the picture, drawn as it is.

    Returns:
        660 by 385 pixels. Dots of one method stand in the order of the trials from left to right.

    Raises:
        ValueError: no method is given, or one has no trial.
    """
    empty = [method for method, values in top1_by_method.items() if not values]
    if empty or not top1_by_method:
        raise ValueError(
            f"The box plot got {len(top1_by_method)} methods, of which {empty} have no trial. "
            f"Expected at least one method and one top-1 per trial."
        )
    figure = Figure(figsize=(WIDTH_INCHES, BOX_PLOT_HEIGHT_INCHES), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.105, 0.17, 0.775, 0.70))
    for position, values in enumerate(top1_by_method.values()):
        _draw_method(axes, position, list(values))
    axes.axhline(fp32_top1_percent, color=_RED, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    axes.annotate(
        f"FP32\n{fp32_top1_percent:.2f} %",
        xy=(1, fp32_top1_percent),
        xycoords=axes.get_yaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
        color=_RED,
        fontsize=_SMALL + 0.5,
        va="center",
    )
    every = [value for values in top1_by_method.values() for value in values] + [fp32_top1_percent]
    # A spread of a few hundredths must not be blown up to the height of the picture.
    middle, half = (max(every) + min(every)) / 2, max((max(every) - min(every)) * 0.58, 0.5)
    axes.set_ylim(middle - half, middle + half)
    axes.set_xlim(-0.6, len(top1_by_method) - 0.4)
    is_narrow = len(top1_by_method) > WIDE_LABELS
    labels = [_method_label(method, values, is_narrow=is_narrow) for method, values in top1_by_method.items()]
    axes.set_xticks(range(len(labels)), labels, fontsize=_SMALL + (-1 if is_narrow else 1), color=_INK)
    axes.set_ylabel("top-1, %", fontsize=_SMALL + 1, color=_INK)
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    _strip(axes)
    figure.text(0.02, 0.95, title, fontsize=_SMALL + 2, color=_INK, va="center", weight="bold", parse_math=False)
    return _png(figure)


def latency_bars_png(record: BenchmarkRecord) -> bytes:
    """Returns a PNG with one panel per batch size: a bar to the median latency of each precision, a line to its p99.

    Raises:
        ValueError: the record holds no measurement.
    """
    if not record.measurements:
        raise ValueError(
            "The benchmark holds no measurements, so no latency can be drawn. "
            "Expected at least one precision and batch size."
        )
    batch_sizes = sorted({measurement.batch_size for measurement in record.measurements})
    precisions = {measurement.precision for measurement in record.measurements}
    columns = min(2, len(batch_sizes))
    rows = -(-len(batch_sizes) // columns)
    height = rows * (0.95 + 0.34 * len(precisions))
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, facecolor="white")
    # Inches: below stand the axis' numbers and its name, above a title, on the left the precisions.
    below, above, left, right = 0.5, 0.25, 0.55, 0.1
    axis_height, axis_width = height / rows - below - above, WIDTH_INCHES / columns - left - right
    grid = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "bottom": below / height,
            "top": 1 - above / height,
            "left": left / WIDTH_INCHES,
            "right": 1 - right / WIDTH_INCHES,
            "hspace": (below + above) / axis_height,
            "wspace": (left + right) / axis_width,
        },
    )
    for index, batch_size in enumerate(batch_sizes):
        measured = [found for name in PRECISIONS if (found := record.of(name, batch_size)) is not None]
        _draw_batch(grid[index // columns][index % columns], measured)
    for index in range(len(batch_sizes), rows * columns):
        grid[index // columns][index % columns].set_axis_off()
    return _png(figure)


def nights_png(
    lines: Mapping[str, Sequence[float | None]],
    *,
    labels: Sequence[str],
    title: str,
    is_from_zero: bool,
    is_bar: bool = False,
    bad: Collection[int] = (),
    changes: Mapping[int, str] | None = None,
) -> bytes:
    """Returns a PNG with values over the nights, oldest on the left.

    Args:
        lines: one value a night by name, in the unit that the title names; None where a night has none. The first name
            is drawn strongly, those after it weakly; the last value of each line stands beside it.
        labels: what stands below each night, in one or two lines; as many as fit are shown.
        title: one line above the picture, drawn as it is.
        is_from_zero: whether the axis begins at 0; otherwise it is cut to the values, but spans at least one unit.
        is_bar: whether the first name is drawn as bars instead.
        bad: indices of nights that are drawn in red; a cross on the ground where a night has no value.
        changes: what begins at a night so that values before it cannot be compared, by index. Lines are cut there.

    Returns:
        660 by 253 pixels.

    Raises:
        ValueError: there is no night, or a name has not one value a night.
    """
    nights, cuts = len(labels), dict(sorted((changes or {}).items()))
    if not nights or not lines or any(len(values) != nights for values in lines.values()):
        counts = {name: len(values) for name, values in lines.items()}
        raise ValueError(
            f"There are {nights} labels of nights, and numbers of values {counts}. Expected at least one night and one "
            "name, and one value a night."
        )
    figure = Figure(figsize=(WIDTH_INCHES, NIGHTS_HEIGHT_INCHES), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.08, 0.20, 0.78, 0.66))
    strong, *weak = lines
    for name in weak:
        _draw_night_line(axes, lines[name], colour=_MUTED, style=(0, (5, 3)), cuts=cuts)
    if is_bar:
        colours = [_RED if night in bad else _BLUE for night in range(nights)]
        axes.bar(range(nights), [value or 0.0 for value in lines[strong]], width=0.6, color=colours, zorder=2)
    else:
        _draw_night_line(axes, lines[strong], colour=_BLUE, style="-", cuts=cuts)
        _draw_night_dots(axes, lines[strong], bad=bad)
    _limit_nights(axes, lines, is_from_zero=is_from_zero)
    if not is_bar:
        _name_night_lines(axes, lines, strong=strong)
    for night, what in cuts.items():
        axes.axvline(night - 0.5, color=_MUTED, linewidth=1.0, linestyle=(0, (2, 2)), zorder=1)
        if any(night < other <= night + nights / NIGHT_LABELS for other in cuts):
            continue  # its words would run into those of the next
        axes.annotate(
            what,
            xy=(night - 0.5, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 1),
            textcoords="offset points",
            fontsize=_SMALL,
            color=_MUTED,
            va="bottom",
            parse_math=False,
        )
    # A few nights keep to the left, as far apart as many would be.
    axes.set_xlim(-0.7, max(nights, NIGHT_LABELS) - 0.3)
    shown = range(nights - 1, -1, -max(1, -(-nights // NIGHT_LABELS)))
    axes.set_xticks(list(shown), [labels[night] for night in shown], fontsize=_SMALL, color=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    _strip(axes)
    figure.text(0.02, 0.945, title, fontsize=_SMALL + 2, color=_INK, va="center", weight="bold", parse_math=False)
    return _png(figure)


def _method_label(method: str, values: Sequence[float], *, is_narrow: bool) -> str:
    """A method's name, a percentile on a line of its own, and the mean below it."""
    mean = f"{sum(values) / len(values):.2f} %"
    if len(values) > 1:
        mean = f"mean\n{mean}" if is_narrow else f"mean {mean}"
    name = method.replace("-", "\n", 1)
    return f"{name}\n{mean}"


def _draw_method(axes: Axes, position: int, values: list[float]) -> None:
    """Draws one box with its trials; a single trial is only its dot."""
    if len(values) > 1:
        line = {"color": _BLUE, "linewidth": 1.0}
        axes.boxplot(
            [values],
            positions=[position],
            widths=0.5,
            showfliers=False,
            patch_artist=True,
            manage_ticks=False,
            boxprops={"facecolor": "#dce8f5", "edgecolor": _BLUE, "linewidth": 1.0},
            medianprops={"color": _BLUE, "linewidth": 2.0},
            whiskerprops=line,
            capprops=line,
        )
    width = 0.32 if len(values) > 1 else 0.0
    steps = max(len(values) - 1, 1)
    offsets = [position + width * (index / steps - 0.5) for index in range(len(values))]
    size = 26 if len(values) <= 20 else 10
    axes.scatter(offsets, values, s=size, color=_INK, edgecolors="white", linewidths=0.6, zorder=3)


def _draw_night_line(
    axes: Axes, values: Sequence[float | None], *, colour: str, style: Any, cuts: Collection[int]
) -> None:
    """Joins the nights that have a value, except over a cut."""
    known = [(night, value) for night, value in enumerate(values) if value is not None]
    for first, end in zip((0, *cuts), (*cuts, len(values)), strict=True):
        nights = [night for night, _ in known if first <= night < end]
        heights = [value for night, value in known if first <= night < end]
        axes.plot(nights, heights, color=colour, linewidth=1.4, linestyle=style, zorder=2)


def _draw_night_dots(axes: Axes, values: Sequence[float | None], *, bad: Collection[int]) -> None:
    known = [(night, value) for night, value in enumerate(values) if value is not None]
    size = 26 if len(values) <= 30 else 12
    colours = [_RED if night in bad else _BLUE for night, _ in known]
    nights, heights = [night for night, _ in known], [value for _, value in known]
    axes.scatter(nights, heights, s=size, color=colours, edgecolors="white", linewidths=0.6, zorder=4)
    empty = [night for night in bad if values[night] is None]
    ground = axes.get_xaxis_transform()
    axes.scatter(empty, [0.05] * len(empty), transform=ground, marker="x", s=22, color=_RED, linewidths=1.5, zorder=3)


def _limit_nights(axes: Axes, lines: Mapping[str, Sequence[float | None]], *, is_from_zero: bool) -> None:
    known = [value for values in lines.values() for value in values if value is not None]
    if not known:
        axes.set_yticks([])
        return
    axes.ticklabel_format(axis="y", useOffset=False, style="plain")
    if is_from_zero:
        axes.set_ylim(0, max(known) * 1.12 or 1.0)
        return
    middle, half = (max(known) + min(known)) / 2, max((max(known) - min(known)) * 0.58, 0.5)
    axes.set_ylim(middle - half, middle + half)


def _name_night_lines(axes: Axes, lines: Mapping[str, Sequence[float | None]], *, strong: str) -> None:
    """Writes each name with its last value beside it; two that are close stand above and below each other."""
    known = {name: [value for value in values if value is not None] for name, values in lines.items()}
    ends = [(values[-1], name) for name, values in known.items() if values]
    for order, (last, name) in enumerate(sorted(ends, reverse=True)):
        axes.annotate(
            f"{name} {last:.{3 if last < 10 else 2 if last < 1000 else 0}f}",
            xy=(1, last),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=_SMALL + 0.5,
            color=_BLUE if name == strong else _MUTED,
            va="center" if len(ends) == 1 else "top" if order else "bottom",
        )


def _draw_batch(axes: Axes, measured: list[Measurement]) -> None:
    """Draws the precisions at one batch size, the first on top."""
    rows = range(len(measured))
    colours = [_BLUE if item.precision == "int8" else _FLOAT for item in measured]
    axes.barh(rows, [item.median_ms for item in measured], height=0.62, color=colours, zorder=2)
    axes.hlines(rows, [item.median_ms for item in measured], [item.p99_ms for item in measured], color=_INK, lw=1.0)
    shortest = min(item.median_ms for item in measured)
    digits = 2 if shortest < 10 else 1 if shortest < 100 else 0
    for row, item in zip(rows, measured, strict=True):
        axes.annotate(
            f"{item.median_ms:.{digits}f} ms",
            xy=(max(item.p99_ms, item.median_ms), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=_SMALL,
            color=_INK,
        )
    longest = max(max(item.p99_ms, item.median_ms) for item in measured)
    axes.set_xlim(0, longest * 1.28)
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.set_yticks(rows, [item.precision.upper() for item in measured], fontsize=_SMALL + 0.5, color=_INK)
    axes.set_title(f"batch {measured[0].batch_size}", fontsize=_SMALL + 1, color=_INK, loc="left", weight="bold")
    axes.set_xlabel("ms per batch, lower is better", fontsize=_SMALL, color=_MUTED)
    axes.grid(axis="x", color=_GRID, linewidth=0.8, zorder=0)
    _strip(axes)


def _strip(axes: Axes) -> None:
    """Removes what carries no information."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=_SMALL + 0.5, labelcolor=_INK)


def _png(figure: Figure) -> bytes:
    """The picture's bytes, without the library's version in them."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def report_box_plot_png(inputs: ReportInputs) -> bytes:
    """Returns the box plot of the methods over the trials on the test split, the same bytes as in the HTML report."""
    by_method: dict[str, list[float]] = {method: [] for method in methods_of(inputs)}
    for candidate in sorted(inputs.verdict.candidates, key=lambda item: item.trial):
        by_method[candidate.method].append(candidate.top1_percent)
    trials, name = len(inputs.draws.indices), inputs.verdict.model
    title = f"{name if len(name) <= 28 else name[:27] + '…'}: {inputs.selection.test_split}, "
    title += f"{trials} draws" if trials != 1 else "1 draw"
    title += f" of {images_per_draw(inputs.draws)} images"
    methods = tuple((method, tuple(values)) for method, values in by_method.items())
    return _drawn_once(methods, inputs.verdict.fp32.top1_percent, title)


@lru_cache(maxsize=1)
def _drawn_once(methods: tuple[tuple[str, tuple[float, ...]], ...], fp32_top1_percent: float, title: str) -> bytes:
    """The box plot, which the page, the file beside it and the page of the run all show."""
    return box_plot_png(dict(methods), fp32_top1_percent=fp32_top1_percent, title=title)
