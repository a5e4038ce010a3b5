"""What is doubtful in data is said before training and evaluation."""

import unicodedata
from pathlib import Path

import pytest
from tokenizers import normalizers

from context_qa.answering import stop_tokens
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


def warnings(data, tokenizer, max_new_tokens=None) -> list[str]:
    return list(data_warnings(data, tokenizer, stop_tokens(tokenizer), max_new_tokens))


def test_ordinary_data_is_not_doubted(tokenizer):
    data = read_examples(str(ROOT / "data/demo/validation.jsonl"))
    assert warnings(data, tokenizer, 16) == []


def test_ids_that_are_there_twice_are_counted(tokenizer):
    data = examples("x", "y", "z")
    data = [Example("q7", e.context, e.question, e.answers) for e in data[:2]] + data[2:]
    [warning] = warnings(data, tokenizer)
    assert warning == "1 ids are there more than once, such as 'q7'"


@pytest.mark.parametrize("answer", ["A", "+", "the", "::::", "?!", "An."])
def test_references_that_normalise_to_nothing_are_counted(answer, tokenizer):
    data = examples("x", answer, (answer, "x"))
    [warning] = warnings(data, tokenizer)
    assert warning.startswith("1 questions have no reference but") and "(id 'q1')" in warning


@pytest.mark.parametrize("answer", ["12 Elm Street\nSpringfield", "x\n", "\nb", "one\r\ntwo"])
def test_references_over_a_lines_end_are_counted(answer, tokenizer):
    """Trained for as long as one likes, no guess is one of them."""
    found = warnings(examples("x", answer), tokenizer)
    right_without_it = answer.strip() == "x"
    assert len(found) == (0 if right_without_it else 1)
    if found:
        assert found[0].startswith("1 questions have no reference that a guess can be, such as ")
        assert "decoding ends at a line's end" in found[0] and repr(answer) in found[0]


def test_references_longer_than_a_guess_are_counted(tokenizer):
    data = examples("one", "one two three four five six seven", ("one two three four", "one"))
    [warning] = warnings(data, tokenizer, max_new_tokens=3)
    assert warning.startswith("1 questions") and "(id 'q1')" in warning
    assert warnings(data, tokenizer, max_new_tokens=20) == []


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
