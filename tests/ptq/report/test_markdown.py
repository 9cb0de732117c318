"""Does Markdown say the same as the page, and nothing that breaks it?"""

import re

from report_inputs import benchmark, hostile_inputs, make_inputs, measurement, selection

from ptq.records.evaluation import FlippedImage
from ptq.report.inputs import verdict_sentence
from ptq.report.markdown import markdown_report


def test_markup_in_names_and_messages_is_escaped_in_markdown():
    markdown = markdown_report(hostile_inputs())
    assert re.search(r"<\w", markdown) is None
    assert "&lt;script&gt;" in markdown


def test_markdown_holds_the_same_numbers_and_points_at_the_picture():
    markdown = markdown_report(make_inputs())
    assert verdict_sentence(make_inputs()) in markdown
    assert "| Top-1, % | 84.94 | 84.78 | -0.16 |" in markdown
    assert "| INT8 | 1 | 3.00 | 3.03 | 3.30 | 3.60 | 3.90 | 333.3 | -75.0 | +300.0 |" in markdown
    assert "| --- | ---: | ---: | ---: |" in markdown
    assert "](boxplot.png)" in markdown
    assert "- Class PNEUMONIA is never drawn." in markdown


def test_a_bar_in_a_name_does_not_break_a_markdown_table():
    images = (FlippedImage("a|b.png", label=0, fp32_prediction=0, int8_prediction=1),)
    assert r"| a\|b.png | NORMAL |" in markdown_report(make_inputs(selection=selection(flipped_images=images)))


def test_a_slow_int8_is_bold_in_markdown():
    slow = benchmark(measurement("fp32", 1, 4.0), measurement("int8", 1, 5.0))
    assert "**INT8 is slower than FP32 at batch 1: 5.00 ms against 4.00 ms, 25.0 % longer." in markdown_report(
        make_inputs(benchmark=slow)
    )
