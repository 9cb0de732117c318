"""Who is told, and when is telling tried again?"""

from types import SimpleNamespace

import pytest

from ptq.errors import CalibrationError
from tasks.service.notices import is_transient


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ConnectionError("reset"), True), (CalibrationError("no image"), False), (KeyError(), False)],
)
def test_only_transport_faults_are_worth_another_attempt(error, expected):
    state = SimpleNamespace(result=lambda raise_on_failure: error)
    assert is_transient(None, None, state) is expected
