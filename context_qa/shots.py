"""The n-shot trivia prompt: questions with their answers, where a context would stand."""

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
    """What `prompt_parts` takes as the context."""
    return "\n\n".join(question_text(question) + answer_text(answer) for question, answer in shots)


def read_shots(path: str) -> list[tuple[str, str]]:
    """Shots from a JSONL file of `question, answer`. UserError names the file, the line and what a
    row needs."""
    shots = []
    for place, row in json_lines(read_text(path, f"a JSONL file of {KEYS}"), path):
        if not isinstance(row, dict):
            raise UserError(f"{place}: no JSON object; a row needs {KEYS}")
        question, answer = (
            checked_text(row.get(key), key, place, KEYS) for key in KEYS.split(", ")
        )
        shots.append((question, answer))
    if not shots:
        raise UserError(f"{path}: no shot in it; a row needs {KEYS}")
    return shots
