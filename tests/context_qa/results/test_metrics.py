"""What rows amount to, against definitions written out plainly and against known cases."""

import math
import random

import numpy as np
import pytest

from context_qa.results import metrics
from context_qa.results.rows import Answer, result_row
from squad_utils import NO_ANSWER, Example


def row(idx=0, answers=("x",), guess="x", confidence=0.5, no_answer=0.25, id="q") -> dict:
    example = Example(id, "Bo is x.", "Who?", tuple(answers))
    return result_row(idx, example, Answer(guess, confidence, no_answer, 0.5, 10, 1))


def random_rows(count: int, seed: int = 0) -> list[dict]:
    """With ties in confidence, and a model that knows a little."""
    rng = random.Random(seed)
    rows = []
    for idx in range(count):
        answers = rng.choice([("x",), ("x", "y"), ()])
        guess = rng.choice(["x", "y z", NO_ANSWER])
        confidence = round(rng.random(), 1)
        rows.append(row(idx, answers, guess, confidence, round(rng.random() ** 2, 1)))
    return rows


# Scores


def test_scores_are_split_by_whether_there_is_an_answer():
    rows = [
        row(0, ["x"], "x"),
        row(1, ["x"], "x y"),
        row(2, [], "i dont know"),
        row(3, [], "x"),
        row(4, [], NO_ANSWER, id="q#random"),
    ]
    expected = {
        "": (50.0, 100 * (1 + 2 / 3 + 1) / 4, 25.0, 4),
        "has_answer_": (50.0, 100 * (1 + 2 / 3) / 2, 50.0, 2),
        "no_answer_": (50.0, 50.0, 0.0, 2),
        "negatives_": (100.0, 100.0, 100.0, 1),
    }
    names = ("exact_match", "f1", "is_correct", "num_questions")
    flat = {p + n: v for p, part in expected.items() for n, v in zip(names, part, strict=True)}
    assert metrics.scores(rows, first_negative=4) == pytest.approx(flat)
    assert list(metrics.scores(iter(rows), first_negative=4)) == list(flat)
    assert not any("no_answer" in name or "negatives" in name for name in metrics.scores(rows[:2]))
    assert not any("has_answer" in name for name in metrics.scores(rows[2:]))


def test_the_interval_of_a_share_is_about_that_of_the_normal_approximation():
    values = np.array([[100.0] * 300 + [0.0] * 700])
    [(low, high)] = metrics.mean_intervals(values, range(1000))
    width = 1.96 * 100 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((30 - width, 30 + width), abs=0.4)


