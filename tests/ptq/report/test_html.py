"""Does the page of a run need nothing else, and show what stands out?"""

import base64
import dataclasses
import io
import re

from PIL import Image
from report_inputs import Page, benchmark, engine, hostile_inputs, make_inputs, many_classes, measurement, verdict

from ptq.report.charts import box_plot_png, report_box_plot_png
from ptq.report.html import html_report
from ptq.report.markdown import markdown_report


def test_the_accepted_banner_is_green_and_the_rejected_one_red(html):
    rejected = html_report(make_inputs(verdict=verdict(accepted=False)))
    assert '<section class="verdict" ' in html
    assert '<section class="verdict rejected" ' in rejected
    assert "<title>Rejected: INT8 quantization of resnet50</title>" in rejected


def test_shared_amax_tables_are_counted_below_the_trials(html):
    assert "1 of 4 candidates have the amax table of another" in html


def test_a_confusion_matrix_is_drawn_for_fp32_and_int8(page):
    assert page.table("Confusion matrix: FP32") == [["NORMAL", "150", "84"], ["PNEUMONIA", "10", "380"]]
    assert page.table("Confusion matrix: INT8") == [["NORMAL", "148", "86"], ["PNEUMONIA", "9", "381"]]


def test_many_layers_at_fault_are_cut_in_the_sentence_and_listed_whole_below():
    layers = tuple(f"layer{i}.conv" for i in range(12))
    slow = benchmark(measurement("fp32", 1, 4.0), measurement("int8", 1, 5.0))
    html = html_report(make_inputs(benchmark=slow, engines=(engine("int8", 1, float_layers=layers),)))
    assert "layer6.conv, layer7.conv and 4 more; the engine converts" in html
    assert "<li><code>layer11.conv</code></li>" in html


def test_findings_come_with_their_remedy_and_notes_are_folded(html, page):
    assert page.table("Errors and warnings") == [
        ["warning", "float-island", "add_3", "add_3 runs in float.", "Quantize it."]
    ]
    assert page.table("Notes") == [["info", "opset", "whole graph", "Opset 17.", "None needed."]]
    assert (
        html.index("Notes of the checks: 1</summary>")
        < html.index("Opset 17.")
        < html.index("</details>", html.index("Opset"))
    )


def test_a_calibration_of_fixed_length_has_no_table_of_what_layers_needed(html):
    assert "Images each layer needed" not in html + markdown_report(make_inputs())


def test_the_head_names_the_instruction_set():
    machine = {"name": "openvino", "version": "2026.4.0", "device": "a server CPU", "isa": "avx2"}
    html = html_report(make_inputs(verdict=verdict(engine=machine)))
    assert "Run run-7 · openvino 2026.4.0 on a server CPU (avx2)" in html


def test_the_configuration_is_folded_into_the_page(html):
    assert "<summary>Configuration as YAML</summary>\n<pre>model:\n  name: resnet50\n</pre>" in html


def test_warnings_of_every_stage_are_listed_once():
    repeated = make_inputs(warnings=("Half of the images are grey.", "The clock moved."))
    html = html_report(repeated)
    box = html[html.index('aria-label="Warnings"') : html.index('id="accuracy"')]
    assert re.findall(r"<li>(.*?)</li>", box) == [
        "Half of the images are grey.",
        "The clock moved.",
        "Class PNEUMONIA is never drawn.",
        "One residual add is left in float.",
    ]


def test_every_table_of_the_page_has_a_caption(html, page):
    assert len(page.tables) >= 18
    assert "" not in page.tables
    assert html.count("<table") == html.count("<caption>") == len(page.tables)


def test_the_page_loads_nothing_and_runs_nothing(html, page):
    loading = [value for _, name, value in page.attributes if name in {"src", "srcset", "data", "poster", "background"}]
    links = [value for _, name, value in page.attributes if name in {"href", "action", "xlink:href"}]
    assert len(loading) == 2
    assert all(value.startswith("data:image/png;base64,") for value in loading)
    assert all(value.startswith("#") for value in links)
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert re.search(r"@import|url\(", html) is None


def test_every_link_of_the_page_leads_somewhere(page):
    targets = {value for _, name, value in page.attributes if name == "id"}
    links = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert len(links) == 9
    assert links <= targets


def test_the_pictures_in_the_page_decode(html):
    first, second = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    with (
        Image.open(io.BytesIO(base64.b64decode(first))) as box_plot,
        Image.open(io.BytesIO(base64.b64decode(second))) as bars,
    ):
        assert box_plot.size == (660, 385)
        assert bars.size[0] == 660


def test_the_same_records_give_the_same_page(html):
    assert html_report(make_inputs()) == html


def test_markup_in_names_and_messages_is_escaped_in_the_page():
    html = html_report(hostile_inputs())
    page = Page(html)
    assert "<script" not in html
    assert page.tags.count("img") == 2
    assert html.count("&lt;script&gt;") > 25


def test_seven_classes_are_numbered_above_the_columns():
    page = Page(html_report(many_classes(8)))
    rows = page.table("Confusion matrix: INT8")
    assert rows[7] == ["7 · class number 7", "2", "0", "0", "0", "0", "0", "0", "8"]


def test_a_thousand_classes_show_only_what_changed_most():
    html = html_report(many_classes(1000))
    page = Page(html)
    assert len(html) < 2_000_000
    assert not any(title.startswith("Confusion matrix") for title in page.tables)
    assert page.table("The 2 most confused pairs") == [
        ["class number 7", "class number 0", "0", "2", "+2"],
        ["class number 3", "class number 0", "0", "1", "+1"],
    ]
    rows = page.table("Recall and precision per class on test, %: the 20 of 1,000 classes that lost most recall")
    assert len(rows) == 20
    assert rows[0][:5] == ["class number 7", "10", "100.00", "80.00", "-20.00"]
    assert rows[1][:5] == ["class number 3", "10", "100.00", "90.00", "-10.00"]


def test_a_report_without_measurements_says_so():
    record = dataclasses.replace(benchmark(), measurements=())
    assert "Nothing was measured." in html_report(make_inputs(benchmark=record))


def test_the_box_plot_file_is_the_picture_of_the_page(html):
    png = report_box_plot_png(make_inputs())
    assert base64.b64encode(png).decode() in html
    assert png == box_plot_png(
        {"max": [79.01, 79.01], "entropy": [84.29, 84.78]},
        fp32_top1_percent=84.94,
        title="resnet50: test, 3 draws of 3 images",
    )
