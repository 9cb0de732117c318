"""How did a model do over the nights, told to a person?

Nights in, documents out: one HTML file that needs nothing else, and Markdown for Prefect's page. Rejected and failed
nights are red; latencies from another machine or engine are told apart. Nothing is measured or decided here.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ptq.evaluation.gate import HEADLINES
from ptq.report.cells import drop_phrase, fixed, interval_text
from ptq.report.charts import nights_png
from ptq.report.markdown import markdown_text, pipe_table
from ptq.report.page_parts import Tile, data_uri, page_of
from ptq.service.nightly_results import Night, NightFindings

NIGHTS_IN_MARKDOWN = 30
TEXT_IN_MARKDOWN = 160

# Not broken at its hyphen, where a column is narrow.
_TOP1 = "top\N{NON-BREAKING HYPHEN}1"
_DECISIONS = {
    "accept": "Accepted", "reject": "Rejected", "regress": "Regressed", "inconclusive": "Inconclusive",
    "failed": "Failed",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """A night as finished text: one cell a column, and why nothing was published."""

    cells: tuple[str, ...]
    reason: str
    is_bad: bool
    begins: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture as an address that needs no file, and what it shows in words."""

    address: str
    description: str


def headline(nights: Sequence[Night]) -> str:
    """Returns the verdict of the last night in one sentence.

    Raises:
        ValueError: there is no night.
    """
    last = _last_of(nights)
    when, found = _moment(last), last.found
    if found is None:
        return f"{when}: failed, nothing was published: {last.reason}"
    fact = f"INT8 reaches {fixed(found.top1_percent, 2)} % top-1, {drop_phrase(found.drop_pp)}"
    if last.decision == "accept":
        state = "is published" if found.is_new else "was in service before and stays"
        return f"{when}: accepted, version {found.version[:8]} {state}; {fact}."
    stays = "" if last.decision == "reject" else ", which stays"
    return f"{when}: {HEADLINES[last.decision]}{stays}; {fact}."


def history_html(nights: Sequence[Night]) -> str:
    """Returns the page as one HTML file: styles and pictures inside, no script, nothing loaded.

    Args:
        nights: those of one model, oldest first.

    Raises:
        ValueError: there is no night.
    """
    last = _last_of(nights)
    return page_of(
        "nightly.html.j2",
        model=last.model,
        headline=headline(nights),
        is_bad=last.decision != "accept",
        reason=last.reason if last.found else "",
        span=_span(nights),
        tiles=_tiles(nights),
        places=_places(nights),
        charts=_charts(nights),
        columns=_columns(nights),
        rows=_rows(nights),
    )


def history_markdown(nights: Sequence[Night]) -> str:
    """Returns the last nights as Markdown with the chart of top-1 inside; below 200 KB.

    Args:
        nights: those of one model, oldest first.

    Raises:
        ValueError: there is no night.
    """
    last, places = _last_of(nights), _places(nights)
    columns = (*_columns(nights), "Why")
    rules = ["---", "---", "---", *["---:"] * (len(columns) - 4), "---"]
    rows = [
        [f"**{cell}**" if row.is_bad and cell else cell for cell in row.cells] + [_markdown(row.reason)]
        for row in _rows(nights)[:NIGHTS_IN_MARKDOWN]
    ]
    chart = _top1_chart(nights)
    parts = [f"# Nightly quantization of {_markdown(last.model)}", f"**{_markdown(headline(nights), limit=1000)}**"]
    parts += [f"![{chart.description}]({chart.address})", pipe_table(columns, rules, rows)]
    if len(places) > 1:
        parts.append(_ABOUT_PLACES)
    parts.append("\n".join(f"- {letter}: {_markdown(place)}" for place, letter in places.items()))
    return "\n\n".join(parts) + "\n"


_ABOUT_PLACES = "Latencies can be compared only where the letter is the same."


