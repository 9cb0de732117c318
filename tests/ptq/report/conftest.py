"""The page of an accepted run."""

import pytest
from report_inputs import Page, make_inputs

from ptq.report.html import html_report


@pytest.fixture(scope="module")
def html():
    return html_report(make_inputs())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)
