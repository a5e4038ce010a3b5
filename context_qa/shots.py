"""The n-shot prompt: questions with their answers, in place of a context."""

from collections.abc import Iterable

from common.errors import UserError
from common.input_files import read_text
from squad_utils import NO_ANSWER, answer_text, checked_text, json_lines, question_text

KEYS = "question, answer"

SHOTS = (
    ("Which planet is closest to the Sun?", "Mercury"),
    ('Who wrote the novel "Pride and Prejudice"?', "Jane Austen"),
    ("What did my neighbour have for breakfast this morning?", NO_ANSWER),
    ("In which year did the Berlin Wall fall?", "1989"),
    ("What gas do plants take in from the air to make sugar?", "carbon dioxide"),
    ("Which river flows through Cairo?", "the Nile"),
    ("How many strings does a violin have?", "four"),
    ("Which number am I thinking of right now?", NO_ANSWER),
)


def n_shot_prompt(shots: Iterable[tuple[str, str]] = SHOTS) -> str:
    """The text of shots, which `prompt_parts` takes as its context."""
    return "\n\n".join(question_text(question) + answer_text(answer) for question, answer in shots)


def read_shots(path: str) -> list[tuple[str, str]]:
    """Read shots from a JSONL file of `question, answer`. Raises UserError with the file, the line
    and what a row needs."""
    shots = []
    for place, row in json_lines(read_text(path, f"a JSONL file of {KEYS}"), path):
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; a row needs {KEYS}")
        question, answer = (
            checked_text(row.get(key), key, place, KEYS) for key in KEYS.split(", ")
        )
        shots.append((question, answer))
    if not shots:
        raise UserError(f"{path}: contains no shots; a row needs {KEYS}")
    return shots
