"""Metrics of results rows: scores with confidence intervals, abstention, calibration.

All figures are percentages. Rows are those of a results file; nothing here needs a model.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from squad_utils import abstains, folded_answer, is_scored_as_empty

SCORES = ("exact_match", "f1", "is_correct")
ROW_GROUPS = {  # titles, by the prefix of the scores' names
    "": "all",
    "has_answer_": "with answer",
    "no_answer_": "without answer",
    "negatives_": "negatives",
}
RESAMPLES = 2000
CALIBRATION_BINS = 15


class Interval(NamedTuple):
    low: float
    high: float


class Curve(NamedTuple):
    """Points of a curve, x ascending, in percent; and the area under it, in percent of the
    whole."""

    x: np.ndarray
    y: np.ndarray
    area: float


class Bins(NamedTuple):
    """Of each bin that is not empty: mean confidence and accuracy in percent, and its questions."""

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray


def is_negative(row: Mapping, first_negative: int | None) -> bool:
    """Whether a row is a negative's. Negatives are after the data's own questions, from the idx
    first_negative on; None: there are none."""
    return first_negative is not None and row["idx"] >= first_negative


def group_rows(
    rows: Iterable[Mapping], first_negative: int | None = None
) -> dict[str, list[Mapping]]:
    """The rows of each of ROW_GROUPS that is not empty: all of the data's own, those with and
    without an answer, and the negatives (see `is_negative`)."""
    own, negatives = [], []
    for row in rows:
        (negatives if is_negative(row, first_negative) else own).append(row)
    answerable = [row for row in own if row["answers"]]
    unanswerable = [row for row in own if not row["answers"]]
    found = zip(ROW_GROUPS, (own, answerable, unanswerable, negatives), strict=True)
    return {name: group for name, group in found if group}


def summarize(
    rows: Sequence[Mapping], articles: Mapping[int, str], first_negative: int | None = None
) -> dict:
    """scores, their intervals, and what these were resampled over; abstention on the data's own
    questions and, where there are negatives, on both together. Where guesses differ from references
    only in the form of their characters, folded_exact_match counts these as right too."""
    own = group_rows(rows, first_negative).get("", rows)  # all, where there are only negatives
    summary = {
        "scores": scores(rows, first_negative),
        "intervals": score_intervals(rows, articles, first_negative),
        "intervals_over": intervals_over(own, articles),
        "abstention": abstention(own),
    }
    if len(own) < len(rows):
        summary["abstention_with_negatives"] = abstention(rows)
    if any(map(_matches_folded, own)):
        right = sum(row["exact_match"] or _matches_folded(row) for row in own)
        summary["folded_exact_match"] = 100 * right / len(own)
    return summary


def _matches_folded(row: Mapping) -> bool:
    """Whether a guess is wrong by the official script and equal to a reference once both are folded
    (`common.text.fold`): it is the same answer in other characters."""
    if row["exact_match"] or (row["guess"].isascii() and all(map(str.isascii, row["answers"]))):
        return False
    guess = folded_answer(row["guess"])
    return bool(guess) and guess in map(folded_answer, row["answers"])


def scores(rows: Iterable[Mapping], first_negative: int | None = None) -> dict[str, float | int]:
    """The official SQuAD 2.0 scores and the raw match, in percent, and the number of questions."""
    found: dict[str, float | int] = {}
    for prefix, group in group_rows(rows, first_negative).items():
        for metric in SCORES:
            found[prefix + metric] = 100 * sum(row[metric] for row in group) / len(group)
        found[f"{prefix}num_questions"] = len(group)
    return found


def score_intervals(
    rows: Sequence[Mapping], articles: Mapping[int, str], first_negative: int | None = None
) -> dict[str, Interval]:
    """95 % confidence intervals of `scores`, by a bootstrap over articles; over questions where
    not every row has its article in `articles`, by idx. A group of one question or
    article has none.
    """
    found = {}
    for prefix, group in group_rows(rows, first_negative).items():
        values = np.array([[100 * row[metric] for row in group] for metric in SCORES], float)
        intervals = mean_intervals(values, clusters(group, articles))
        found |= {prefix + metric: i for metric, i in zip(SCORES, intervals, strict=False)}
    return found


def clusters(rows: Sequence[Mapping], articles: Mapping[int, str]) -> list[Hashable]:
    """The unit of resampling of each row: its article, or the row itself where one has none."""
    if all(row["idx"] in articles for row in rows):
        return [articles[row["idx"]] for row in rows]
    return list(range(len(rows)))


def intervals_over(rows: Sequence[Mapping], articles: Mapping[int, str]) -> str:
    """What is resampled for the intervals, in words, such as "48 articles". One alone has none."""
    unit = "article" if all(row["idx"] in articles for row in rows) else "question"
    number = len(set(clusters(rows, articles)))
    return f"{number} {unit}{'s' * (number != 1)}"


def mean_intervals(values: np.ndarray, clusters: Sequence[Hashable]) -> list[Interval]:
    """95 % percentile-bootstrap intervals of the means of values (k, n), whose n questions are
    drawn in whole clusters (Efron & Tibshirani 1993, chapter 13); none from a single cluster."""
    from scipy.stats import bootstrap

    place: dict[Hashable, int] = {}
    index = [place.setdefault(cluster, len(place)) for cluster in clusters]
    if len(place) < 2:
        return []
    sums = np.array([np.bincount(index, weights=row) for row in values])  # (k, c)
    counts = np.broadcast_to(np.bincount(index).astype(float), sums.shape)  # (k, c)
    result = bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        axis=-1,
        n_resamples=RESAMPLES,
        batch=max(10_000_000 // sums.size, 1),  # bounds memory
        method="percentile",
        rng=0,
    )
    low, high = result.confidence_interval
    return [Interval(*map(float, pair)) for pair in zip(low, high, strict=True)]


def abstention(rows: Sequence[Mapping]) -> dict[str, float | int]:
    """How well a model abstains.

    A guess that is NO_ANSWER abstains. Other guesses that are scored as the empty answer (no text,
    or only punctuation and articles) are counted in num_empty. Precision, recall and F1 are those
    of abstaining where there is no answer. If the rows have confidences, there are also the area
    under `risk_coverage`, the expected calibration error (Guo et al. 2017) and the average
    precision of `answerability`. A figure that would divide by zero is missing."""
    abstained = np.array([abstains(row["guess"]) for row in rows])
    unanswerable = np.array([not row["answers"] for row in rows])
    right = int((abstained & unanswerable).sum())
    found: dict[str, float | int] = {
        "num_abstained": int(abstained.sum()),
        "num_unanswerable": int(unanswerable.sum()),
    }
    empty = sum(is_scored_as_empty(row["guess"]) for row in rows) - int(abstained.sum())
    if empty:
        found["num_empty"] = empty
    if abstained.any():
        found["precision"] = 100 * right / abstained.sum()
    if unanswerable.any():
        found["recall"] = 100 * right / unanswerable.sum()
        found["f1"] = 100 * 2 * right / (abstained.sum() + unanswerable.sum())
    if has_confidence(rows):
        bins = calibration(rows)
        gaps = np.abs(bins.confidence - bins.accuracy)
        found["risk_coverage_area"] = risk_coverage(rows).area
        found["expected_calibration_error"] = float(np.average(gaps, weights=bins.counts))
        if 0 < unanswerable.sum() < len(rows):
            found["answerability_average_precision"] = answerability(rows).area
    return {name: v if isinstance(v, int) else float(v) for name, v in found.items()}


def has_confidence(rows: Iterable[Mapping]) -> bool:
    """Whether rows come from a model, not from a baseline without probabilities."""
    names = ("confidence", "no_answer_probability")
    return all(row[name] is not None for row in rows for name in names)


def risk_coverage(rows: Sequence[Mapping]) -> Curve:
    """Risk, the share of wrong guesses (by exact match), among the most confident guesses, against
    coverage, their share of all (El-Yaniv & Wiener 2010). An abstention is a guess like any other.

    Among guesses of equal confidence each counts as wrong as their mean. The area is the mean risk
    over all coverages (Geifman et al. 2019).
    """
    confidence = np.array([row["confidence"] for row in rows])
    wrong = 1 - np.array([row["exact_match"] for row in rows])
    levels, level, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    shared = np.bincount(level, weights=wrong, minlength=len(levels)) / counts
    risk = 100 * np.cumsum(np.repeat(shared, counts)) / np.arange(1, len(rows) + 1)
    last = np.cumsum(counts) - 1
    return Curve(100 * (last + 1) / len(rows), risk[last], float(risk.mean()))


def calibration(rows: Sequence[Mapping]) -> Bins:
    """Confidence against accuracy (exact match), in bins of confidence of equal width."""
    confidence = np.array([row["confidence"] for row in rows])
    right = np.array([row["exact_match"] for row in rows])
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = counts > 0
    means = [
        100 * np.bincount(bins, weights=values, minlength=CALIBRATION_BINS)[filled] / counts[filled]
        for values in (confidence, right)
    ]
    return Bins(*means, counts[filled])


def answerability(rows: Sequence[Mapping]) -> Curve:
    """Precision against recall of recognizing answerable questions, in order of rising probability
    of the abstention. The area is the average precision. Needs questions of both kinds."""
    no_answer = np.array([row["no_answer_probability"] for row in rows])
    answerable = np.array([bool(row["answers"]) for row in rows])
    levels, level, counts = np.unique(no_answer, return_inverse=True, return_counts=True)
    found = np.cumsum(np.bincount(level, weights=answerable, minlength=len(levels)))
    recall, precision = found / answerable.sum(), found / np.cumsum(counts)
    area = float(np.sum(np.diff(recall, prepend=0) * precision))
    return Curve(100 * recall, 100 * precision, 100 * area)


def tuned_threshold(rows: Sequence[Mapping]) -> float:
    """The T for which abstaining where no_answer_probability > T gives the highest F1.

    The rows' guesses are those of a model that may not abstain.
    """
    no_answer = np.array([row["no_answer_probability"] for row in rows])
    gain = np.array([row["f1"] - (not row["answers"]) for row in rows])  # of answering
    levels, level = np.unique([0.0, *no_answer], return_inverse=True)  # 0: abstain most
    gains = np.cumsum(np.bincount(level[1:], weights=gain, minlength=len(levels)))
    best = int(gains.argmax())
    above = levels[best + 1] if best + 1 < len(levels) else 1.0
    return float((levels[best] + above) / 2) if best > 0 else 0.0
