"""Compare texts in any writing system: one form for all ways to write the same text."""

import re
import unicodedata

# Han, kana, Thai, Lao, Burmese and Khmer are written without spaces between words.
UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uff66-\uff9f]"
)


def fold(text: str) -> str:
    """Return one form for all ways to write a text that readers consider the same.

    Removes case, accents, Hebrew and Arabic points, ligatures, wide forms and invisible characters
    (Unicode's compatibility decomposition, except for superscripts and subscripts: 10⁵ is not 105).
    Digits of all scripts, quotes and dashes become ASCII. Decisions (is the answer in a context? is
    it NO_ANSWER?) compare folded texts; scores follow the official SQuAD script, which compares
    texts as they are written.
    """
    if text.isascii():
        return text.lower()
    # Twice, because the removed characters may have kept marks out of their canonical order.
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).translate(_FOLDED))


class _Folding(dict):
    """The table that `str.translate` uses on a decomposed text: from code point to folded text."""

    def __missing__(self, number: int) -> str:
        self[number] = folded = self._fold_character(chr(number))
        return folded

    def _fold_character(self, character: str) -> str:
        category, mark = unicodedata.category(character), unicodedata.combining(character)
        is_point = 10 <= mark <= 36 or 200 <= mark <= 240  # Hebrew and Arabic ones; accents
        if is_point or category == "Cf" or _INVISIBLE.match(character):
            return ""
        if category == "Nd":
            return str(unicodedata.decimal(character))
        if category == "Pd" or character == "\u2212":  # minus
            return "-"
        if unicodedata.decomposition(character).startswith(("<super>", "<sub>")):
            return character
        text = unicodedata.normalize("NFKD", character)
        text = character.casefold() if text == character else text
        return text if text == character else text.translate(self)


_INVISIBLE = re.compile(  # characters without a shape whose category is not Cf
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0000-\U000e0fff]"
)


_APOSTROPHES = (
    "\u2018\u2019\u201a\u201b\u2039\u203a\u00b4\u02b9\u02bb\u02bc\u02bd\u02c8\u05f3\u055a\ua78c"
    "\u2032\u2035\u275b\u275c\uff07"
)


_QUOTES = "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\u2036\u301d\u301e\u301f\u275d\u275e\uff02"


_MARKS = dict.fromkeys(_APOSTROPHES, "'") | dict.fromkeys(_QUOTES, '"') | {"\u2044": "/"}


_FOLDED = _Folding(str.maketrans(_MARKS))
