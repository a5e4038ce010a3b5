"""Contexts of negatives: none of them answers the question, as far as words show."""

import json
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest

from context_qa.negatives import (
    NEGATIVE_KINDS,
    NegativeSampler,
    _sentences,
    make_negatives,
    question_words,
    seems_to_answer,
)
from squad_utils import Example, read_examples
from studies.demo_model.make_demo import NUM_VALIDATION_PASSAGES, validation_passages

ROOT = Path(__file__).parents[2]

# An answer, and a context that contains it in another form.
FORMS = [
    ("Zoé Brûlé", unicodedata.normalize("NFD", "It is Zoé Brûlé who runs it.")),
    (unicodedata.normalize("NFD", "Zoé"), "Zoé runs it."),
    ("1998", "Built in １９９８."),
    ("1998", "Built in ١٩٩٨."),
    ("New York", "It is in New\u200bYork."),
    ("New York", "It is in N\u200bew Y\u2060ork."),
    ("Newark", "It is in New\u00adark."),
    ("New York", "It is in New\u00a0York."),
    ("O'Neill", "Its owner is O’Neill."),
    ("O’Neill", "Its owner is O'Neill."),
    ("Anglo-Saxon", "It is Anglo\u2010Saxon."),
    ("1990-95", "From 1990–95."),
    ("ﬁve", "There are five."),
    ("Straße", "In the STRASSE."),
    ("İzmir", "In izmir."),
    ("Henry IV", "Henry Ⅳ did."),
    ("café", "At the cafe."),
    ("+", "It is C++."),
    ("A", "In Vitamin A."),
    ("::", "Written std::vector."),
    ("a+", "It got an A+."),
    ("ｶﾅ", "この カナ です。"),
    ("ガス", unicodedata.normalize("NFD", "このガスは。")),
    ("पानी", "यह पानी है।"),
    ("שלום", "It is ש\u05b8\u05c1לו\u05b9ם."),
]


@pytest.mark.parametrize("answer, context", FORMS, ids=str)
@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_an_answer_in_another_form_is_one(kind, answer, context):
    asked = Example("q", f"{answer} it is.", "Who is it?", (answer,), "T")
    other = Example("o", context, "Is it?", (), "T")
    drawn = [NegativeSampler([asked, other], kind, seed).draw_contexts(0)[0] for seed in range(5)]
    assert drawn == [None] * 5


@pytest.mark.parametrize("kind", ["random", "hard"])
def test_a_context_that_only_looks_alike_is_drawn(kind):
    asked = Example("q", "Rue 1998.", "When?", ("1998",))
    other = Example("o", "In 1999 or 19987 and 1 998.", "Is it?", ())
    assert NegativeSampler([asked, other], kind).draw_contexts(0)[0] == other.context


@pytest.mark.parametrize(
    "answer, context",
    [
        ("A", "Vitamins, all."),
        ("a+", "It got xA+."),
        ("\u200b", "Nothing."),
        ("カス", "このガスは。"),
        ("क", "की है।"),  # of a letter and a vowel sign
        ("105", "It is 10⁵."),
    ],
)
def test_answers_without_words_and_parts_of_letters(answer, context):
    asked = Example("q", f"{answer} it is.", "What?", (answer,))
    other = Example("o", context, "Is it?", ())
    assert NegativeSampler([asked, other]).draw_contexts(0)[0] == context


def test_a_mark_beside_other_references_rules_nothing_out():
    """As in three questions of SQuAD: every context has a full stop."""
    asked = Example("q", "Bo it is.", "Who?", ("Bo", "."))
    other = Example("o", "It is Cy.", "Is it?", ())
    assert NegativeSampler([asked, other]).draw_contexts(0)[0] == other.context


def test_hard_contexts_are_compared_once(monkeypatch):
    compared = []

    def seems(sentences, names, others):
        compared.append(names)
        return False

    monkeypatch.setattr("context_qa.negatives.seems_to_answer", seems)
    sampler = NegativeSampler(
        [Example(str(n), f"Bo{n}.", f"Who{n}?", ()) for n in range(4)], "hard"
    )
    before = len(compared)
    assert None not in sampler.draw_contexts(0)
    assert before > 0 and len(compared) == before


def test_the_same_question_in_another_form_rules_a_context_out():
    context, question = "Zoé is there.", "Who runs the café?"
    asked = Example("a", "Bo is here.", question, ("Bo",))
    same = Example("b", context, unicodedata.normalize("NFD", question.upper()), ("Zoé",))
    assert NegativeSampler([asked, same]).draw_contexts(0)[0] is None


# Draws by row


@pytest.mark.parametrize("kind", NEGATIVE_KINDS)
def test_rows_of_one_id_are_drawn_apart(kind):
    def example(identifier: str, n: int) -> Example:
        return Example(identifier, f"Place{n} is red.", f"What is place{n}?", (f"red{n}",), "T")

    same = [example("same", n) for n in range(40)]
    drawn = NegativeSampler(same, kind, seed=1).draw_contexts(0)
    assert len(set(drawn)) > 10
    others = [example(str(n) if n else "same", n) for n in range(40)]
    assert (
        NegativeSampler(others, kind, seed=1).draw_contexts(0)[0] == drawn[0]
    )  # the first of its id


