"""A results file as one HTML page: scores, charts, scores by group, and the data of its table.

Every text that comes from the file is escaped here; `report_page.html` does the rest, and shows it
as text only. Nothing here needs a model.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import UserError
from common.output_files import Kind
from context_qa.results import metrics
from context_qa.results.metrics import is_negative
from context_qa.results.report_charts import charts
from context_qa.results.rows import COLUMNS
from context_qa.results.summary import articles_by_idx, find_first_negative, incompleteness
from squad_utils import NO_ANSWER, abstains

TEMPLATE = Path(__file__).with_name("report_page.html")
FIGURES = [name for name, column in COLUMNS.items() if column.kind in (bool, int, float)]
Groups = dict[str, list[Mapping]]

ABSTENTION = {  # the figures of metrics.abstention: their titles and what they mean
    "num_abstained": ("abstentions", f"questions answered “{NO_ANSWER}”"),
    "num_unanswerable": ("unanswerable", "questions without an answer"),
    "num_empty": (
        "empty guesses",
        "scored as the empty answer without saying so: nothing, or punctuation and articles alone",
    ),
    "precision": ("precision", "of the abstentions, how many were right"),
    "recall": ("recall", "of the unanswerable questions, on how many it abstained"),
    "f1": ("F1", "harmonic mean of precision and recall"),
    "risk_coverage_area": (
        "area under risk and coverage",
        "mean share of wrong guesses over all coverages; lower is better",
    ),
    "expected_calibration_error": (
        "expected calibration error",
        "mean gap between confidence and exact match; lower is better",
    ),
    "answerability_average_precision": (
        "average precision of answerability",
        "how well it separates questions with and without an answer; higher is better",
    ),
}

QUESTION_WORD = re.compile(r"\b(what|who|whom|whose|when|where|which|how( many| much)?|why)\b")
HOW_MANY = "how many, how much"
SAME_WORD = {"whom": "who", "whose": "who", "how many": HOW_MANY, "how much": HOW_MANY}
QUESTION_WORDS = ("what", "who", "when", "where", "which", HOW_MANY, "how", "why", "other")
ANSWER_LENGTHS = {  # the most words of each
    "no answer": 0,
    "1 word": 1,
    "2 words": 2,
    "3 words": 3,
    "4 or 5 words": 5,
    "6 to 10 words": 10,
    "over 10 words": np.inf,
}
LENGTH_GROUPS = 5
ROUND_STEPS = (1, 5, 10, 50, 100, 500, 1000)


def _is_page(stream: BinaryIO) -> bool:
    return b'<meta name="generator" content="Mamba Dive, report_results.py">' in stream.read(200)


PAGE = Kind("a page of results", _is_page)


def report_page(rows: Sequence[Mapping], summary: Mapping, name: str, is_torn: bool = False) -> str:
    """The page of a results file called `name`, of its rows and the summary beside it, which may be
    empty; is_torn: whether its last line is. Raises UserError if all rows are negatives."""
    articles, first_negative = articles_by_idx(summary, rows), find_first_negative(summary, rows)
    own = metrics.group_rows(rows, first_negative).get("")
    if own is None:
        raise UserError(f"{name}: only negatives; give a file that has the data's own questions")
    found = metrics.summarize(rows, articles, first_negative)
    filled = {
        "title": _title(summary, name),
        "notice": _notice(rows, summary, is_torn),
        "about": _about(rows, found["scores"], name),
        "settings": _settings(summary),
        "scores": _score_table(found),
        "abstention": _abstention_table(found),
        "charts": charts(rows, own),
        "bars": "The line over a bar is the 95 % interval." if found["intervals"] else "",
        "groups": "\n".join(
            _group_table(title, group(own), articles)
            for title, group in GROUPS.items()
            if group is not by_prompt_length or all(row["num_tokens"] is not None for row in own)
        ),
        "data": embedded_json(table_data(rows, first_negative)),
    }
    # In one pass: the texts that are filled in are not searched for places.
    return re.sub(r"{{(\w+)}}", lambda place: filled[place[1]], TEMPLATE.read_text("utf-8"))


def _round(value: float | int | bool | None) -> float | int | bool | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table_data(rows: Iterable[Mapping], first_negative: int | None = None) -> dict:
    """What the page's table shows: the fields' names, a list of values for each row, and the
    distinct contexts, to which the rows' `context` points."""
    contexts: dict[str, int] = {}
    records = [
        {
            **{name: row[name] for name in ("id", "question", "answer", "guess")},
            "answers": list(dict.fromkeys(row["answers"])),
            "context": contexts.setdefault(row["context"] or "", len(contexts)),
            "abstains": abstains(row["guess"]),
            "negative": is_negative(row, first_negative),
            **{name: _round(row[name]) for name in FIGURES},
        }
        for row in rows
    ]
    return {
        "fields": list(records[0]),
        "rows": [list(record.values()) for record in records],
        "contexts": list(contexts),
    }


