"""The charts of a report, as inline SVG: confidence against correctness."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO

from common.errors import UserError
from context_qa.results import metrics
from squad_utils import NO_ANSWER

Series = dict[str, Sequence[Mapping]]  # rows by their label

INK = "#010203"  # replaced by the page's own text colour, which depends on its scheme
LINES = (("#2b7bba", "-"), ("#d9730d", "--"))
FEW_POINTS = 30  # of a curve: they are marked, since a line alone would suggest more data


def charts(rows: Sequence[Mapping], own: Sequence[Mapping]) -> str:
    """The charts as HTML, of the data's own rows and, where there are more, of all of them; or why
    there are none."""
    if not metrics.has_confidence(rows):
        return "<p>No charts: these results have no confidences, like those of a baseline.</p>"
    series = {"own questions": own}
    if len(own) < len(rows):
        series["with negatives"] = rows
    of_both_kinds = {
        name: group
        for name, group in series.items()
        if len({bool(r["answers"]) for r in group}) == 2
    }
    figures = [
        _chart(
            "risk",
            "Risk and coverage",
            "Share of wrong guesses among the most confident ones. Lower is better.",
            _draw_risk_coverage,
            series,
        ),
        _chart(
            "calibration",
            "Calibration",
            "Share of right guesses by confidence: on the dotted line, confidence equals "
            "accuracy. Below, the number of questions in each bin.",
            _draw_calibration,
            series,
        ),
    ]
    if of_both_kinds:
        figures.append(
            _chart(
                "answerability",
                "Answerability",
                f"Separating questions with and without an answer by the probability of "
                f"“{NO_ANSWER}”. Higher is better.",
                _draw_answerability,
                of_both_kinds,
            )
        )
    else:
        figures.append(
            "<p>No chart of answerability: it needs questions with and without an answer.</p>"
        )
    return f'<div class="charts">{"".join(figures)}</div>'


def _chart(name: str, title: str, caption: str, draw: Callable, series: Series) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("the charts need matplotlib: pip install matplotlib") from error

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    style = dict.fromkeys((*coloured, "grid.color"), INK) | {
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.15,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    written = StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 3.8), layout="constrained")
        draw(figure, series)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return (
        f"<figure><h3>{escape(title)}</h3>{_inline_svg(written.getvalue(), name, title)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _inline_svg(document: str, name: str, title: str) -> str:
    """The drawing alone, scaled to its place, with ids that no other drawing has."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return svg.replace(INK, "currentColor")


def _draw_risk_coverage(figure, series: Series) -> None:
    axes = figure.subplots()
    _draw_curves(axes.plot, metrics.risk_coverage, "area", series)
    axes.set(xlabel="coverage, %", ylabel="wrong, %", xlim=(0, 101))
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_calibration(figure, series: Series) -> None:
    axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    axes.plot((0, 100), (0, 100), ":", color=INK, alpha=0.5)
    for place, ((name, rows), (colour, dashes)) in enumerate(
        zip(series.items(), LINES, strict=False)
    ):
        bins = metrics.calibration(rows)
        axes.plot(bins.confidence, bins.accuracy, f"o{dashes}", color=colour, label=name)
        below.vlines(bins.confidence + place, 0, bins.counts, color=colour, linewidth=3)
    axes.set(ylabel="right, %", ylim=(-2, 102))
    axes.legend(loc="upper left")
    below.set(xlabel="confidence, %", ylabel="questions", xlim=(-2, 102))
    below.set_ylim(bottom=0)


def _draw_answerability(figure, series: Series) -> None:
    axes = figure.subplots()
    _draw_curves(axes.step, metrics.answerability, "average", series)
    axes.set(xlabel="recall, %", ylabel="precision, %", xlim=(0, 101), ylim=(0, 102))
    axes.legend(loc="lower left")


def _draw_curves(draw: Callable, curve_of: Callable, measure: str, series: Series) -> None:
    for (name, rows), (colour, dashes) in zip(series.items(), LINES, strict=False):
        curve = curve_of(rows)
        label = f"{name}: {measure} {curve.area:.1f} %"
        marker = "o" if len(curve.x) < FEW_POINTS else ""
        draw(curve.x, curve.y, dashes, color=colour, marker=marker, label=label)
