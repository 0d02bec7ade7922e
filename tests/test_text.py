"""Pieces of what commands print."""

import pytest

from anyflow_train import text
from anyflow_train.config.overrides import parse


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


def test_a_table_fits_into_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "\n".join(["a long line of words", *text.markdown_table([["a", "bc", "d"], ["1", "23", "4"]])])
    assert text.fit_terminal(table) == table  # not a terminal
    monkeypatch.setattr(text.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "14")
    assert text.fit_terminal(table) == table
    monkeypatch.setenv("COLUMNS", "13")
    lines = text.fit_terminal(table).splitlines()
    assert lines[:4] == ["a long line of words", "| a | bc |", "|---|----|", "| 1 | 23 |"]
    assert lines[4:] == ["(columns that this terminal has no room for are in the file)"]


def test_one_call_is_no_plural() -> None:
    assert [text.calls(count) for count in (1, 4)] == ["1 call", "4 calls"]


def test_lines_begin_with_the_seconds_since_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    text.timed_printer()("begun")
    assert capsys.readouterr().out == "[   0.0 s] begun\n"


@pytest.mark.parametrize("value", ["a'b", r"a\b", "a\\", r"a\'b", r"\\a\\", "a, b: {c} = [d]"])
def test_a_quoted_text_is_read_as_it_is(value: str) -> None:
    settings, errors = parse([f"out={text.quoted(value)}"])
    assert not errors
    assert settings[0].value == value