def _last_of(nights: Sequence[Night]) -> Night:
    if not nights:
        raise ValueError("A page of nights got none. Expected at least one, the one that has ended.")
    return nights[-1]


def _moment(night: Night) -> str:
    return f"{datetime.fromisoformat(night.started_at):%Y-%m-%d %H:%M} UTC"


def _span(nights: Sequence[Night]) -> str:
    found = Counter[str](night.decision for night in nights)
    counts = [f"{found[name]} {text.lower()}" for name, text in _DECISIONS.items() if found[name]]
    first, last = (datetime.fromisoformat(night.started_at).date() for night in (nights[0], nights[-1]))
    days = str(last) if first == last else f"{first} to {last}"
    return f"{len(nights)} {'night' if len(nights) == 1 else 'nights'} · {days} · {' · '.join(counts)}"


def _places(nights: Sequence[Night]) -> dict[str, str]:
    """A letter for each machine and engine on which latencies were measured, in the order of their first night."""
    names = dict.fromkeys(_place(night.found) for night in nights if night.found)
    return {name: _letter(index) for index, name in enumerate(names)}


def _place(found: NightFindings) -> str:
    return f"{found.machine}; {found.engine}"


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _changes(nights: Sequence[Night]) -> dict[int, tuple[str, str]]:
    """The nights that measured elsewhere than the one before them: the letters before and from there on."""
    places, before, changes = _places(nights), "", {}
    for index, night in enumerate(nights):
        if night.found is None:
            continue
        letter = places[_place(night.found)]
        if before and letter != before:
            changes[index] = (before, letter)
        before = letter
    return changes


def _batch_sizes(nights: Sequence[Night]) -> list[int]:
    return sorted({each.batch_size for night in nights if night.found for each in night.found.latencies})


def _int8_ms(night: Night, batch_size: int) -> float | None:
    latencies = night.found.latencies if night.found else ()
    return next((each.int8_ms for each in latencies if each.batch_size == batch_size), None)


