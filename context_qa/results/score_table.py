"""The scores of a run as tables for a terminal."""

from collections.abc import Mapping

from common.errors import printable
from context_qa.results.metrics import ROW_GROUPS, SCORES


def print_summary(summary: Mapping) -> None:
    """The scores as tables on standard output, 80 characters wide."""
    scores, intervals = summary["scores"], summary["intervals"]
    print(f"{'percent':16}{'questions':>9}   {'exact match':21}{'F1':21}raw match")
    for prefix, title in ROW_GROUPS.items():
        if f"{prefix}num_questions" in scores:
            exact_match, f1, is_correct = (scores[prefix + metric] for metric in SCORES)
            print(
                f"{title:16}{scores[prefix + 'num_questions']:9,}   "
                f"{exact_match:5.1f} {_format_interval(intervals, prefix + 'exact_match'):15}"
                f"{f1:5.1f} {_format_interval(intervals, prefix + 'f1'):15}{is_correct:5.1f}"
            )
    if "folded_exact_match" in summary:
        print(
            f"exact match, Unicode forms and accents folded: {summary['folded_exact_match']:.1f} "
            "(the official script compares characters as they are written)"
        )
    over = summary["intervals_over"]
    if intervals:
        print(f"in parentheses: 95 % intervals, bootstrap over {over}")
    else:
        print(f"no 95 % intervals: {over} cannot be resampled")
    print()
    columns = [key for key in ("abstention", "abstention_with_negatives") if key in summary]
    print(f"{'':32}" + "".join(f"{key.replace('_', ' '):>27}" for key in columns).rstrip())
    for name in dict.fromkeys(name for key in columns for name in summary[key]):
        values = (summary[key].get(name) for key in columns)
        print(f"{name.replace('_', ' '):32}" + "".join(f"{_format(v):>27}" for v in values))
    for warning in summary.get("warnings", ()):
        print(f"warning: {printable(str(warning))}")


def _format_interval(intervals: Mapping, name: str) -> str:
    return "({:.1f}-{:.1f})".format(*intervals[name]) if name in intervals else ""


def _format(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} %" if isinstance(value, float) else f"{value:,}"
