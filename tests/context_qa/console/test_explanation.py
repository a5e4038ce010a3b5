"""Shades and marks on a context: their levels, places and widths."""

import io

import pytest
import torch
from wcwidth import wcswidth

from context_qa.console.explanation import (
    ASCII,
    BLOCKS,
    COLORS,
    LEVELS,
    MARK,
    Explanation,
    find_answer,
    to_printable,
    token_strengths,
)
from mamba_lm.checkpoint import load_tokenizer


def explained(context: str, strengths: dict[str, float], answer: str = "") -> Explanation:
    """Tokens are words with the space before them, with these strengths or 0."""
    tokens, end = [], 0
    for word in context.split(" "):
        start, end = end, end + len(word) + (end > 0)
        tokens.append((start, end, strengths.get(word, 0.0)))
    return Explanation(context, tokens, find_answer(context, answer))


def test_levels_have_equal_steps_and_spaces_have_none():
    strengths = {"a": 1.0, "b": 1.9, "c": 2.1, "d": 3.1, "e": 4.1, "f": 5.9, "g": 6.0}
    explanation = explained(" ".join(strengths), strengths)
    assert explanation.bounds() == (1.0, 6.0)
    assert explanation.levels()[::2] == [0, 0, 1, 2, 3, 4, 4]
    assert explanation.levels()[1::2] == [0] * 6


def test_equal_strengths_have_no_shade():
    assert set(explained("a b c", {"a": 2.0, "b": 2.0, "c": 2.0}).levels()) == {0}
    assert explained("a", {"a": 2.0}).levels() == [0]


def test_outliers_do_not_take_the_shades_of_other_tokens():
    words = [f"w{n}" for n in range(100)]
    strengths = {word: 1 + n / 100 for n, word in enumerate(words)} | {"w99": 1e6, "w0": -1e6}
    levels = explained(" ".join(words), strengths).levels()
    assert set(levels) == set(range(LEVELS)) and (levels[0], levels[-1]) == (0, LEVELS - 1)


def test_a_character_of_two_tokens_has_the_stronger_shade():
    tokens = [(0, 1, 1.0), (1, 2, 1.0), (1, 2, 9.0), (1, 2, 4.0)]
    assert Explanation("a€", tokens, []).levels() == [0, 4]


@pytest.mark.parametrize(
    ("answer", "marked"),
    [
        ("Bo", ["Bo", "Bo"]),
        ("BO", ["Bo", "Bo"]),
        ("a black cat", ["a  black\ncat"]),
        ("cat", ["cat"]),
        ("ca", []),
        ("$92 (net)", ["$92 (net)"]),
        ("$9", []),
        ("a dog", []),
        ("I don't know.", []),
        ("i don’t know", []),
        ("", []),
    ],
)
def test_where_the_answer_is(answer, marked):
    context = "Bo is a  black\ncat. Bob pays $92 (net) for Bo. The: I don't know."
    spans = find_answer(context, answer)
    assert [context[start:end] for start, end in spans] == marked


def test_an_answer_in_a_script_without_spaces_may_be_within_a_word():
    assert find_answer("東京は日本の首都です。東京", "東京") == [(0, 2), (11, 13)]


def test_plain_lines_show_shades_below_the_text_and_brackets_around_the_answer():
    explanation = explained("Ann met Bo Li\nin Oslo, Bo Li", {"Bo": 4.0, "Li\nin": 2.0}, "bo li")
    assert list(explanation.plain_lines(80)) == [
        "Ann met [Bo Li]",
        "         ██ ▒▒",
        "in Oslo, [Bo Li]",
        "▒▒        ██",
    ]
    assert list(explanation.plain_lines(80, ASCII))[1] == "         ## ::"


@pytest.mark.parametrize("width", [20, 21, 33, 100])
def test_plain_lines_have_whole_words_and_fit_the_width(width):
    context = "One two three, four five. " * 9 + "x" * 50 + " ten"
    explanation = explained(context, {"two": 1.0, "x" * 50: 3.0}, "four five")
    lines = list(explanation.plain_lines(width))
    text, shades = lines[::2], lines[1::2]
    assert max(map(len, lines)) <= width
    joined = " ".join(text).replace("[", "").replace("]", "")
    assert joined.replace(" ", "") == context.replace(" ", "")
    words = {word for line in text for word in line.split() if "x" not in word}
    assert words <= {"One", "two", "three,", "[four", "five].", "ten"}
    for line, below in zip(text, shades, strict=True):
        for place, character in enumerate(line):
            shade = below[place : place + 1]
            assert (shade == "█") == (character == "x")


@pytest.mark.parametrize(
    ("word", "columns"),
    [
        ("日本", 4),
        ("e\u0301t\u200b", 2),
        ("ก้ำ", 2),  # Thai: a mark above, and a vowel that takes a column
        ("\u1112\u1161\u11ab", 2),  # a Hangul syllable in three letters
        ("한", 2),
        ("🙂", 2),
        ("👩\u200d👩\u200d👧", 2),  # three people, one picture
        ("क्षि", 2),
        ("ｶ", 1),
    ],
    ids=ascii,
)
def test_shades_are_below_characters_of_any_width(word, columns):
    context = f"{word} a b"
    lines = list(explained(context, {word: 1.0, "a": 1.0}).plain_lines(80))
    assert lines == [context, "█" * columns + " █"]
    assert wcswidth(word) == columns


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_lines_fit_a_tiny_terminal(width):
    context = "Bo 日本 👩\u200d👧 ก้ำ e\u0301 \u1112\u1161\u11ab end"
    lines = list(explained(context, {"Bo": 1.0}, "Bo").plain_lines(width))
    assert max(map(wcswidth, lines)) <= max(width, 2)  # a wide character is not cut
    assert "".join(lines[::2]).replace(" ", "") == "[Bo]" + context[2:].replace(" ", "")


