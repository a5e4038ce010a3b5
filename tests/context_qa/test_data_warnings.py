"""Warnings about data before training and evaluation."""

import unicodedata
from pathlib import Path

import pytest
from tokenizers import normalizers

from context_qa.data_warnings import data_warnings
from mamba_lm.checkpoint import load_tokenizer
from squad_utils import Example, read_examples

ROOT = Path(__file__).parents[2]
CASES = ROOT.parent / "shared/cases"
DEMO = str(ROOT / "data/demo/tokenizer")


def examples(*answers: str | tuple[str, ...]) -> list[Example]:
    rows = [(one,) if isinstance(one, str) else one for one in answers]
    return [Example(f"q{i}", f"Context {i}.", f"Who {i}?", row) for i, row in enumerate(rows)]


@pytest.fixture
def tokenizer():
    return load_tokenizer("", DEMO)


@pytest.fixture
def composing(tokenizer):
    """Writes characters composed, as GPT-NeoX's tokenizer does."""
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def warnings(data, tokenizer, max_new_tokens=64, **of) -> list[str]:
    found = list(data_warnings("f.jsonl", data, tokenizer, max_new_tokens, **of))
    assert all(warning.startswith("f.jsonl: ") and " --" not in warning for warning in found)
    return [warning.removeprefix("f.jsonl: ") for warning in found]


def test_ordinary_data_gives_no_warnings(tokenizer):
    data = read_examples(str(ROOT / "data/demo/validation.jsonl"))
    assert warnings(data, tokenizer, 16) == []


def test_ids_that_are_there_twice_are_counted(tokenizer):
    data = examples("x", "y", "z")
    data = [Example("q7", e.context, e.question, e.answers) for e in data[:2]] + data[2:]
    [warning] = warnings(data, tokenizer)
    assert warning == "1 id occurs more than once: 'q7'"
    [warning] = warnings(data + data[:2] + data[2:], tokenizer)
    assert warning == "2 ids occur more than once, such as 'q7'"


@pytest.mark.parametrize("answer", ["A", "+", "the", "::::", "?!", "An."])
def test_references_that_normalise_to_nothing_are_counted(answer, tokenizer):
    data = examples("x", answer, (answer, "x"))
    [warning] = warnings(data, tokenizer)
    assert warning == (
        f"1 question has no reference but articles and punctuation: {answer!r} (id 'q1'). "
        "The official script scores it as if abstaining were right"
    )


@pytest.mark.parametrize("answer", ["12 Elm Street\nSpringfield", "x\n", "\nb", "one\r\ntwo"])
def test_references_over_a_lines_end_are_counted(answer, tokenizer):
    """Trained for as long as one likes, no guess is one of them."""
    found = warnings(examples("x", answer), tokenizer)
    right_without_it = answer.strip() == "x"
    assert len(found) == (0 if right_without_it else 1)
    if found:
        said = f"1 question has no reference that a guess can match: {answer!r} (id 'q1')"
        assert found[0].startswith(said) and "cut at the end of a line" in found[0]


def test_references_longer_than_a_guess_are_counted(tokenizer):
    data = examples("one", "one two three four five six seven", ("one two three four", "one"))
    [warning] = warnings(data, tokenizer, max_new_tokens=3)
    assert warning.startswith("1 question ") and "(id 'q1'), of which a guess can be" in warning
    assert "after 3 tokens" in warning
    [warning] = warnings(examples("one two " * 40 + "end"), tokenizer, max_new_tokens=60)
    assert " ... " in warning and "one two end' (id" in warning and "of which a guess" in warning
    assert warnings(data, tokenizer, max_new_tokens=20) == []


def test_training_teaches_the_first_reference_alone(tokenizer):
    data = examples("x", ("one\ntwo", "one two"), ("one two", "one\ntwo"), ("x\n", "y"))
    assert warnings(data, tokenizer) == []
    [warning] = warnings(data, tokenizer, is_training=True)
    said = "1 question teaches an answer that no guess can be: 'one\\ntwo' (id 'q1'), of which"
    assert warning.startswith(f"{said} a guess can be 'one'. An answer is cut at the end of a line")
    data = examples("a\nb", "c\nd", ("one\n", "one"))
    [warning] = warnings(data, tokenizer, is_training=True)
    assert warning.startswith("2 questions teach an answer that no guess can be, such as 'a\\nb'")


def test_spans_of_the_context_are_checked_too(tokenizer):
    context = "Bo lives in 12 Elm\nStreet with the red cat."

    def found(*answers: str, limit: int = 64) -> list[str]:
        data = [Example("q0", context, "Where?", answers)]
        return warnings(data, tokenizer, limit, is_constrained=True)

    assert found("red cat") == found("a Red cat") == found("blue", "red cat") == []
    [warning] = found("blue cat")
    assert warning.startswith("1 question has no reference that a guess can match: 'blue cat' (id ")
    assert "or it is not in its context" in warning
    assert "cut at the end of a line" in found("12 Elm\nStreet")[0]
    assert len(found("12 Elm Street")) == 1
    assert "after 2 tokens" in found("Bo lives in 12 Elm", limit=2)[0]


def test_references_in_another_unicode_form_are_counted(composing):
    answers = ["Zoé Brûlé", "Peña Ibáñez", "plain"]
    decomposed = [unicodedata.normalize("NFD", answer) for answer in answers]
    assert warnings(examples(*answers), composing) == []
    [warning] = warnings(examples(*decomposed), composing)
    assert warning.startswith("2 questions") and "other Unicode characters" in warning
    assert "folded_exact_match" in warning


@pytest.mark.skipif(not CASES.exists(), reason=f"cases not present: {CASES}")
def test_the_cases_from_outside(composing):
    def said(name: str) -> list[str]:
        return warnings(read_examples(str(CASES / name)), composing, 64)

    assert said("accents_nfc.jsonl") == []
    assert len(said("accents_nfd.jsonl")) == 1 and "4 questions" in said("accents_nfd.jsonl")[0]
    assert (
        len(said("newline_answers.jsonl")) == 1
        and "2 questions" in (said("newline_answers.jsonl")[0])
    )
    assert said("ids_with_tags.jsonl") == said("curly.jsonl") == []
    [curly] = read_examples(str(CASES / "curly.jsonl"))
    assert not curly.is_answerable
