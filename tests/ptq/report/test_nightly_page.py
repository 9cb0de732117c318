"""Does the page of nights say which night went how, alone and offline?"""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import pytest

from ptq.report.nightly_page import headline, history_html, history_markdown
from ptq.service.nightly_results import Night, NightFindings, NightLatency

FOUND = NightFindings(
    version="62c0b78d59277ce1", is_new=False, fp32_top1_percent=98.0, top1_percent=97.5, drop_pp=0.5,
    drop_interval_pp=(-0.1, 1.1), test_images=400, latencies=(NightLatency(1, 0.5, 1.5), NightLatency(32, 9.0, None)),
    engine="openvino 2026.4", machine="one machine",
)  # fmt: skip
ACCEPTED = Night(
    started_at="2026-11-24T02:00:00+00:00", model="digits", run_id="wise-owl", decision="accept", reason="",
    seconds=61.5, stages=30, cached_stages=12, images_decoded=112, found=FOUND,
)  # fmt: skip
NEW = replace(ACCEPTED, found=replace(FOUND, is_new=True))
REGRESSED = replace(ACCEPTED, decision="regress", reason="it is worse", run_id="red-fox")
FAILED = replace(ACCEPTED, decision="failed", reason="CheckpointError: cut off", found=None, run_id="red-ant")
ELSEWHERE = replace(ACCEPTED, found=replace(FOUND, machine="another machine"))


def nights(*each):
    """Those nights, one a day."""
    first = datetime(2026, 11, 1, 2, 0, tzinfo=UTC)
    return [replace(night, started_at=(first + timedelta(days=day)).isoformat()) for day, night in enumerate(each)]


