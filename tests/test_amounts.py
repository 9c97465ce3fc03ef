"""Rounding never turns something into nothing, or a part into the whole."""

import pytest

from lorakit.amounts import decimal_bytes, duration, gibibyte_cell, gibibytes, percent, price


@pytest.mark.parametrize(
    ("share", "digits", "written"),
    [
        (0, 0, "0%"),
        (0.0004, 0, "<1%"),
        (0.0004, 1, "<0.1%"),
        (0.25, 0, "25%"),
        (0.9996, 0, ">99%"),
        (0.9996, 1, ">99.9%"),
        (0.9996, 2, "99.96%"),
        (1, 1, "100.0%"),
        (-0.5, 0, "-50%"),
    ],
)
def test_a_share_is_nothing_or_all_only_where_it_is(share, digits, written):
    assert percent(share, digits) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "0 s"),
        (0.004, "0.0040 s"),
        (0.45, "0.45 s"),
        (4.04, "4.0 s"),
        (45, "45 s"),
        (600, "10 min"),
        (9000, "2.5 h"),
    ],
)
def test_a_time_is_zero_only_where_it_is(seconds, written):
    assert duration(seconds) == written


@pytest.mark.parametrize(
    ("amount", "written"), [(0, "0.00"), (0.00042, "0.00042"), (0.0449, "0.045"), (0.5, "0.50"), (1234.5, "1,234.50")]
)
def test_a_price_is_zero_only_where_it_is(amount, written):
    assert price(amount) == written


def test_bytes_are_zero_only_where_they_are():
    assert gibibytes(0) == "0 KiB" and gibibytes(3) == "1 KiB" and gibibytes(2**30) == "1.0 GiB"
    assert gibibyte_cell(0) == "0.00" and gibibyte_cell(2**20) == "<0.01" and gibibyte_cell(2**30) == "1.00"
    assert decimal_bytes(1500) == "1.5 kB" and decimal_bytes(0) == "0.0 kB"
