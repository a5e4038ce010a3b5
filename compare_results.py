"""Compare two runs on the same questions: is the difference more than chance?

    python compare_results.py results/demo.jsonl results/demo_trained.jsonl

Pairs the two files' rows and prints, for each score, both values and their difference with its 95 %
interval (a bootstrap over articles, or over questions where articles are unknown), McNemar's test
on exact match, and the questions that only one of the two has right, both without negatives.
"""

import argparse
import json
from collections.abc import Sequence

import numpy as np

from context_qa import metrics
from context_qa.metrics import PARTS, SCORES
from context_qa.results import (
    articles_by_idx,
    find_first_negative,
    has_made_id,
    read_results,
    read_summary,
)
from errors import UserError, run_script

SAME = ("id", "context", "question", "answers")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results_a", metavar="RESULTS_A", help="JSONL, of an evaluation")
    parser.add_argument("results_b", metavar="RESULTS_B", help="JSONL, of another on the same data")
    about = "table (default) shows ten questions a side; json, one object, shows all"
    parser.add_argument("--format", choices=("table", "json"), default="table", help=about)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    rows_a, rows_b, first_negative, left_out = paired(args.results_a, args.results_b)
    summaries = read_summary(args.results_a), read_summary(args.results_b)
    articles = articles_by_idx(summaries[0]) or articles_by_idx(summaries[1])
    parts_a, parts_b = (metrics.parts(rows, first_negative) for rows in (rows_a, rows_b))
    own_a, own_b = parts_a.get("", []), parts_b.get("", [])
    only_a, only_b = flips(own_a, own_b), flips(own_b, own_a, swapped=True)
    comparison = {
        "results_a": args.results_a,
        "results_b": args.results_b,
        "num_questions": len(rows_a),
        "num_left_out": left_out,
        "differences": differences(parts_a, parts_b, articles),
        "mcnemar_p": metrics.mcnemar(len(only_a), len(only_b)),
        "only_a_right": only_a,
        "only_b_right": only_b,
    }
    if args.format == "json":
        print(json.dumps(comparison, ensure_ascii=False))
    else:
        show(comparison)


def paired(path_a: str, path_b: str) -> tuple[list[dict], list[dict], int | None, int]:
    """Rows of the questions that are in both files, in the same order, the idx of the first copy
    among them, and how many are in one only. UserError where the data was not the same."""
    (by_idx_a, first_a), (by_idx_b, first_b) = by_idx(path_a), by_idx(path_b)
    common = sorted(by_idx_a.keys() & by_idx_b.keys())
    for idx in common:
        row_a, row_b = by_idx_a[idx], by_idx_b[idx]
        different = differing_data(row_a, row_b)
        if metrics.is_negative(row_a, first_a) != metrics.is_negative(row_b, first_b):
            different.append("kind of question, a copy of one and one of the data's own")
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


def differing_data(row_a: dict, row_b: dict) -> list[str]:
    """What of their data differs. An older layout can lack the context; a made id adds nothing."""
    skipped = {"context"} if None in (row_a["context"], row_b["context"]) else set()
    if has_made_id(row_a) or has_made_id(row_b):
        skipped.add("id")
    return [name for name in SAME if name not in skipped and row_a[name] != row_b[name]]


def by_idx(path: str) -> tuple[dict[int, dict], int | None]:
    """The rows by their idx, and that of the first copy."""
    rows = read_results(path, warn=True)
    found = {row["idx"]: row for row in rows}
    if len(found) < len(rows):
        raise UserError(f"{path}: an idx is there twice; give the file of one run")
    return found, find_first_negative(read_summary(path), rows)


def differences(parts_a: dict, parts_b: dict, articles: dict[int, str]) -> dict:
    """Of each score that `metrics.scores` has: a, b, b - a in percent, and the interval of that."""
    found = {}
    for prefix, part_a in parts_a.items():
        a, b = (
            100 * np.array([[row[metric] for row in part] for metric in SCORES], float)
            for part in (part_a, parts_b[prefix])
        )
        intervals = metrics.mean_intervals(b - a, metrics.clusters(part_a, articles)) or [
            None
        ] * len(SCORES)
        means = a.mean(axis=1).tolist(), b.mean(axis=1).tolist()
        for metric, of_a, of_b, interval in zip(SCORES, *means, intervals, strict=True):
            values = {"a": of_a, "b": of_b, "difference": of_b - of_a, "interval": interval}
            found[prefix + metric] = values
    return found


def flips(right: Sequence[dict], wrong: Sequence[dict], swapped: bool = False) -> list[dict]:
    """The questions with an exact match in the first rows alone; `swapped`: these are B's."""
    guesses = ("guess_b", "guess_a") if swapped else ("guess_a", "guess_b")
    return [
        {name: one[name] for name in ("idx", "id", "question", "answer")}
        | dict(zip(guesses, (one["guess"], other["guess"]), strict=True))
        for one, other in zip(right, wrong, strict=True)
        if one["exact_match"] > other["exact_match"]
    ]


def show(comparison: dict, most: int = 10) -> None:
    print(f"A: {comparison['results_a']}\nB: {comparison['results_b']}")
    left_out = comparison["num_left_out"]
    beside = f"; {left_out:,} in one file only are left out" if left_out else ""
    print(f"{comparison['num_questions']:,} questions in both{beside}\n")
    print(f"{'percent':30}{'A':>7}{'B':>7}{'B - A':>8}   95 % interval")
    for prefix, title in PARTS.items():
        for metric in SCORES:
            entry = comparison["differences"].get(prefix + metric)
            if entry is not None:
                low_high = entry["interval"]
                interval = "{:+6.2f} to {:+6.2f}".format(*low_high) if low_high else "-"
                name = f"{title}: {metric.replace('_', ' ')}"
                values = f"{entry['a']:7.2f}{entry['b']:7.2f}{entry['difference']:+8.2f}"
                print(f"{name:30}{values}   {interval}")
    only_a, only_b = len(comparison["only_a_right"]), len(comparison["only_b_right"])
    print(
        f"\nexact match in A alone {only_a:,}, in B alone {only_b:,}; "
        f"McNemar's exact test: p = {comparison['mcnemar_p']:.3g}"
    )
    for side in ("a", "b"):
        flipped = comparison[f"only_{side}_right"]
        shown = f", the first {most} of {len(flipped):,}" if len(flipped) > most else ""
        if flipped:
            print(f"\nOnly {side.upper()} is right{shown}:")
        for row in flipped[:most]:
            print(f"  {row['idx']}: {row['question']}")
            print(f"      answer {row['answer']!r}  A {row['guess_a']!r}  B {row['guess_b']!r}")


if __name__ == "__main__":
    run_script(main, parse_args)
