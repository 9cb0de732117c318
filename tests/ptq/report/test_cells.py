"""Is a column of numbers known as one?"""

from ptq.report.cells import Table


def test_only_columns_of_numbers_are_set_flush_right():
    table = Table("t", ("name", "value", "mixed"), (("a", "-1,234.5", "1"), ("b", "n/a", "x")))
    assert [table.is_numeric(column) for column in range(3)] == [False, True, False]
