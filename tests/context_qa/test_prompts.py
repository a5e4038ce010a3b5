"""Prompts have one text and one tokenisation, in training, evaluation and consoles."""

from collections import Counter

import pytest

import squad_utils
from context_qa import prompts
from context_qa.batches import Pairing, continuation
from context_qa.console.console import Console
from context_qa.prompts import PromptTokens
from context_qa.shots import n_shot_prompt
from squad_utils import PROMPT_ORDERS, Example, answer_text, prompt_parts, question_text

CONTEXT, QUESTION = "Ann feeds Bo.", "Whom does Ann feed?"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that are tokenised, in order."""
    texts, encode = [], prompts.encode
    monkeypatch.setattr(
        prompts, "encode", lambda tokenizer, given: texts.extend(given) or encode(tokenizer, given)
    )
    return texts


def test_answering_tokenises_each_text_once(answerer, encoded):
    contexts = [CONTEXT, "Cy is a dog.", "Di has a cat, and a bird."]
    asked = [prompt_parts(contexts[n % 3], f"Question {n}?") for n in range(12)]
    list(answerer.answer(asked))
    assert Counter(encoded) == Counter([*contexts, *(suffix for _, suffix in asked)])


def test_a_console_tokenises_each_text_once(answerer, encoded):
    console = Console(answerer)
    console.read(CONTEXT)
    for question in (QUESTION, "Why?"):
        console.ask(question)
    suffixes = [prompt_parts(CONTEXT, question)[1] for question in (QUESTION, "Why?")]
    assert encoded == [CONTEXT, *suffixes]


@pytest.mark.parametrize("order", PROMPT_ORDERS)
def test_the_wording_of_a_question_is_written_once(answerer, monkeypatch, order):
    """Training, evaluation and consoles follow a change of it."""
    monkeypatch.setattr(squad_utils, "question_text", lambda question: f"?? {question}\n!!")
    parts = prompt_parts(CONTEXT, QUESTION, order)
    assert "!!" in parts[1] or order == "question_first"
    item = continuation(
        Pairing(Example("1", CONTEXT, QUESTION, ("Bo",)), CONTEXT), answerer.tokenizer, order
    )
    prefix, suffix = answerer.tokens.encode(parts)
    assert list(item.prefix) == prefix and list(item.suffix[: len(suffix)]) == suffix


def test_shots_are_worded_as_prompts_are():
    assert n_shot_prompt([("Who?", "Bo")]) == question_text("Who?") + answer_text("Bo")
    assert prompt_parts("", "Who?")[1] == f"\n\n{question_text('Who?')}"


def test_targets_end_with_end_of_text(answerer):
    tokens = PromptTokens(answerer.tokenizer)
    [answer], [target] = tokens.encode_answers(["Bo"]), tokens.encode_targets(["Bo"])
    assert target == [*answer, answerer.tokenizer.eos_token_id]
    assert target[-1] in tokens.stop_ids
