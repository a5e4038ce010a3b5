"""The shots of the n-shot prompt: built in, or from a file."""

import json

import pytest

from common.errors import UserError
from context_qa.shots import SHOTS, n_shot_prompt, read_shots
from squad_utils import NO_ANSWER, prompt_parts


def test_the_question_after_shots_is_as_after_a_context():
    prefix, suffix = prompt_parts(n_shot_prompt(), "Who wrote Faust?")
    shots = [shot.split("\n") for shot in prefix.split("\n\n")]
    assert shots == [[f"Q: {question}", f"A: {answer}"] for question, answer in SHOTS]
    assert suffix == "\n\nQ: Who wrote Faust?\nA:"
    assert len(shots) == 8 and NO_ANSWER in dict(SHOTS).values()


def test_shots_from_a_file(tmp_path):
    path = tmp_path / "shots.jsonl"
    shots = [("Who is “Bo”?", "a cat"), ("Why?", NO_ANSWER)]
    rows = [json.dumps({"id": 1, "question": q, "answer": a}) for q, a in shots]
    path.write_text("\ufeff" + "\n\n".join(rows), encoding="utf-8")
    assert read_shots(str(path)) == shots
    assert n_shot_prompt(shots) == "Q: Who is “Bo”?\nA: a cat\n\nQ: Why?\nA: I don't know."


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "shots.jsonl: cannot be read (No such file or directory); give a JSONL file of"),
        (b"", "shots.jsonl: contains no shots; a row needs question, answer"),
        (b"\n  \n", "shots.jsonl: contains no shots"),
        (b'{"question": "Who?", "answer": "Bo"}\n[]', "line 2: not a JSON object; a row needs"),
        (b'{"question": "Who?"', "line 1: not JSON"),
        (b'{"question": "Who?"}', "line 1: 'answer' is missing; a row needs text in question, a"),
        (b'{"question": "Who?", "answer": 4}', "line 1: 'answer' is 4;"),
        (b'{"question": " ", "answer": "Bo"}', "line 1: 'question' is ' ';"),
        (b'{"question": "M\xe9xico?", "answer": "Bo"}', "shots.jsonl line 1: not UTF-8"),
    ],
)
def test_a_file_without_shots_is_an_error(tmp_path, content, complaint):
    path = tmp_path / "shots.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_shots(str(path))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