def _duration(seconds: float) -> str:
    """How long something took.

    >>> _duration(7.25), _duration(92), _duration(7384)
    ('7.2 s', '1 min 32 s', '2 h 03 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else fixed(value, 3 if value < 1 else 2 if value < 100 else 0)


def _columns(nights: Sequence[Night]) -> tuple[str, ...]:
    latencies = [f"INT8 batch {size}, ms" for size in _batch_sizes(nights)]
    names = (
        "Started, UTC",
        "Decision",
        "Version",
        f"INT8 {_TOP1}, %",
        f"FP32 {_TOP1}, %",
        "Drop, pp",
        "95 % interval, pp",
    )
    return (*names, *latencies, "Measured on", "Duration", "Stages cached", "Images decoded")


def _rows(nights: Sequence[Night]) -> list[HistoryRow]:
    """The nights, newest first."""
    places, changes, sizes = _places(nights), _changes(nights), _batch_sizes(nights)
    rows = []
    for index, night in enumerate(nights):
        found = night.found
        decision = "Accepted, new" if found and found.is_new else _DECISIONS[night.decision]
        numbers = [
            found.version[:8], fixed(found.top1_percent, 2), fixed(found.fp32_top1_percent, 2), fixed(found.drop_pp, 2),
            interval_text(found.drop_interval_pp), *(_milliseconds(_int8_ms(night, size)) for size in sizes),
            places[_place(found)],
        ] if found else [""] * (6 + len(sizes))  # fmt: skip
        cells = (
            _moment(night).removesuffix(" UTC"), decision, *numbers, _duration(night.seconds),
            f"{night.cached_stages} of {night.stages}", f"{night.images_decoded:,}",
        )  # fmt: skip
        reason = f"{night.reason} (run {night.run_id})" if night.reason else ""
        before, after = changes.get(index, ("", ""))
        begins = f"Latencies below were measured on {before}, those above on {after}." if after else ""
        rows.append(HistoryRow(cells, reason, night.decision != "accept", begins))
    return rows[::-1]


def _tiles(nights: Sequence[Night]) -> list[Tile]:
    """Numbers of the last night, or where it failed of the last one that came to a verdict."""
    last = nights[-1]
    measured = next((night for night in reversed(nights) if night.found), None)
    tiles = []
    if measured is not None and measured.found is not None:
        found, note = measured.found, "" if measured is last else f"on {_moment(measured)[:10]}; "
        is_bad = measured.decision != "accept"
        bounds = interval_text(found.drop_interval_pp)
        top1 = f"{note}FP32 {fixed(found.fp32_top1_percent, 2)} %, {found.test_images:,} images"
        tiles.append(Tile("Top-1, INT8", f"{fixed(found.top1_percent, 2)} %", top1, is_bad))
        tiles.append(Tile("Accuracy drop", f"{fixed(found.drop_pp, 2)} pp", f"{note}95 % interval {bounds} pp", is_bad))
        for each in found.latencies:
            if each.int8_ms is not None:
                detail = f"FP32 {_milliseconds(each.fp32_ms)} ms" if each.fp32_ms else "FP32 not measured"
                label = f"Latency, INT8, batch {each.batch_size}"
                tiles.append(Tile(label, f"{_milliseconds(each.int8_ms)} ms", note + detail))
    stages = f"{last.cached_stages} of {last.stages} stages cached, {last.images_decoded:,} images decoded"
    return [*tiles, Tile("Duration", _duration(last.seconds), stages, last.decision == "failed")]


def _charts(nights: Sequence[Night]) -> list[Chart]:
    bad, labels = _bad(nights), _labels(nights)
    changes = {index: f"on {letter}" for index, (_, letter) in _changes(nights).items()}
    charts = [_top1_chart(nights)]
    for size in _batch_sizes(nights):
        png = nights_png(
            {"INT8": [_int8_ms(night, size) for night in nights]}, labels=labels, bad=bad, changes=changes,
            title=f"INT8 latency, batch {size}, ms", is_from_zero=True,
        )  # fmt: skip
        charts.append(Chart(data_uri(png), f"Median INT8 latency at batch {size} over the nights"))
    longest = max(night.seconds for night in nights)
    unit, per_unit = ("min", 60.0) if longest >= 120 else ("s", 1.0)
    png = nights_png(
        {"duration": [night.seconds / per_unit for night in nights]}, labels=labels, bad=bad, title=f"Duration, {unit}",
        is_from_zero=True, is_bar=True,
    )  # fmt: skip
    return [*charts, Chart(data_uri(png), "Duration of the runs over the nights")]


def _top1_chart(nights: Sequence[Night]) -> Chart:
    lines: Mapping[str, list[float | None]] = {
        "INT8": [night.found.top1_percent if night.found else None for night in nights],
        "FP32": [night.found.fp32_top1_percent if night.found else None for night in nights],
    }
    png = nights_png(lines, labels=_labels(nights), bad=_bad(nights), title="Top-1, %", is_from_zero=False)
    return Chart(data_uri(png), "Top-1 of INT8 and FP32 over the nights")


def _bad(nights: Sequence[Night]) -> list[int]:
    return [index for index, night in enumerate(nights) if night.decision != "accept"]


def _labels(nights: Sequence[Night]) -> list[str]:
    """The day below each night, and the time where there are several on one day."""
    moments = [datetime.fromisoformat(night.started_at) for night in nights]
    is_daily = len({moment.date() for moment in moments}) == len(moments)
    return [
        f"{moment.day} {moment:%b}" if is_daily else f"{moment.day} {moment:%b}\n{moment:%H:%M}" for moment in moments
    ]


def _markdown(text: str, *, limit: int = TEXT_IN_MARKDOWN) -> str:
    """Text cut to what a cell holds, for Markdown."""
    return markdown_text(text if len(text) <= limit else f"{text[: limit - 1]}…")