class Rows(HTMLParser):
    """The classes and the text of every row of the table."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.found.append([set(dict(attributes).get("class", "").split()), []])

    def handle_data(self, data):
        if self.found and data.strip():
            self.found[-1][1].append(data.strip())


def rows(page, kind="night"):
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    return [(classes, texts) for classes, texts in Rows(table).found if kind in classes]


@pytest.mark.parametrize(
    ("night", "sentence"),
    [
        (NEW, "accepted, version 62c0b78d is published; INT8 reaches 97.50 % top-1, 0.50 pp below FP32."),
        (
            ACCEPTED,
            "accepted, version 62c0b78d was in service before and stays; INT8 reaches 97.50 % top-1, "
            "0.50 pp below FP32.",
        ),
        (
            REGRESSED,
            "the new INT8 model is worse than the one in service, which stays; INT8 reaches 97.50 % top-1, "
            "0.50 pp below FP32.",
        ),
        (FAILED, "failed, nothing was published: CheckpointError: cut off"),
    ],
    ids=["new", "unchanged", "regressed", "failed"],
)
def test_the_headline_is_the_verdict_of_the_last_night(night, sentence):
    assert headline(nights(FAILED, NEW, night)) == f"2026-11-03 02:00 UTC: {sentence}"
    assert f"<p>2026-11-03 02:00 UTC: {sentence}</p>" in history_html(nights(FAILED, NEW, night))


def test_the_table_begins_with_the_newest_night():
    page = history_html(nights(NEW, ACCEPTED, REGRESSED))
    assert [texts[:2] for _, texts in rows(page)] == [
        ["2026-11-03 02:00", "Regressed"],
        ["2026-11-02 02:00", "Accepted"],
        ["2026-11-01 02:00", "Accepted, new"],
    ]


def test_a_row_tells_accuracy_speed_duration_and_what_was_cached():
    ((_, texts),) = rows(history_html([ACCEPTED]))
    assert texts[2:] == [
        "62c0b78d", "97.50", "98.00", "0.50", "-0.1 to 1.1", "0.500", "9.00", "A", "1 min 01 s", "12 of 30", "112",
    ]  # fmt: skip


def test_rejected_and_failed_nights_are_red_with_their_reason_and_their_run():
    page = history_html(nights(NEW, REGRESSED, FAILED))
    assert ["bad" in classes for classes, _ in rows(page)] == [True, True, False]
    assert [texts for _, texts in rows(page, "why")] == [
        ["CheckpointError: cut off (run red-ant)"],
        ["it is worse (run red-fox)"],
    ]


def test_a_night_on_another_machine_is_told_apart():
    page = history_html(nights(NEW, FAILED, ELSEWHERE, ACCEPTED))
    assert [texts for _, texts in rows(page, "begins")] == [
        ["Latencies below were measured on B, those above on A."],
        ["Latencies below were measured on A, those above on B."],
    ]
    assert "<b>A</b>: one machine; openvino 2026.4" in page
    assert "<b>B</b>: another machine; openvino 2026.4" in page
    assert "They can be compared only where the letter is the same." in page


def test_another_version_of_the_engine_is_told_apart():
    newer = replace(ACCEPTED, found=replace(FOUND, engine="openvino 2026.5"))
    assert len(rows(history_html(nights(ACCEPTED, newer)), "begins")) == 1


def test_nights_on_one_machine_need_no_warning():
    page = history_html(nights(NEW, FAILED, ACCEPTED))
    assert rows(page, "begins") == []
    assert "They can be compared only where the letter is the same." not in page


def test_numbers_of_an_earlier_night_carry_its_date():
    assert "on 2026-11-01; FP32 98.00 %, 400 images" in history_html(nights(NEW, FAILED))
    assert "on 2026-11-01; FP32" not in history_html(nights(NEW, ACCEPTED))


def test_the_page_has_a_chart_of_top1_of_each_batch_size_and_of_duration():
    page = history_html(nights(NEW, ACCEPTED))
    assert re.findall(r'<img src="data:image/png;base64,[^"]+" width="660" height="253" alt="([^"]+)">', page) == [
        "Top-1 of INT8 and FP32 over the nights",
        "Median INT8 latency at batch 1 over the nights",
        "Median INT8 latency at batch 32 over the nights",
        "Duration of the runs over the nights",
    ]


def test_a_page_of_failed_nights_alone_can_be_made():
    assert [texts[1] for _, texts in rows(history_html(nights(FAILED, FAILED)))] == ["Failed", "Failed"]


def test_the_page_loads_nothing_and_runs_nothing():
    page = history_html(nights(NEW, FAILED, ELSEWHERE))
    assert re.findall(r"<(?:script|link|iframe|object)|url\(|@import|https?:", page) == []
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^"]+)', page))


def test_text_from_outside_is_escaped():
    odd = replace(FAILED, reason="<script>alert(1)</script>|`x`", model="<b>")
    page, markdown = history_html([odd]), history_markdown([odd])
    assert "<script>" not in page + markdown
    assert r"\|\`x\`" in markdown


def test_the_same_nights_give_the_same_bytes():
    shown = nights(NEW, FAILED, ELSEWHERE)
    assert history_html(shown) == history_html(shown)
    assert history_markdown(shown) == history_markdown(shown)


def test_markdown_has_the_last_30_nights_and_one_chart_below_200_kb():
    wordy = replace(FAILED, reason="x" * 10_000)
    text = history_markdown(nights(*[NEW, wordy] * 45))
    assert len(text.encode()) < 200_000
    assert text.count("data:image/png;base64,") == 1
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 32
    assert lines[2].startswith("| **2027-01-29 02:00** | **Failed** |")
    assert lines[3].startswith("| 2027-01-28 02:00 | Accepted, new | 62c0b78d | 97.50 |")


def test_markdown_tells_machines_apart():
    text = history_markdown(nights(NEW, ELSEWHERE))
    assert "Latencies can be compared only where the letter is the same." in text
    assert "- B: another machine; openvino 2026.4" in text


def test_a_page_without_a_night_is_refused():
    with pytest.raises(ValueError, match="Expected at least one"):
        history_html([])
