"""Texts come as documents, with prose as it is written."""

import pytest

from jaxweights.recipes import load_text, read_text_file, reflow_paragraphs
from jaxweights.recipes._texts import untag


def test_reflowing_joins_lines_and_keeps_paragraphs():
    assert reflow_paragraphs("a\nb\r\nc\n \n\n\td  e\n") == "a b c\n\nd e"


def test_reflowing_twice_changes_nothing():
    once = reflow_paragraphs("one\ntwo\n\n\nthree\n four")
    assert reflow_paragraphs(once) == once


def test_brown_loses_its_tags_and_gets_its_punctuation_back():
    tagged = (
        "\n\n\tThe/at House/nn-tl (/( 1/2/cd of/in it/pps )/) ''/'' :/: ``/`` Yes/rb ''/'' ;/.\n"
    )
    assert untag(tagged) == 'The House (1/2 of it)": "Yes";'


def test_pydoc_topics_are_the_same_text_in_every_run():
    first, second = load_text("pydoc-topics"), load_text("pydoc-topics")
    assert first == second
    assert any("assert_stmt" in document for document in first.documents)


def test_hard_line_breaks_are_kept_on_request():
    flowed = load_text("pydoc-topics")
    raw = load_text("pydoc-topics", reflow=False)
    assert raw.whole.count("\n") > 2 * flowed.whole.count("\n")
    assert raw.whole.split() == flowed.whole.split()


def test_a_file_of_ones_own_is_one_document(tmp_path):
    (tmp_path / "notes.txt").write_text("Some\nnotes.", encoding="utf-8")
    text = read_text_file(tmp_path / "notes.txt")
    assert (text.name, text.documents) == ("notes.txt", ("Some notes.",))


@pytest.mark.parametrize(
    "content, words",
    [(b"\xff\xfe", "not UTF-8 text .* Convert it first"), (b" \n", "holds no words")],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, words):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_text_file(tmp_path / "notes.txt")


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        read_text_file(tmp_path / "absent.txt")
