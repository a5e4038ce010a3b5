"""The baseline that learns nothing, on cases worked out by hand."""

import unicodedata

import pytest

from context_qa.sliding_window import best_phrase, sliding_window_answers
from squad_utils import Example

CONTEXT = (
    "The Mill was built in 1841 by Ada Stone. In 1902, it burned down. "
    "Today the old Mill houses a museum of clocks."
)


@pytest.mark.parametrize(
    ("question", "guess"),
    [
        ("Which museum does the Mill house today?", "clocks"),
        ("When did it burn down?", "1902"),
        ("Who built the Mill in 1841?", "Ada Stone"),
    ],
)
def test_phrases_of_the_sentence_that_is_most_like_the_question(question, guess):
    assert best_phrase(CONTEXT, question) == guess


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("asked_form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    ("context", "question", "guess"),
    [
        ("In May Zoé met Júlia Peña. Bo met Ann.", "Whom did Zoé meet?", "Júlia Peña"),
        ("Bo came in May. Élodie’s café was Ann Ñu.", "Whose was ÉLODIE'S café?", "Ann Ñu"),
        ("Bo met पानी हिन्दी. In May.", "Whom did Bo meet?", "पानी हिन्दी"),
    ],
    ids=ascii,
)
def test_marks_are_parts_of_words_and_forms_are_equal(form, asked_form, context, question, guess):
    context, guess = (unicodedata.normalize(form, text) for text in (context, guess))
    assert guess in best_phrase(context, unicodedata.normalize(asked_form, question))


def test_the_guess_is_always_a_span_of_the_context():
    for context in (CONTEXT, "...", "the of and", "Bo", "  Bo  is\tthe\ncat ", "Ærø 1,000.5 km²!"):
        for question in ("Who?", "What is the Mill?", "?!", "Bo is what?"):
            assert best_phrase(context, question) in context


def test_answers_by_place_without_those_that_are_done():
    examples = [
        Example(str(i), f"Bo {i // 2} met Ann.", f"Whom did Bo {i} meet?", ()) for i in range(6)
    ]
    answers = {}
    for batch in sliding_window_answers(examples, done={1, 5}):
        answers |= batch
    assert sorted(answers) == [0, 2, 3, 4]
    assert all(
        a.confidence is None and a.seconds > 0 and a.num_new_tokens > 0 for a in answers.values()
    )
