"""Two results files on the same questions: their scores, and whether the difference is chance."""

from collections.abc import Mapping, Sequence

import numpy as np

from common.errors import UserError
from context_qa.results import metrics
from context_qa.results.metrics import SCORES
from context_qa.results.reading import has_made_id, read_results
from context_qa.results.summary import articles_by_idx, find_first_negative, read_summary

SAME = ("id", "context", "question", "answers")


def compare(path_a: str, path_b: str) -> dict:
    """Both files' scores by their names, the differences with 95 % intervals, McNemar's p on exact
    match, and the questions that one of the two alone has right. UserError where the files are not
    results of the same data."""
    rows_a, rows_b, first_negative, left_out = read_pairs(path_a, path_b)
    articles = articles_by_idx(read_summary(path_a), rows_a)
    articles = articles or articles_by_idx(read_summary(path_b), rows_a)
    groups_a, groups_b = (metrics.group_rows(rows, first_negative) for rows in (rows_a, rows_b))
    own_a, own_b = groups_a.get("", []), groups_b.get("", [])
    only_a, only_b = select_flips(own_a, own_b), select_flips(own_b, own_a, are_of_b=True)
    return {
        "results_a": path_a,
        "results_b": path_b,
        "num_questions": len(rows_a),
        "num_left_out": left_out,
        "differences": compare_metrics(groups_a, groups_b, articles),
        "intervals_over": metrics.intervals_over(own_a or rows_a, articles),
        "mcnemar_p": mcnemar_p_value(len(only_a), len(only_b)),
        "only_a_right": only_a,
        "only_b_right": only_b,
    }


def read_pairs(path_a: str, path_b: str) -> tuple[list[dict], list[dict], int | None, int]:
    """Rows of the questions that are in both files, in the same order, the idx of the first
    negative among them, and how many are in one only. UserError where the data was not the same."""
    (by_idx_a, first_a), (by_idx_b, first_b) = read_rows(path_a), read_rows(path_b)
    common = sorted(by_idx_a.keys() & by_idx_b.keys())
    for idx in common:
        different = find_different_data(by_idx_a[idx], by_idx_b[idx])
        if different:
            raise UserError(
                f"{path_a} and {path_b}: results of different data; "
                f"at idx {idx} there is another {', another '.join(different)}"
            )
    if not common:
        raise UserError(f"{path_a} and {path_b}: no question is in both")
    left_out = len(by_idx_a) + len(by_idx_b) - 2 * len(common)
    rows_a, rows_b = ([rows[idx] for idx in common] for rows in (by_idx_a, by_idx_b))
    return rows_a, rows_b, first_a if first_b is None else first_b, left_out


def find_different_data(row_a: dict, row_b: dict) -> list[str]:
    """What of their data differs. An older layout can lack the context; a made id adds nothing."""
    skipped = {"context"} if None in (row_a["context"], row_b["context"]) else set()
    if has_made_id(row_a) or has_made_id(row_b):
        skipped.add("id")
    return [name for name in SAME if name not in skipped and row_a[name] != row_b[name]]


def read_rows(path: str) -> tuple[dict[int, dict], int | None]:
    """The rows by their idx, and the idx of the first negative."""
    rows = read_results(path, warn=True)
    found = {row["idx"]: row for row in rows}
    if len(found) < len(rows):
        raise UserError(f"{path}: an idx occurs twice; give the file of one run")
    return found, find_first_negative(read_summary(path), rows)


def compare_metrics(
    groups_a: Mapping[str, Sequence[dict]],
    groups_b: Mapping[str, Sequence[dict]],
    articles: Mapping[int, str],
) -> dict:
    """Of each score that `metrics.scores` has: a, b, b - a in percent, and the interval of that."""
    found = {}
    for prefix, group_a in groups_a.items():
        a, b = (
            100 * np.array([[row[metric] for row in group] for metric in SCORES], float)
            for group in (group_a, groups_b[prefix])
        )
        intervals = metrics.mean_intervals(b - a, metrics.clusters(group_a, articles)) or [
            None
        ] * len(SCORES)
        means = a.mean(axis=1).tolist(), b.mean(axis=1).tolist()
        for metric, of_a, of_b, interval in zip(SCORES, *means, intervals, strict=True):
            values = {"a": of_a, "b": of_b, "difference": of_b - of_a, "interval": interval}
            found[prefix + metric] = values
    return found


def select_flips(
    right: Sequence[dict], wrong: Sequence[dict], are_of_b: bool = False
) -> list[dict]:
    """The questions with an exact match in the first rows only; are_of_b: these are B's."""
    guesses = ("guess_b", "guess_a") if are_of_b else ("guess_a", "guess_b")
    return [
        {name: one[name] for name in ("idx", "id", "question", "answer")}
        | dict(zip(guesses, (one["guess"], other["guess"]), strict=True))
        for one, other in zip(right, wrong, strict=True)
        if one["exact_match"] > other["exact_match"]
    ]


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """p of McNemar's exact two-sided test (1947) of whether both have as many exact matches, by the
    numbers that each has alone. It takes questions for independent, as intervals over articles do
    not."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
