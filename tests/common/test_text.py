"""Sizes and durations as text and back, and URLs without their secrets."""

from __future__ import annotations

import pytest

from dvla.common.text import duration, markdown, parse_size, printable, public
from dvla.errors import UserError


def test_sizes() -> None:
    assert [parse_size(t) for t in ("1GiB", "500 MB", "1.5kib", "77", "1tb")] == [2**30, 5 * 10**8, 1536, 77, 10**12]
    for bad in ("", "GiB", "-1", "1 parsec", "0", "1e9", "nan"):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(bad)


def test_durations() -> None:
    assert [duration(s) for s in (45, 600, 9000, 60 * 86400)] == ["45 s", "10.0 min", "2.5 h", "60.0 days"]


def test_secrets_in_addresses_are_left_out() -> None:
    settings = {
        "cache": "s3://key:secret@host/bucket?token=abc",
        "nested": {"list": ["https://user@host/x", "runs/a@b?c"]},
        "steps": 3,
    }
    assert public(settings) == {
        "cache": "s3://host/bucket",
        "nested": {"list": ["https://host/x", "runs/a@b?c"]},
        "steps": 3,
    }


def test_an_address_within_a_message_is_cut_where_it_ends() -> None:
    said = "did you mean 's3://me:x@host/b?sig=1'? see https://host/a; http://u:p@h/c?t=9, or ask?"
    assert public(said) == "did you mean 's3://host/b'? see https://host/a; http://h/c, or ask?"


def test_what_a_terminal_would_obey_is_replaced() -> None:
    assert printable("a\x1b[31m\x07\r\x9bb\u202e\udc80\tc\nd é→") == "a�[31m���b��\tc\nd é→"


def test_what_a_card_would_obey_is_escaped() -> None:
    assert markdown("MIT | <b>\n# [x](y)") == "MIT \\| \\<b\\> # \\[x\\](y)"
    assert markdown("two_ways-2.0") == "two_ways-2.0"
