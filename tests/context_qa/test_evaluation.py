"""Evaluation from data to summary, by the shipped demo model: what its settings change."""

import json
import sys
from pathlib import Path

import pytest

import eval_mamba_with_context
import eval_n_shot_mamba
from common.errors import UserError
from context_qa.results.reading import read_results
from context_qa.results.summary import read_summary
from context_qa.shots import n_shot_prompt
from squad_utils import NO_ANSWER

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "data/demo/validation.jsonl"


@pytest.fixture
def data(tmp_path) -> tuple[Path, Path]:
    """Two files of 60 demo questions each."""
    lines = DEMO.read_text("utf-8").splitlines(keepends=True)
    for name, part in (("scored.jsonl", lines[:60]), ("other.jsonl", lines[60:120])):
        (tmp_path / name).write_text("".join(part), "utf-8")
    return tmp_path / "scored.jsonl", tmp_path / "other.jsonl"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Evaluate; the rows and the summary."""

    def run(data, *flags, model="models/demo", script=eval_mamba_with_context, output="r.jsonl"):
        results = tmp_path / output
        words = (model, data, results, "--max_new_tokens", 12, "--device", "cpu", *flags)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        script.main(script.parse_args())
        return read_results(str(results)), read_summary(results)

    return run


def test_a_threshold_is_tuned_on_another_file_and_applied_to_the_scored_one(run, data, tmp_path):
    scored, other = data
    rows, summary = run(scored, "--tune_on", other)
    threshold = summary["settings"]["no_answer_threshold"]
    assert 0 < threshold < 1
    assert all(
        (row["guess"] == NO_ANSWER) == (row["no_answer_probability"] > threshold) for row in rows
    )
    tuning = read_results(str(tmp_path / "r.jsonl.tuning.jsonl"))
    assert [row["question"] for row in tuning] == [
        json.loads(line)["prompt"] for line in other.read_text("utf-8").splitlines()
    ]
    assert NO_ANSWER not in {row["guess"] for row in tuning}
    by_hand, _ = run(scored, "--no_answer_threshold", threshold, output="by_hand.jsonl")
    assert [row["guess"] for row in by_hand] == [row["guess"] for row in rows]


def test_a_threshold_is_not_tuned_on_what_is_scored(run, data, tmp_path):
    scored, other = data
    with pytest.raises(UserError, match="60 of its questions are scored too"):
        run(scored, "--tune_on", scored)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(other.read_text("utf-8") + scored.read_text("utf-8").split("\n")[0] + "\n")
    with pytest.raises(UserError, match=r"mixed\.jsonl: 1 of its questions are scored too"):
        run(scored, "--tune_on", mixed)
    output = tmp_path / "r.jsonl"
    other.rename(f"{output}.tuning.jsonl")
    with pytest.raises(UserError, match="is also an input and would be overwritten"):
        run(scored, "--tune_on", f"{output}.tuning.jsonl", "--overwrite")
    assert not (tmp_path / "r.jsonl").exists()


def test_tuning_needs_questions_of_both_kinds(run, data, tmp_path):
    scored, other = data
    lines = other.read_text("utf-8").splitlines(keepends=True)
    answered = tmp_path / "answered.jsonl"
    answered.write_text(
        "".join(line for line in lines if json.loads(line)["response"] != NO_ANSWER), "utf-8"
    )
    with pytest.raises(UserError, match=r"needs answerable and .*set negatives to add"):
        run(scored, "--tune_on", answered)
    _, summary = run(scored, "--tune_on", answered, "--negatives", "random")
    assert 0 < summary["settings"]["no_answer_threshold"] < 1


def test_another_threshold_is_another_run(run, data):
    scored, other = data
    run(scored, "--no_answer_threshold", "0.5")
    with pytest.raises(UserError, match=r"no answer threshold: 0\.5 there, None now"):
        run(scored)
    with pytest.raises(UserError, match=r"data: content [0-9a-f]{8} there"):
        run(other, "--no_answer_threshold", "0.5")


@pytest.mark.parametrize("kind", ["random", "hard"])
def test_negatives_are_scored_apart(run, data, kind):
    scored, _ = data
    own, alone = run(scored)
    rows, summary = run(scored, "--negatives", kind, output="negatives.jsonl")
    assert [row["idx"] for row in rows] == list(range(100))
    assert summary["first_negative"] == 60
    assert [row["id"].endswith(f"#{kind}") for row in rows] == [False] * 60 + [True] * 40
    assert all(row["answer"] == NO_ANSWER and not row["answers"] for row in rows[60:])
    assert {k: v for k, v in summary["scores"].items() if "negatives" not in k} == alone["scores"]
    assert summary["scores"]["negatives_num_questions"] == 40
    assert summary["scores"]["negatives_exact_match"] > 80  # the demo model knows
    assert summary["abstention"] == pytest.approx(alone["abstention"])
    assert summary["abstention_with_negatives"]["num_unanswerable"] == 60
    assert [row["guess"] for row in rows[:60]] == [row["guess"] for row in own]
    again, _ = run(scored, "--negatives", kind, output="again.jsonl")
    assert [row["context"] for row in again] == [row["context"] for row in rows]


def test_constrained_guesses_are_spans(run, data):
    rows, summary = run(data[0], "--constrain_to_context")
    assert all(row["guess"] == NO_ANSWER or row["guess"] in row["context"] for row in rows)
    assert summary["settings"]["constrain_to_context"] is True


def test_baselines(run, data):
    scored, _ = data
    rows, summary = run(scored, model="sliding-window")
    assert all(row["guess"] in row["context"] for row in rows)
    assert {row["confidence"] for row in rows} == {None}
    assert summary["abstention"] == {
        "num_abstained": 0,
        "num_unanswerable": 20,
        "recall": 0,
        "f1": 0,
    }
    blind, _ = run(scored, "--prompt_order", "question_only", output="blind.jsonl")
    whole, _ = run(scored, output="whole.jsonl")
    assert max(row["num_tokens"] for row in blind) < min(row["num_tokens"] for row in whole)
    assert sum(row["exact_match"] for row in blind) < sum(row["exact_match"] for row in whole) / 2


@pytest.mark.parametrize(
    "flags", [("--no_answer_threshold", "0.5"), ("--constrain_to_context",), ("--tune_on", DEMO)]
)
def test_a_baseline_without_probabilities_has_no_read_out_modes(run, data, flags):
    with pytest.raises(UserError, match="sliding-window: "):
        run(data[0], *flags, model="sliding-window")


@pytest.mark.parametrize("order", ["question_first", "read_twice"])
def test_other_orders_of_the_prompt_are_read(run, data, order):
    rows, summary = run(data[0], "--prompt_order", order, "--limit", 8)
    assert len(rows) == 8 and summary["settings"]["prompt_order"] == order
    with pytest.raises(UserError, match=f"prompt order: {order} there, context_first now"):
        run(data[0], "--limit", 8)


def test_n_shot_prompts_see_no_context(run, data, monkeypatch):
    rows, summary = run(data[0], "--limit", 4, script=eval_n_shot_mamba)
    assert summary["settings"]["prompt_order"] == "n_shot"
    assert len({row["num_tokens"] - len(row["question"].split()) for row in rows}) < 4
    assert all(row["num_tokens"] > len(n_shot_prompt().split()) for row in rows)
