import pytest

pytest.register_assert_rewrite("checked_graphs")