def test_control_characters_are_printed_as_escapes():
    assert to_printable("a\tb\x1b[2J\x07\x9bé\r\n“”\r") == "a b\\x1b[2J\\x07\\x9bé\n“”\\r"
    assert to_printable("a\u202eb\u2066c\u2028d\u200de") == "a\\u202eb\\u2066c\\u2028d\u200de"
    lines = list(explained("a \x1b[31mb\r\nc", {"a": 1.0}).plain_lines(80))
    assert lines == ["a \\x1b[31mb", "█", "c", ""]


def test_strengths_that_are_not_finite_are_accepted():
    tokens = [(0, 1, 1.0), (1, 2, float("inf")), (2, 3, float("nan"))]
    assert set(Explanation("abc", tokens, []).levels()) <= set(range(LEVELS))


def test_styles_cover_the_context_before_they_mark_the_answer():
    explanation = explained("Ann met Bo Li", {"Bo": 4.0, "Li": 2.0}, "Bo Li")
    styles = list(explanation.styles())
    assert styles[-1] == (MARK, 8, 13)
    assert styles[:-1] == [
        *((COLORS[0], 0, 8), (COLORS[4], 8, 10), (COLORS[0], 10, 11), (COLORS[2], 11, 13)),
    ]


def test_rich_knows_the_styles():
    from rich.console import Console
    from rich.text import Text

    text = Text("abcde")
    for place, style in enumerate(COLORS):
        text.stylize(f"{style} {MARK}", place, place + 1)
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor").print(text)
    assert stream.getvalue().count("48;2;") == LEVELS - 1
    assert len(BLOCKS) == len(ASCII) == len(COLORS) == LEVELS


@pytest.mark.parametrize(
    ("answer", "text"),
    [("Ann", "is marked"), ("Bo", "is marked 2 times"), ("Cy", "is not in the context")],
)
def test_the_legend(answer, text):
    explanation = explained("Ann Bo Bo", {"Ann": 2.25, "Bo": 0.5}, answer)
    assert explanation.legend() == f"shade: Δ from 0.50 to 2.25; the answer {text}"


def test_strengths_are_means_over_layers_of_each_token():
    tokenizer = load_tokenizer("", "data/demo/tokenizer")
    context = "Bo owns “a” hotel."
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    norms = torch.arange(2.0 * len(ids)).view(2, -1)
    strengths = token_strengths(tokenizer, context, norms)
    assert [s for *_, s in strengths] == [n + len(ids) / 2 for n in range(len(ids))]
    ends = [end for _, end, _ in strengths]
    assert strengths[0][0] == 0 and ends == sorted(ends) and ends[-1] == len(context)
    texts = [context[start:end].strip() for start, end, _ in strengths]
    assert "”" in texts and "hotel" in texts


POINTED = "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd"
SHALOM = "\u05e9\u05dc\u05d5\u05dd"
KITAB = "\u0643\u0650\u062a\u064e\u0627\u0628"


@pytest.mark.parametrize(
    "context, answer, marked",
    [
        ("Zoe\u0301 Bru\u0302le\u0301 came.", "Zoé Brûlé", ["Zoe\u0301 Bru\u0302le\u0301"]),
        ("Zoé Brûlé came.", "Zoe\u0301 Bru\u0302le\u0301", ["Zoé Brûlé"]),
        ("O’Neill and O'Neill.", "O'Neill", ["O’Neill", "O'Neill"]),
        ("In １９９８.", "1998", ["１９９８"]),
        ("The e\u0301", "é", ["e\u0301"]),
        ("ﬁve and five", "five", ["ﬁve", "five"]),
        ("Zoés", "Zoé", []),
        ("Zoe\u0301 Brûlé.", "Zoé Bru\u0302le\u0301", ["Zoe\u0301 Brûlé"]),
        (f"{POINTED} {SHALOM}.", SHALOM, [POINTED, SHALOM]),
        (f"{POINTED} {SHALOM}.", POINTED, [POINTED, SHALOM]),
        (f"{KITAB}.", "\u0643\u062a\u0627\u0628", [KITAB]),
        ("カ\u3099ス", "ガス", ["カ\u3099ス"]),
        ("カ\u3099ス", "カ", []),
        ("की", "क", []),
        ("a\u200b b", "\u200b", []),
        ("a\u0301 b", "\u0301", []),
        ("“Yes”, ‘no’", '"Yes"', ["“Yes”"]),
        ("10⁵ and 105", "105", ["105"]),
    ],
    ids=ascii,
)
def test_the_answer_is_marked_in_any_unicode_form(context, answer, marked):
    assert [context[start:end] for start, end in find_answer(context, answer)] == marked