def test_rows_with_one_id_all_have_negatives():
    rows = [Example("same", f"Place{n} is red{n}.", f"What {n}?", (f"red{n}",)) for n in range(9)]
    negatives = make_negatives(rows, "random")
    assert len(negatives) == 9 and len({n.context for n in negatives}) > 3


# Contexts that answer the question with another value


@pytest.mark.parametrize(
    "question, context, is_stated",
    [
        ("When does Rural Music meet?", "Hello. Rural Music meets on Friday noon.", True),
        ("What is it that RURAL Music costs?", "They say Rural Music costs $20.", True),
        ("Who is the owner of the Wild Swan?", "The Wild Swan is owned by Bo. It is old.", True),
        ("Who owns the Wild Swan?", "The Wild Crown is owned by Bo.", False),  # another one
        ("Who owns the Wild Swan?", "The Wild Swan has 12 rooms. Bo is its owner.", False),
        ("Who owns the Wild Swan?", "The Wild Swan was built in 1902.", False),
        ("Which of Zoé's songs won in 1998?", "In 1998 a song of Zoe's won.", True),
        ("Which song won in 1999?", "In 1998 a song won.", False),
        ("what is the largest river of the province", "Its largest province has a river.", True),
        ("what is the largest river of the province", "The river is long.", False),
        ("Who owns the Wild Swan?", "The Wild Swan is owned by Bo.", True),
        ("Which contest has Bo?", "Bo is in the container.", False),
        ("When is Rural Music meeting?", "Rural Music will meet on Friday.", True),
        ("Which capital has Bo?", "Bo is the captain.", False),
        ("Who commanded Bo?", "Bo has a company.", False),
        ("What is Zo\u200bé paid?", "It paid Zoe\u0301 $3.", True),
        ("What is हिन्दी2?", "The हिन्दी2 is.", True),
        ("why?", "Because.", False),
        ("", "Nothing.", False),
    ],
)
def test_what_seems_to_answer(question, context, is_stated):
    assert seems_to_answer(_sentences(context), *question_words(question)) == is_stated


def test_few_hard_negatives_of_the_demo_are_answered_by_their_context():
    """By what the generator knows: 31 of 800 without looking at names and attributes."""
    passages = {p.context: p for p, _ in validation_passages(NUM_VALIDATION_PASSAGES)}
    path = ROOT / "data/demo/validation.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    examples = read_examples(str(path))
    for row, example in zip(rows, examples, strict=True):  # the generator knows its own questions
        answer = passages[example.context].answer_to(example.question)
        assert answer == (row["response"] if example.is_answerable else None)
    negatives = make_negatives(examples, "hard")
    answered = [passages[c.context].answer_to(c.question) is not None for c in negatives]
    assert len(negatives) == 800 and sum(answered) <= 5


def test_each_answerable_question_has_a_negative_on_a_context_without_its_answer():
    examples = [
        Example(
            f"q{i}", f"Town {i // 2} is T{i // 2}.", f"Which is {i}?", (f"T{i // 2}",), f"a{i}", 8
        )
        for i in range(12)
    ]
    unknown = Example("u", "Town 3 is T3.", "Who is Bo?", ())
    negatives = make_negatives([*examples, unknown], "random")
    assert sorted(negative.id for negative in negatives) == sorted(
        f"q{i}#random" for i in range(12)
    )
    originals = {f"{e.id}#random": e for e in examples}
    for negative in negatives:
        original = originals[negative.id]
        assert (negative.question, negative.article) == (original.question, original.article)
        assert not negative.is_answerable and negative.answer_start is None
        assert original.answers[0] not in negative.context
    contexts = [negative.context for negative in negatives]  # those on one context are together
    assert len(set(contexts)) == sum(a != b for a, b in pairwise(contexts)) + 1
    assert negatives == make_negatives([*examples, unknown], "random")


@pytest.mark.parametrize("kind", ["random", "hard"])
def test_no_negative_is_on_a_context_where_its_question_has_another_answer(kind):
    """Who owns it? Bo in one context and Ann in the other; there is no third context."""
    passages = {"The Swan is Bo's.": "Bo", "The Swan is Ann's.": "Ann"}
    examples = [
        Example(f"{answer}", context, question, (answer,))
        for context, answer in passages.items()
        for question in ("Who owns it?", f"Who is {answer}?")
    ]
    negatives = make_negatives(examples, kind)
    assert {negative.id for negative in negatives} == {f"Bo#{kind}", f"Ann#{kind}"}
    assert {negative.question for negative in negatives} == {"Who is Bo?", "Who is Ann?"}


def test_a_question_for_which_no_context_is_fit_has_no_negative():
    examples = [Example(c, f"Oslo {c}.", f"Where is {c}?", ("Oslo",)) for c in "ab"]
    assert make_negatives(examples, "random") == []
