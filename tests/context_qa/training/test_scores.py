"""Scores while training are those of evaluation; what travels with a model says what it is."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import eval_mamba_with_context
from common.errors import UserError, printable
from context_qa.arguments import trained_prompt_order
from context_qa.batches import Pairing, continuation
from context_qa.results.reading import read_results
from context_qa.training import TrainingSettings
from context_qa.training.data_report import DataReport
from context_qa.training.model_card import make_model_card
from context_qa.training.scores import (
    SCORES,
    find_score_problems,
    make_scorer,
    scored_examples,
    training_scores,
)
from mamba_lm.checkpoint import load_model_and_tokenizer
from mamba_lm.folders import RECORD
from mamba_lm.training.prefix_suffix import PrefixSuffixLM, collate
from squad_utils import PROMPT_ORDERS, Example, read_examples

ROOT = Path(__file__).parents[3]
DATA = ROOT / "data/demo/validation.jsonl"


@pytest.mark.parametrize("negatives, order", [(None, "context_first"), ("random", "read_twice")])
def test_scores_are_those_of_the_evaluation_script(negatives, order, tmp_path, monkeypatch):
    lines = DATA.read_text("utf-8").splitlines(keepends=True)[:20]
    if negatives:  # they are added where no question is unanswerable
        lines = [line for line in lines if "I don't know." not in line]
    data, results = tmp_path / "data.jsonl", tmp_path / "results.jsonl"
    data.write_text("".join(lines), "utf-8")
    monkeypatch.chdir(ROOT)
    more = ["--negatives", negatives] if negatives else []
    command = ["eval", "models/demo", str(data), str(results), "--prompt_order", order, *more]
    monkeypatch.setattr(sys, "argv", command)
    eval_mamba_with_context.main(eval_mamba_with_context.parse_args())

    examples = scored_examples(read_examples(str(data)), "random")
    model, tokenizer = load_model_and_tokenizer("models/demo")
    found = make_scorer(examples, tokenizer, order)(model)
    assert tuple(found) == SCORES
    loss = found.pop("loss")
    assert found == training_scores(read_results(str(results)))
    assert 0 < found["answerable_exact_match"] <= 100
    pairings = [Pairing(example, example.context) for example in examples]
    learnt = collate(continuation(pairing, tokenizer, order) for pairing in pairings)
    assert loss == pytest.approx(PrefixSuffixLM(model)(**learnt)["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("metric", ["nonsense", "eval_nonsense", "abstention_f1", "eval_"])
def test_a_metric_that_there_will_not_be_is_refused_before(metric):
    """Here all questions are answerable."""
    examples = [Example("1", "Bo is a cat.", "Who?", ("Bo",))]
    with pytest.raises(UserError, match=r"choose from exact_match, f1, loss$"):
        make_scorer(examples, None, PROMPT_ORDERS[0], metric)
    for known in ("f1", "eval_f1", "loss", "eval_loss", "exact_match"):
        make_scorer(examples, None, PROMPT_ORDERS[0], known)


def row(answers, guess, exact_match, f1) -> dict:
    return {"idx": 0, "answers": answers, "guess": guess, "exact_match": exact_match, "f1": f1,
            "confidence": 0.5, "no_answer_probability": 0.5}  # fmt: skip


def test_scores_by_hand():
    rows = [row(["x y"], "x", 0.0, 0.5), row(["x"], "x", 1.0, 1.0),
            row([], "I don't know.", 1.0, 1.0), row(["c"], "I don't know.", 0.0, 0.0)]  # fmt: skip
    found = training_scores(rows)
    assert found["exact_match"] == 50.0 and found["f1"] == 62.5
    assert found["answerable_exact_match"] == pytest.approx(100 / 3)
    assert found["unanswerable_exact_match"] == 100.0
    assert found["abstention_f1"] == pytest.approx(100 * 2 / 3)
    assert training_scores(rows[:2]).keys() == {"exact_match", "f1"}


def test_negatives_are_added_only_where_all_are_answerable():
    own = [Example(str(i), f"Context {i}.", f"Which {i}?", (f"{i}",)) for i in range(3)]
    assert len(scored_examples(own, "random")) == 6
    assert scored_examples(own, None) == own
    some = [*own, Example("u", "Context 9.", "Who?", ())]
    assert scored_examples(some, "random") == some


@pytest.mark.parametrize("scored, said", [
    ("answered unanswered", []),
    ("unanswered", ["none of the questions of the evaluation data has an answer"]),
    ("answered", ["all questions of the evaluation data have answers"]),
    ("answered unanswered known", ["1 of 3 questions of the evaluation data are trained on too"]),
])  # fmt: skip
def test_problems_of_scores_are_reported(scored, said):
    known = Example("known", "Bo is a cat.", "Who?", ("Bo",))
    examples = {
        "answered": Example("1", "Bo is a cat.", "What?", ("a cat",)),
        "unanswered": Example("2", "Di is a dog.", "Who?", ()),
        "known": replace(known, id="3"),
    }
    found = list(find_score_problems([examples[name] for name in scored.split()], [known]))
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


ONE_STEP = {"steps": 1, "epochs": 0.1, "step_of_model": 1}


def make_settings(**changes) -> TrainingSettings:
    defaults = {
        "model": "models/demo", "output": "models/mine", "data_path": "data.jsonl",
        "eval_data": "eval.jsonl", "negatives": "hard", "negative_ratio": 0.5, "batch_size": 32,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-4, "prompt_order": "context_first",
        "overwrite": False, "tokenizer": None, "seed": 0, "max_length": None, "num_epochs": 3.0,
        "max_steps": None, "optim": "adamw_torch", "fully_shard": False, "trainer": [],
        "patience": 5,
    }  # fmt: skip
    return TrainingSettings(**defaults | changes)


def test_a_card_describes_the_run():
    report = DataReport(9, 8, 7, 6, 500, 40, 99, 0, 0)
    steps = {"steps": 1234, "epochs": 2.5, "step_of_model": 1000}
    scores = {"exact_match": 61.25, "abstention_f1": 50.0, "loss": 1.25}
    card = make_model_card(make_settings(), report, steps, scores)
    for text in ("# mine\n", "from `models/demo`", "`data.jsonl`", "negatives: hard",
                 "0.5 unanswerable",
                 "1,234 optimizer steps of 32 x 2", "after step 1,000",
                 "| exact match | 61.2 |", "loss on its reference answers is 1.250 nats",
                 "99 tokens",
                 "prompt_mamba_with_context.py models/mine", "On `eval.jsonl`",
                 "data: 9 questions, 8 of them answerable"):  # fmt: skip
        assert text in card, text
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_a_card_commands_no_terminal():
    report = DataReport(9, 8, 7, 6, 500, 40, 99, 0, 0)
    names = {"data_path": "\x1b[2Jdata\x9b\u202e", "output": "models/\x07mine", "model": "a\rb"}
    settings = make_settings(**names)
    card = make_model_card(settings, report, ONE_STEP, {"f1": 1.0})
    assert card == printable(card, keep="\n") and "`\\x1b[2Jdata\\x9b\\u202e`" in card


def test_a_card_reports_that_there_are_no_scores():
    report = DataReport(9, 8, 7, 6, 500, 40, 99, 0, 0)
    settings = make_settings(eval_data=None, prompt_order="question_first")
    card = make_model_card(settings, report, ONE_STEP, {})
    assert "None: it was trained without `--eval_data`." in card
    assert "prompt_mamba_with_context.py" not in card, "the console speaks another prompt"


@pytest.mark.parametrize("record, expected", [
    ('{"arguments": {"prompt_order": "read_twice"}}', "read_twice"),
    ('{"arguments": {}}', PROMPT_ORDERS[0]), ("[]", PROMPT_ORDERS[0]),
    ('{"arguments": {"prompt_order": null}}', PROMPT_ORDERS[0]),
    ('{"arguments": [1]}', PROMPT_ORDERS[0]),
    (None, PROMPT_ORDERS[0]),
])  # fmt: skip
def test_a_model_is_asked_as_it_was_trained(record, expected, tmp_path):
    if record is not None:
        (tmp_path / RECORD).write_text(record)
    assert trained_prompt_order(str(tmp_path)) == expected


@pytest.mark.parametrize("record, said", [
    ('{"arguments": {"prompt_order": "backwards"}}', "prompt order 'backwards' is unknown"),
    ('{"arguments": {"prompt_order": [["x"]]}}', "prompt order [['x']] is unknown"),
    ("{", "not JSON"), ("[" * 100_000, "is nested too deep"),
])  # fmt: skip
def test_a_record_that_cannot_say_how_it_was_trained_is_refused(record, said, tmp_path):
    """Another order than the trained one would silently cost points."""
    (tmp_path / RECORD).write_text(record)
    with pytest.raises(UserError) as caught:
        trained_prompt_order(str(tmp_path))
    assert said in str(caught.value) and str(tmp_path / RECORD) in str(caught.value)


def test_the_shipped_model_has_the_record_of_its_training():
    assert "arguments" in json.loads((ROOT / "models/demo" / RECORD).read_text())
