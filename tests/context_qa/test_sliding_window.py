"""The baseline that learns nothing, on cases worked out by hand."""

import itertools
import random
import sys
import unicodedata
from pathlib import Path

import pytest

from common.text import fold
from context_qa import sliding_window
from context_qa.sliding_window import best_phrase, sliding_window_answers
from squad_utils import Example, read_examples

ROOT = Path(__file__).parents[2]
SQUAD = ROOT.parent / "shared/data/squad/dev-v2.0.json"

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


def plain_best_phrase(context: str, question: str) -> str:
    """The definition, word for word: every candidate looks at all of its sentence."""
    sentences, information = sliding_window._parse(context)
    asked = [fold(t) for t in sliding_window._TOKEN.findall(question) if t[0].isalnum()]
    stop_words = sliding_window._stop_words()

    def overlap(words: list[str], start: int, end: int) -> int:
        parts = words[:start], words[end:]
        unigrams = {*parts[0], *parts[1]} & {*asked}
        bigrams = {pair for part in parts for pair in itertools.pairwise(part)}
        return len(unigrams) + len(bigrams & {*itertools.pairwise(asked)})

    def score(words: list[str], start: int, end: int) -> float:
        wanted = {*asked, *words[start:end]}
        gains = [information[word] if word in wanted else 0 for word in words]
        window = max(sum(gains[s : s + len(wanted)]) for s in range(len(words)))
        in_question = [i for i, w in enumerate(words) if w in asked and w not in stop_words]
        own = {*words[start:end]} - {*asked}
        distances = [abs(i - j) for i in in_question for j, w in enumerate(words) if w in own]
        distance = min(distances) / max(len(words) - 1, 1) if distances else 1.0
        return window / sliding_window._UNIT - distance

    ranked = {
        (overlap(words, start, end), score(words, start, end), -place): text
        for place, (words, text, start, end) in enumerate(
            (sentence.words, *candidate)
            for sentence in sentences
            for candidate in sentence.candidates
        )
    }
    return ranked[max(ranked)] if ranked else context.strip()


def test_guesses_are_those_of_the_definition():
    rng = random.Random(0)
    words = ["the", "of", "and", "is", ",", ".", " Sun", *(f"w{n}" for n in range(9)), "Bo-Li", "é"]
    for _ in range(400):
        some = rng.sample(words, rng.randint(3, len(words)))
        context = " ".join(rng.choices(some, k=rng.randint(0, 60)))
        question = " ".join(rng.choices(words, k=rng.randint(0, 8)))
        assert best_phrase(context, question) == plain_best_phrase(context, question)


@pytest.mark.parametrize(
    "path", [ROOT / "data/demo/validation.jsonl", SQUAD], ids=["demo", "SQuAD"]
)
def test_guesses_on_passages_are_those_of_the_definition(path):
    if not path.exists():
        pytest.skip(f"{path} is not there")
    for example in read_examples(str(path))[:200]:
        asked = example.context, example.question
        assert best_phrase(*asked) == plain_best_phrase(*asked)


@pytest.mark.parametrize("pattern", ["w{} and", "w a{} and", "cat and dog and", "w{}"])
def test_a_sentence_four_times_as_long_is_about_four_times_the_work(pattern):
    def work(length: int) -> int:
        context = " ".join(pattern.format(n) for n in range(length))
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            count += event == "opcode"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            best_phrase(context, "Who is w7, and what of w in the a31?")
        finally:
            sys.settrace(before)
        return count

    best_phrase("what is looked up once", "What?")
    assert work(800) < 6 * work(200)