def embedded_json(value: object) -> str:
    """JSON for a <script>: nothing in it can end the script or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# Groups of rows, by their titles; each row is in one, and no group is empty.


def by_prompt_length(rows: Sequence[Mapping]) -> Groups:
    """About five groups of about equal size, with round bounds."""
    lengths = np.array([row["num_tokens"] for row in rows])
    quantiles = np.quantile(lengths, np.arange(1, LENGTH_GROUPS) / LENGTH_GROUPS)
    finest = max((quantiles[-1] - quantiles[0]) / 10, 1)
    step = max(step for step in ROUND_STEPS if step <= finest)
    bounds = sorted({step * round(quantile / step) for quantile in quantiles})
    titles = [
        f"up to {bounds[0]:,}",
        *(f"{low + 1:,} to {high:,}" for low, high in pairwise(bounds)),
        f"over {bounds[-1]:,}",
    ]
    group_of = np.searchsorted(bounds, lengths)
    return _grouped(rows, (titles[group] for group in group_of), titles)


def by_question_word(rows: Sequence[Mapping]) -> Groups:
    """By the first question word, wherever in the question it is."""
    return _grouped(rows, (_question_word(row["question"]) for row in rows), QUESTION_WORDS)


def by_answer_length(rows: Sequence[Mapping]) -> Groups:
    """By the number of words of the first reference."""
    lengths = [len(row["answers"][0].split()) if row["answers"] else 0 for row in rows]
    titles = (
        next(title for title, most in ANSWER_LENGTHS.items() if length <= most)
        for length in lengths
    )
    return _grouped(rows, titles, ANSWER_LENGTHS)


GROUPS = {
    "Tokens of the prompt, context included": by_prompt_length,
    "Words of the first reference": by_answer_length,
    "Question word": by_question_word,
}


def _question_word(question: str) -> str:
    found = QUESTION_WORD.search(" ".join(question.lower().split()))
    return SAME_WORD.get(found[0], found[0]) if found else "other"


def _grouped(rows: Iterable[Mapping], titles: Iterable[str], order: Iterable[str]) -> Groups:
    groups: Groups = {title: [] for title in order}
    for row, title in zip(rows, titles, strict=True):
        groups[title].append(row)
    return {title: group for title, group in groups.items() if group}


# The sections of the page, as HTML.


def _title(summary: Mapping, name: str) -> str:
    arguments = summary.get("arguments", {})
    if "model" not in arguments or "data" not in arguments:
        return escape(name)
    return escape(f"{arguments['model']} on {arguments['data']}")


def _notice(rows: Sequence[Mapping], summary: Mapping, is_torn: bool) -> str:
    found = incompleteness(len(rows), summary, is_torn)
    texts = [f"This file {escape(found)}. The scores are those of its rows."] if found else []
    texts += [f"Warning: {_isolate(warning)}." for warning in summary.get("warnings", ())]
    return "\n".join(f'<p class="notice" role="note">{text}</p>' for text in texts)


def _about(rows: Sequence[Mapping], scores: Mapping, name: str) -> str:
    kinds = {
        "has_answer_": "with an answer",
        "no_answer_": "without an answer",
        "negatives_": "on another context, without an answer (negatives)",
    }
    counts = [
        f"{scores[f'{prefix}num_questions']:,} {kind}"
        for prefix, kind in kinds.items()
        if f"{prefix}num_questions" in scores
    ]
    contexts = {row["context"] for row in rows} - {None}
    where = f", contexts: {len(contexts):,}" if contexts else ""
    return f"<p>{_isolate(name)}. Questions: {len(rows):,} ({', '.join(counts)}){where}.</p>"


def _isolate(text: object) -> str:
    """Text from the file, isolated so that right-to-left text does not reorder ours."""
    return f"<bdi>{escape(str(text))}</bdi>"


def _settings(summary: Mapping) -> str:
    """What made the results: the arguments of the run, as it resolved them."""
    names = {"model", "data", "tokenizer"}  # their hashes are in the settings
    resolved = {k: v for k, v in summary.get("settings", {}).items() if k not in names}
    made_with = ("device", "git_commit", "model_sha256", "data_sha256", "wall_seconds")
    settings = summary.get("arguments", {}) | resolved
    settings |= {name: summary[name] for name in made_with if name in summary}
    makers = summary.get("made_by", ())
    if len(makers) > 1:
        settings["made_by"] = "; ".join(map(_maker, makers))
    items = [
        f'<div><dt>{escape(name)}</dt><dd dir="auto">{escape(_setting(value))}</dd></div>'
        for name, value in settings.items()
        if value is not None
    ]
    if not items:
        return "<p>The results have no summary: model, data and settings are unknown.</p>"
    return f"<details><summary>Settings</summary><dl>{''.join(items)}</dl></details>"


def _setting(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _maker(entry: object) -> str:
    if not isinstance(entry, Mapping):
        return str(entry)
    return ", ".join(f"{name} {value}" for name, value in entry.items())


def _score_table(found: Mapping) -> str:
    scores, intervals = found["scores"], found["intervals"]
    lines = []
    for prefix, title in metrics.ROW_GROUPS.items():
        if f"{prefix}num_questions" in scores:
            names = [prefix + metric for metric in metrics.SCORES]
            figures = (_show_score(scores[name], intervals.get(name)) for name in names)
            count = f"{scores[f'{prefix}num_questions']:,}"
            lines.append(_line(title, count, *figures))
    return (
        _table("Scores", ("percent", "questions", "exact match", "F1", "raw match"), lines)
        + f"<p>{_about_intervals(found)} Exact match and F1 are those of SQuAD 2.0, the best over "
        "the references, where abstaining counts as the empty answer. Raw match: the very text of "
        f"the first reference, but for case.{_folded(found)}</p>"
    )


def _about_intervals(found: Mapping) -> str:
    over = found["intervals_over"]
    if not found["intervals"]:
        return f"No 95 % intervals: {over} cannot be resampled."
    return f"Below each score: its 95 % interval, by a bootstrap over {over}."


def _folded(found: Mapping) -> str:
    if "folded_exact_match" not in found:
        return ""
    return (
        f" With guesses that differ from a reference in the form of their characters alone, exact "
        f"match is {found['folded_exact_match']:.1f}."
    )


def _show_score(score: float, interval: metrics.Interval | None) -> str:
    return f"<b>{score:.1f}</b>{_interval(interval)}"


def _interval(interval: metrics.Interval | None) -> str:
    return f"<small>{interval.low:.1f}–{interval.high:.1f}</small>" if interval else ""


def _abstention_table(found: Mapping) -> str:
    columns = {"own questions": found["abstention"]}
    if "abstention_with_negatives" in found:
        columns["with negatives"] = found["abstention_with_negatives"]
    lines = [
        _line(
            f"{escape(title)}<small>{escape(meaning)}</small>",
            *(_abstention_cell(column.get(name)) for column in columns.values()),
        )
        for name, (title, meaning) in ABSTENTION.items()
        if any(name in column for column in columns.values())
    ]
    return _table("Abstention", ("", *columns), lines)


def _abstention_cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} %" if isinstance(value, float) else f"{value:,}"


def _group_table(title: str, groups: Groups, articles: Mapping[int, str]) -> str:
    lines = []
    for name, rows in groups.items():
        right, f1 = (np.array([100 * row[m] for row in rows]) for m in ("exact_match", "f1"))
        intervals = metrics.mean_intervals(right[None], metrics.clusters(rows, articles))
        interval = intervals[0] if intervals else None  # none of a single cluster
        lines.append(
            _line(
                escape(name),
                f"{len(rows):,}",
                _show_score(right.mean(), interval) + _bar(right.mean(), interval),
                _show_score(f1.mean(), None) + _bar(f1.mean()),
            )
        )
    return _table(title, (title, "questions", "exact match", "F1"), lines)


def _bar(value: float, interval: metrics.Interval | None = None) -> str:
    """A bar of `value` percent, and a line over its interval."""
    line = ""
    if interval:
        width = interval.high - interval.low
        line = f'<i style="left:{interval.low:.1f}%;width:{width:.1f}%"></i>'
    return f'<span class="bar"><span style="width:{value:.1f}%"></span>{line}</span>'


def _line(title: str, *cells: str) -> str:
    return f'<tr><th scope="row">{title}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _table(label: str, header: Iterable[str], lines: Iterable[str]) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    return (
        f'<table class="figures" aria-label="{escape(label)}"><thead><tr>{columns}</tr></thead>\n'
        + "\n".join(lines)
        + "\n</table>"
    )
