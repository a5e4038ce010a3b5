"""Compare two runs on the same questions: is the difference more than chance?

    python compare_results.py results/demo.jsonl results/demo_trained.jsonl

Pairs the two files' rows and prints, for each score, both values and their difference with its 95 %
interval (a bootstrap over articles, or over questions where articles are unknown), McNemar's test
on exact match, and the questions that only one of the two answers right, both without negatives.
"""

from common.script import exit_on_signal, run_script, write_utf_8

import argparse

from common.command_line import Parser
from common.errors import printable
from common.json_text import json_line


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("results_a", metavar="RESULTS_A", help="JSONL, of an evaluation")
    parser.add_argument("results_b", metavar="RESULTS_B", help="JSONL, of another on the same data")
    about = "table (default) shows ten questions a side; json, one object, shows all"
    parser.add_argument("--format", choices=("table", "json"), default="table", help=about)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    with exit_on_signal():
        from context_qa.results.comparison import compare

        comparison = compare(args.results_a, args.results_b)
    if args.format == "json":
        write_utf_8()
        print(json_line(comparison))
    else:
        show(comparison)


def show(comparison: dict, most: int = 10) -> None:
    from context_qa.results.metrics import ROW_GROUPS, SCORES

    for side in "ab":
        print(f"{side.upper()}: {printable(comparison[f'results_{side}'])}")
    left_out = comparison["num_left_out"]
    beside = f"; {left_out:,} in one file only are skipped" if left_out else ""
    print(f"{comparison['num_questions']:,} questions in both{beside}\n")
    entries, over = comparison["differences"], comparison["intervals_over"]
    has_intervals = any(entry["interval"] for entry in entries.values())
    print(f"{'percent':30}{'A':>7}{'B':>7}{'B - A':>8}{'   95 % interval' * has_intervals}")
    for prefix, title in ROW_GROUPS.items():
        for metric in SCORES:
            entry = entries.get(prefix + metric)
            if entry is not None:
                low_high = entry["interval"]
                interval = "{:+6.2f} to {:+6.2f}".format(*low_high) if low_high else ""
                name = f"{title}: {metric.replace('_', ' ')}"
                values = f"{entry['a']:7.2f}{entry['b']:7.2f}{entry['difference']:+8.2f}"
                print(f"{name:30}{values}   {interval}".rstrip())
    about = f"bootstrap over {over}" if has_intervals else f"{over} cannot be resampled"
    print(f"{'' if has_intervals else 'no '}95 % intervals: {about}")
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
            print(f"  {row['idx']}: {printable(row['question'])}")
            print(f"      answer {row['answer']!r}  A {row['guess_a']!r}  B {row['guess_b']!r}")


if __name__ == "__main__":
    run_script(main, parse_args)
