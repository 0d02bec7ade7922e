"""Pieces of what commands print."""

import pytest

from anyflow_train import text


def test_the_nearest_name_is_found_where_one_is_near() -> None:
    assert text.nearest("tran", ["train", "plan", "sample"]) == "train"
    assert text.nearest("xyz", ["train", "plan"]) is None
    assert text.nearest("xyz", ["train", "z"], cutoff=0.0) == "z"
    assert text.nearest_hint("tran", ["train"]) == "; nearest is 'train'"
    assert text.nearest_hint("xyz", ["train"]) == ""


def test_a_table_lines_up_and_has_its_rule_under_the_head() -> None:
    assert text.markdown_table([["a", "number"], ["long", "1"]]) == [
        "| a    | number |",
        "|------|--------|",
        "| long | 1      |",
    ]


def test_one_call_is_no_plural() -> None:
    assert [text.calls(count) for count in (1, 4)] == ["1 call", "4 calls"]


def test_lines_begin_with_the_seconds_since_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    text.timed_printer()("begun")
    assert capsys.readouterr().out == "[   0.0 s] begun\n"