def test_intervals_resample_whole_articles():
    """Ten articles, each all right or all wrong, are ten observations and not a thousand."""
    values = np.array([[100.0 * (i // 100 < 3) for i in range(1000)]])
    [by_question] = metrics.mean_intervals(values, range(1000))
    [by_article] = metrics.mean_intervals(values, [i // 100 for i in range(1000)])
    assert by_article.high - by_article.low > 5 * (by_question.high - by_question.low)
    rows = [row(idx, guess="x" if idx // 100 < 3 else "y") for idx in range(1000)]
    articles = {idx: str(idx // 100) for idx in range(1000)}
    assert metrics.score_intervals(rows, articles)["exact_match"] == by_article
    assert metrics.score_intervals(rows, {})["exact_match"] == by_question
    del articles[999]  # not all are known
    assert metrics.score_intervals(rows, articles)["exact_match"] == by_question
    assert metrics.summarize(rows, articles)["intervals_over"] == "1000 questions"


def test_articles_of_unlike_sizes_weigh_by_their_questions():
    """One article of 90 right answers, nine of one wrong each: a mean of articles would be 10 %."""
    values, clusters = np.array([[100.0] * 90 + [0.0] * 9]), [0] * 90 + list(range(1, 10))
    [(low, high)] = metrics.mean_intervals(values, clusters)
    assert low == 0.0 and high > 97


def test_intervals_of_little():
    assert metrics.mean_intervals(np.array([[1.0, 2.0]]), ["one", "one"]) == []
    assert metrics.mean_intervals(np.array([[5.0, 5.0]]), [1, 2]) == [(5.0, 5.0)]
    rows = [row(0, ["x"], "x"), row(1, ["x"], "y"), row(2, [], "x")]
    found = metrics.score_intervals(rows, {})
    assert found["exact_match"] == (0.0, 100.0)
    assert not any(name.startswith("no_answer") for name in found)  # a single question
    assert metrics.summarize(rows[:1], {})["intervals"] == {}


def test_intervals_are_the_same_each_time():
    rows = random_rows(50)
    assert metrics.score_intervals(rows, {}) == metrics.score_intervals(rows, {})


# Abstention


def test_abstention_counts():
    guesses = [("x", NO_ANSWER), ("", NO_ANSWER), ("", "the"), ("", "x"), ("", "x"), ("x", "x")]
    rows = [row(i, [a] if a else [], guess) for i, (a, guess) in enumerate(guesses)]
    found = metrics.abstention(rows)
    counts = found["num_abstained"], found["num_empty"], found["num_unanswerable"]
    assert counts == (2, 1, 4)
    figures = found["precision"], found["recall"], found["f1"]
    assert figures == pytest.approx((100 / 2, 100 / 4, 100 * 2 / 6))


def test_abstention_where_it_is_never_right_or_never_done():
    never_right = metrics.abstention([row(0, ["x"], NO_ANSWER), row(1, ["x"], "x")])
    assert never_right["precision"] == 0.0
    assert not {"recall", "f1", "answerability_average_precision"} & set(never_right)
    never_done = metrics.abstention([row(0, [], "x"), row(1, ["x"], "x")])
    assert "precision" not in never_done and never_done["recall"] == never_done["f1"] == 0.0


def test_a_baseline_without_probabilities_has_counts_only():
    rows = [row(0, ["x"], "x", None, None), row(1, [], NO_ANSWER, None, None)]
    assert set(metrics.abstention(rows)) == {
        *("num_abstained", "num_unanswerable", "precision", "recall", "f1")
    }


@pytest.mark.parametrize("seed", range(5))
def test_risk_and_coverage_by_their_definition(seed):
    """At each threshold of confidence: the share of guesses above it, and of wrong ones there."""
    rows = random_rows(40, seed)
    curve = metrics.risk_coverage(rows)
    expected = []
    for threshold in sorted({r["confidence"] for r in rows}, reverse=True):
        covered = [r for r in rows if r["confidence"] >= threshold]
        wrong = sum(1 - r["exact_match"] for r in covered)
        expected.append((100 * len(covered) / len(rows), 100 * wrong / len(covered)))
    assert np.stack([curve.x, curve.y], axis=1) == pytest.approx(np.array(expected))


def test_area_under_risk_and_coverage():
    rows = [row(i, ["x"], guess, 1 - i / 10) for i, guess in enumerate(["x", "x", "y", "x"])]
    assert metrics.risk_coverage(rows).area == pytest.approx(100 * (0 + 0 + 1 / 3 + 1 / 4) / 4)
    tied = [row(i, ["x"], guess, 0.5) for i, guess in enumerate(["x", "y", "y", "x"])]
    assert metrics.risk_coverage(tied).area == pytest.approx(50.0)  # in whatever order


def test_a_good_order_has_less_area_than_chance_and_a_bad_one_more():
    rows = random_rows(400)
    risk = 100 - metrics.scores(rows)["exact_match"]
    best = [r | {"confidence": r["exact_match"]} for r in rows]
    worst = [r | {"confidence": 1 - r["exact_match"]} for r in rows]
    areas = [metrics.risk_coverage(ordered).area for ordered in (best, rows, worst)]
    assert areas == sorted(areas) and areas[0] < risk / 2 < risk < areas[2]


def test_calibration_error_by_its_definition():
    rows = random_rows(300)
    error = 0.0
    for b in range(metrics.CALIBRATION_BINS):
        low, high = b / metrics.CALIBRATION_BINS, (b + 1) / metrics.CALIBRATION_BINS
        last = b == metrics.CALIBRATION_BINS - 1
        inside = [
            r for r in rows if low <= r["confidence"] < high or (last and r["confidence"] == 1)
        ]
        gap = sum(r["confidence"] for r in inside) - sum(r["exact_match"] for r in inside)
        error += abs(gap) / len(rows)
    found = metrics.abstention(rows)["expected_calibration_error"]
    assert found == pytest.approx(100 * error)
    assert metrics.calibration(rows).counts.sum() == len(rows)


@pytest.mark.parametrize(("confidence", "error"), [(1.0, 25.0), (0.75, 0.0), (0.0, 75.0)])
def test_calibration_error_of_one_confidence(confidence, error):
    rows = [row(i, ["x"], guess, confidence) for i, guess in enumerate(["x", "x", "x", "y"])]
    found = metrics.abstention(rows)["expected_calibration_error"]
    assert found == pytest.approx(error)


@pytest.mark.parametrize("seed", range(5))
def test_answerability_by_its_definition(seed):
    rows = random_rows(40, seed)
    curve = metrics.answerability(rows)
    answerable = sum(bool(r["answers"]) for r in rows)
    expected, area, before = [], 0.0, 0.0
    for threshold in sorted({r["no_answer_probability"] for r in rows}):
        said = [r for r in rows if r["no_answer_probability"] <= threshold]
        right = sum(bool(r["answers"]) for r in said)
        expected.append((100 * right / answerable, 100 * right / len(said)))
        area += (right / answerable - before) * 100 * right / len(said)
        before = right / answerable
    assert np.stack([curve.x, curve.y], axis=1) == pytest.approx(np.array(expected))
    assert curve.area == pytest.approx(area)


def test_perfect_answerability():
    rows = [row(i, ["x"] if i < 3 else [], no_answer=i / 10) for i in range(6)]
    assert metrics.answerability(rows).area == pytest.approx(100.0)


# Thresholds


def f1_at(rows: list[dict], threshold: float) -> float:
    """The mean F1 if the model abstains where no_answer_probability is above the threshold."""
    scores = [
        float(not r["answers"]) if r["no_answer_probability"] > threshold else r["f1"] for r in rows
    ]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_no_threshold_is_better_than_the_tuned_one(seed):
    rows = [r for r in random_rows(30, seed) if r["guess"] != NO_ANSWER]
    threshold = metrics.tuned_threshold(rows)
    best = max(f1_at(rows, t / 1000) for t in range(1001))
    assert f1_at(rows, threshold) == pytest.approx(best)
    assert 0 <= threshold <= 1


@pytest.mark.parametrize(("answers", "guess", "threshold"), [([], "x", 0.0), (["x"], "x", 0.625)])
def test_thresholds_that_always_or_never_abstain(answers, guess, threshold):
    rows = [row(i, answers, guess, no_answer=0.25) for i in range(3)]
    assert metrics.tuned_threshold(rows) == threshold


def test_negatives_are_known_by_their_place_and_not_by_their_id():
    rows = [row(0, [], id="q#hard"), row(1, ["x"]), row(2, [], id="q")]
    assert metrics.group_rows(rows).keys() == {"", "has_answer_", "no_answer_"}
    groups = metrics.group_rows(rows, first_negative=2)
    assert (groups["no_answer_"], groups["negatives_"]) == (rows[:1], rows[2:])


def test_guesses_in_another_unicode_form_are_counted_beside_the_official_score():
    rows = [
        row(0, ["Zoe\u0301"], "Zoé"),
        row(1, ["x"], "x"),
        row(2, [], NO_ANSWER),
        row(3, ["Bo"], "Zoé"),
        row(4, ["é", "Zoé"], "ZOE\u0301"),
    ]
    found = metrics.summarize(rows, {})
    assert (found["scores"]["exact_match"], found["folded_exact_match"]) == (40.0, 80.0)
    assert "folded_exact_match" not in metrics.summarize(rows[1:4], {})
    negatives = metrics.summarize(rows, {}, first_negative=1)  # own questions only
    assert negatives["folded_exact_match"] == 100.0


@pytest.mark.parametrize("guess", ["", "A", "...", "the", "::::"])
def test_a_guess_that_is_scored_as_empty_is_no_abstention(guess):
    found = metrics.abstention([row(0, [], guess), row(1, ["A"], guess), row(2, [], NO_ANSWER)])
    assert (found["num_abstained"], found["num_empty"]) == (1, 2)
    assert (found["precision"], found["recall"]) == (100.0, 50.0)
