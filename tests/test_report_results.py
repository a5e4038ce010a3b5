"""report_results.py: one page that needs nothing else, shows hostile texts as texts, and works."""

from common.script import run_script

import json
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import report_results
from common.text import fold
from context_qa.results.report import report_page
from context_qa.results.rows import Answer, result_row
from context_qa.results.summary import summary_path
from squad_utils import NO_ANSWER, Example

ROOT = Path(__file__).parents[1]
OSLO = "Bo is from\u2028Oslo, “Norway”, and Ann from Bergen. Westoslo? No Osloite but Bo left OSLO."
ROME = "Rome (Italian: Roma) is old. In a.d. 80 it had 1,000 fountains."
HOSTILE = """</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> {{data}} ${x}' &"""


def row(idx: int, guess: str, answers=("Oslo",), confidence=0.5, context=OSLO, **changed) -> dict:
    example = Example(f"q{idx}", context, "Where is Bo from?", answers)
    no_answer = None if confidence is None else 1 - confidence
    answer = Answer(guess, confidence, no_answer, 0.125, 40 + idx, 2)
    return result_row(idx, example, answer) | changed


ROWS = [
    row(0, "Oslo", ("Oslo", "in Oslo", "Oslo"), 0.9),
    row(1, "Rome", ("the 1,000 fountains",), 0.4, ROME, question="How many has it?"),
    row(2, NO_ANSWER, (), 0.7, ROME, question="Who is Ann?"),
    row(3, "Bergen", (), 0.2, question="Which town is Ann's?"),
    row(4, NO_ANSWER, ("Norway",), 0.3),
    row(5, NO_ANSWER, (), 0.8, ROME, id="q0#random"),
]
SUMMARY = {
    "complete": True,
    "num_questions": 6,
    "first_negative": 5,
    "articles": [["Norway", 2], ["Italy", 4]],
    "arguments": {"model": "models/demo", "data": "some.jsonl", "dtype": "auto", "limit": None},
    "settings": {"model": "1f0c", "dtype": "float32"},
}


def write(path: Path, rows: list[dict], summary: dict | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if summary is not None:
        summary_path(path).write_text(json.dumps(summary))
    return path


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report_results.py", *map(str, arguments)])
    report_results.main(report_results.parse_args())


@pytest.fixture
def results(tmp_path) -> Path:
    return write(tmp_path / "results.jsonl", ROWS, SUMMARY)


@pytest.fixture
def report(monkeypatch, tmp_path):
    """The page of these rows and this summary."""

    def make(rows: list[dict], summary: dict | None = None) -> str:
        run(monkeypatch, write(tmp_path / "made.jsonl", rows, summary), "--overwrite")
        return (tmp_path / "made.html").read_bytes().decode()

    return make


@pytest.fixture
def fail(monkeypatch, capfd):
    """Run the script on arguments that cannot work; its one line on stderr."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["report_results.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_script(report_results.main, report_results.parse_args)
        out, err = capfd.readouterr()
        assert caught.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


class Page(HTMLParser):
    """The elements of a page, as (tag, attributes), and its texts outside of scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def data_of(html: str) -> dict:
    """What the page's table shows."""
    return json.loads(re.search(r'<script [^>]*id="data">(.*?)</script>', html, re.DOTALL)[1])


def table(html: str, label: str) -> list[list[str]]:
    """The texts of the cells of a table."""
    inside = re.search(rf'<table class="figures" aria-label="{label}.*?</table>', html, re.DOTALL)
    lines = re.findall("<tr>(.*?)</tr>", inside[0], re.DOTALL)
    cells = [re.findall("<t[hd].*?>(.*?)</t[hd]>", line, re.DOTALL) for line in lines]
    return [[unescape(re.sub("<.*?>", " ", cell)).strip() for cell in line] for line in cells]


def test_the_documented_command_gives_the_same_page_every_time(results, report):
    command = [sys.executable, "report_results.py", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    page = results.with_suffix(".html")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{page}\n", "")
    assert page.read_text("utf-8") == report(ROWS, SUMMARY).replace("made.jsonl", "results.jsonl")
    assert sorted(path.name for path in results.parent.iterdir() if "made" not in path.name) == [
        "results.html",
        "results.jsonl",
        "results.jsonl.summary.json",
    ]


def test_no_torch_is_needed():
    code = "import sys; sys.modules['torch'] = None; import report_results"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_page_needs_nothing_else(report):
    html = report(ROWS, SUMMARY)
    page = Page(html)
    assert page.tags().count("svg") == 3
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"' <]*", html)) == namespaces
    assert not {"link", "img", "iframe", "object", "image"} & set(page.tags())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert not {"src", "srcset", "href", "action"} & set(attributes)
        assert attributes.get("xlink:href", "#")[0] == "#"
    drawn = set(re.findall(r'(?:xlink:href="|url\()#([\w-]+)', html))
    assert len(drawn) > 3 and drawn <= set(ids)


def test_scores_and_their_intervals(report):
    html = report(ROWS, SUMMARY)
    header, *lines = table(html, "Scores")
    assert header == ["percent", "questions", "exact match", "F1", "raw match"]
    assert [line[:2] for line in lines] == [
        ["all", "5"],
        ["with answer", "3"],
        ["without answer", "2"],
        ["negatives", "1"],
    ]
    assert [re.match(r"[\d.]+", line[2])[0] for line in lines] == ["40.0", "33.3", "50.0", "100.0"]
    assert re.search(r"\d–\d", lines[0][2]) and "–" not in lines[3][2]  # one article: no interval
    assert "bootstrap over 2 articles" in html
    header, *lines = table(html, "Abstention")
    assert header == ["", "own questions", "with negatives"]
    abstentions, unanswerable, precision, recall, f1, *of_confidence = (line[1:] for line in lines)
    assert (abstentions, unanswerable) == (["2", "3"], ["2", "3"])
    assert precision == recall == f1 == ["50.0 %", "66.7 %"]
    assert len(of_confidence) == 3


def test_one_article_has_no_intervals_and_no_text_speaks_of_one(report):
    alone = (ROWS[:5], [["Norway", 5]], "1 article"), (ROWS[:1], [], "1 question")
    for rows, articles, over in alone:
        summary = SUMMARY | {"articles": articles, "num_questions": len(rows)}
        html = report(rows, summary | {"first_negative": None})
        assert f"<p>No 95 % intervals: {over} cannot be resampled. Exact match" in html
        assert "95 % interval" not in html.replace("No 95 % intervals", "")
        assert "<i style=" not in html and "–" not in "".join(table(html, "Scores")[1])


def test_texts_of_either_direction_are_shown_in_their_own(report):
    """What is written from the right; in a browser, of the table too."""
    arabic = "\u0643\u062a\u0627\u0628"
    arguments = {"model": arabic, "data": arabic}
    html = report(ROWS, SUMMARY | {"arguments": arguments, "warnings": [arabic]})
    assert f'<h1 dir="auto">{arabic} on {arabic}</h1>' in html
    assert f"Warning: <bdi>{arabic}</bdi>." in html and "<p><bdi>made.jsonl</bdi>. Que" in html
    assert f'<dt>model</dt><dd dir="auto">{arabic}</dd>' in html
    for shown in ("opener", "answer", "guess"):
        assert re.search(rf'"(button|span)", .*CLIPPED.*row\.({shown}|question)\)', html), shown


def test_the_search_folds_as_answers_are_folded():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    page = report_page(ROWS, SUMMARY, "x")
    parts = (r"^const ACCENTS .*?(?=^$)", r"^function fold\(.*?(?=^function sortBy)")
    source = "\n".join(re.search(part, page, re.M | re.S)[0] for part in parts)
    assert "const wanted = fold(search.value" in page and "contexts.map(fold)" in page
    texts = [
        "ÅNGSTRÖM Straße",
        "１９９８ ﬁve",
        "“x” ’y’ —",
        "\u0660\u0669",
        "Zoe\u0301\n\tA",
        "10⁵ 日本",
    ]
    script = f"{source}\nconsole.log(JSON.stringify({json.dumps(texts)}.map((text) => fold(text))))"
    done = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [fold(text) for text in texts]


def test_what_was_evaluated(report):
    html = report(ROWS, SUMMARY)
    assert '<h1 dir="auto">models/demo on some.jsonl</h1>' in html
    assert (
        "Questions: 6 (3 with an answer, 2 without an answer, "
        "1 on another context, without an answer (negatives)), contexts: 2."
    ) in html
    assert '<dt>dtype</dt><dd dir="auto">float32</dd>' in html and "<dt>limit</dt>" not in html
    assert "Incomplete" not in html


def test_without_a_summary(report):
    html = report(ROWS)
    assert '<h1 dir="auto">made.jsonl</h1>' in html and "The results have no summary" in html
    assert "bootstrap over 6 questions" in html  # none of them is known as a negative


def test_warnings_of_the_run_are_shown(report):
    html = report(ROWS, SUMMARY | {"warnings": ["2 ids are <b>there</b> twice"]})
    assert "Warning: <bdi>2 ids are &lt;b&gt;there&lt;/b&gt; twice</bdi>." in html


def test_the_folded_score_is_there_where_it_differs(report):
    assert "form of their characters" not in report(ROWS)
    rows = [*ROWS[:4], row(4, "Norwa\u0301y", ("Norwáy",))]
    assert "in the form of their characters alone, exact match is 60.0." in report(rows)


def test_the_page_of_an_incomplete_run_has_a_notice(report):
    html = report(ROWS[:2], SUMMARY | {"complete": False})
    assert "This file is incomplete: 2 of 6 questions. The scores are those of its rows." in html


@pytest.mark.parametrize(
    ("rows", "summary", "notice"),
    [
        (ROWS[:2], SUMMARY, "is incomplete: 2 of 6 questions"),
        (
            ROWS,
            SUMMARY | {"complete": None},
            "has all of its run&#x27;s 6 questions, but the run has not ended",
        ),
        (ROWS, {"complete": False}, "is incomplete: 6 questions"),
        (ROWS, {"num_questions": 4}, "has more rows, 6, than its run has questions, 4"),
    ],
)
def test_a_file_that_is_not_all_of_its_run_has_a_notice(report, rows, summary, notice):
    html = report(rows, summary)
    assert f"This file {notice}. The scores are those of its rows.</p>" in html


@pytest.mark.parametrize("summary", [SUMMARY, None])
def test_a_torn_last_line_has_a_notice(monkeypatch, tmp_path, summary):
    path = write(tmp_path / "torn.jsonl", ROWS, summary)
    path.write_bytes(path.read_bytes()[:-9])
    run(monkeypatch, path)
    html = path.with_suffix(".html").read_text("utf-8")
    share = "5 of 6 questions" if summary else "5 questions"
    assert f"This file is incomplete: {share}; its last line is torn. The scores" in html


def test_rows_of_several_commits_are_listed(report):
    one, other = ({"rows": n, "git_commit": HOSTILE + str(n), "python": "3.11"} for n in (2, 4))
    html = report(ROWS, SUMMARY | {"made_by": [one, other], "git_commit": "c1"})
    text = f"rows 2, git_commit {HOSTILE}2, python 3.11; rows 4, git_commit {HOSTILE}4, python 3.11"
    assert text in Page(html).text
    assert "made_by" not in Page(report(ROWS, SUMMARY | {"made_by": [one]})).text
    report(ROWS, SUMMARY | {"made_by": [1, "x"]})


@pytest.mark.parametrize("has_context", [True, False])
def test_results_of_the_original_project(report, has_context):
    """Of its two scripts: one writes contexts, the other one token counts."""
    names = ("idx", "question", "answer", "guess", "time")
    names += ("context",) if has_context else ("num_tokens", "tokens_per_sec")
    older = [{name: row[name] for name in names} | {"is_correct": False} for row in ROWS[:5]]
    html = report(older)
    new = report(ROWS[:5])
    assert table(html, "Scores") == table(new, "Scores")  # its own is_correct may be another one
    assert "Questions: 5 (3 with an answer" in html
    assert ("contexts: 2." in html) is has_context
    assert ("Tokens of the prompt" in html) is not has_context
    assert "Question word" in html and "No charts" in html and "Incomplete" not in html
    data = data_of(html)
    assert data["contexts"] == ([OSLO, ROME] if has_context else [""])
    shown = dict(zip(data["fields"], data["rows"][0], strict=True))
    assert (shown["num_tokens"], shown["num_new_tokens"]) == (None if has_context else 40, None)


def test_a_baseline_without_confidences(report):
    html = report([row(0, "Oslo", confidence=None), row(1, "", (), confidence=None)])
    assert "<svg" not in html and "these results have no confidences" in html
    assert [label for label, *_ in table(html, "Abstention")][-1].startswith("F1")
    data = data_of(html)
    assert data["rows"][0][data["fields"].index("confidence")] is None


@pytest.mark.parametrize("rows", [[row(0, "Oslo")], [row(7, "Oslo", ()), row(8, NO_ANSWER, ())]])
def test_one_row_or_one_kind_of_question(report, rows):
    html = report(rows)
    assert html.count("<svg") == 2 and "No chart of answerability" in html
    assert len(data_of(html)["rows"]) == len(rows)


def test_a_figure_of_zero_is_shown(report):
    html = report([row(0, NO_ANSWER), row(1, "Oslo", ())])
    assert ["0.0 %"] in [cells for _, *cells in table(html, "Abstention")]


def test_hostile_texts_stay_texts(report):
    texts = dict.fromkeys(("id", "question", "guess", "context", "answer"), HOSTILE)
    hostile = row(0, "Oslo") | texts | {"answers": [HOSTILE, "other"]}
    arguments = dict.fromkeys(("model", "data", HOSTILE), HOSTILE) | {"tokenizer": "\ud800"}
    summary = {"arguments": arguments, "settings": {"x": [HOSTILE]}, "articles": [[HOSTILE, 1]]}
    html, plain = report([hostile, *ROWS], summary), report(ROWS, SUMMARY)
    assert Page(html).tags().count("script") == 2
    assert set(Page(html).tags()) == set(Page(plain).tags())
    assert HOSTILE in Page(html).text
    data = data_of(html)
    shown = dict(zip(data["fields"], data["rows"][0], strict=True))
    assert shown["question"] == shown["guess"] == shown["id"] == HOSTILE
    assert shown["answers"] == [HOSTILE, "other"]
    assert data["contexts"] == [HOSTILE, OSLO, ROME]


def test_the_default_output_is_beside_the_results(monkeypatch, capsys, results, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "results.jsonl")
    assert capsys.readouterr().out == "results.html\n"
    run(monkeypatch, results, "--output", tmp_path / "new" / "folder" / "page.htm")
    written = (tmp_path / "new" / "folder" / "page.htm").read_bytes()
    assert written == (tmp_path / "results.html").read_bytes()


def test_inputs_are_kept(fail, results, tmp_path):
    before = results.read_bytes(), summary_path(results).read_bytes()
    link = tmp_path / "link.html"
    link.symlink_to(results)
    for output in (results, link, summary_path(results)):
        assert "would be overwritten" in fail(results, "--output", output)
    assert "would be overwritten" in fail(link)  # its default output is itself
    assert (results.read_bytes(), summary_path(results).read_bytes()) == before


def test_outputs_that_cannot_be_written(fail, results, tmp_path):
    names = sorted(tmp_path.iterdir())
    for output in (tmp_path, results / "x.html", tmp_path / ("x" * 300), "/dev/null"):
        assert f"error: {output}: cannot be written (" in fail(results, "--output", output)
    assert sorted(tmp_path.iterdir()) == names
    assert Path("/dev/null").is_char_device()


def test_files_without_results(fail, results, tmp_path):
    assert "missing.jsonl: cannot be read (No such file" in fail(tmp_path / "missing.jsonl")
    assert "cannot be read (Is a directory)" in fail("/")
    results.write_text('{"prompt": "x", "score": 1}\n')
    assert f"{results} line 1: another layout (columns: prompt, score); needed: " in fail(results)
    results.write_text("[]\n")
    assert f"{results} line 1: not a JSON object" in fail(results)
    write(results, ROWS[5:], SUMMARY)
    assert "results.jsonl: only negatives" in fail(results)
    assert not results.with_suffix(".html").exists()


def test_without_matplotlib(monkeypatch, fail, results):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in fail(results)


# In a browser

# A context, a guess, and what of the context is marked.
FORMS = [
    (
        "Zoe\u0301 Br\u00fble\u0301 came.",
        "Zo\u00e9 Bru\u0302l\u00e9",
        ["Zoe\u0301 Br\u00fble\u0301"],
    ),
    ("Zo\u00e9 came.", "ZOE", ["Zo\u00e9"]),
    ("O\u2019Neill, O'Neill.", "O\u02bcNeill", ["O\u2019Neill", "O'Neill"]),
    ("\u201cYes\u201d, 'Yes'", '"Yes"', ["\u201cYes\u201d"]),
    (
        "\uff29\uff4e \uff11\uff19\uff19\uff18.",
        "in 1998",
        ["\uff29\uff4e \uff11\uff19\uff19\uff18"],
    ),
    ("In \u0661\u0669\u0669\u0668.", "1998", ["\u0661\u0669\u0669\u0668"]),
    ("1990\u201395", "1990-95", ["1990\u201395"]),
    ("co\u00adop", "coop", ["co\u00adop"]),
    ("Stra\u00dfe STRASSE", "strasse", ["Stra\u00dfe", "STRASSE"]),
    ("10\u2075 or 105", "105", ["105"]),
    (
        "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd.",
        "\u05e9\u05dc\u05d5\u05dd",
        ["\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd"],
    ),
    ("\U0001d7d9\U0001f600 Bo", "bo", ["Bo"]),
    ("\u30ab\u3099\u30b9", "\u30ab", []),
    ("a b", "\u200b", []),
]
TRY_IT = """
<script>
const FORMS = %FORMS%;
const seen = {};
const cells = (name) => {
  const column = headers.findIndex((header) => header.dataset.field === name);
  return [...body.querySelectorAll(".row")].map((line) => line.cells[column].textContent);
};
const pause = () => new Promise((done) => setTimeout(done, 500));
const type = async (text) => {
  search.value = text;
  search.dispatchEvent(new Event("input", { bubbles: true }));
  await pause();
  return [counter.value, cells("idx")];
};
const show = (name) => {
  filters.querySelector(`[value=${name}]`).click();
  return cells("idx");
};
const sort = (name) => {
  const header = headers.find((header) => header.dataset.field === name);
  header.querySelector("button").click();
  return [header.getAttribute("aria-sort"), cells("idx")];
};
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true }));
addEventListener("load", async () => {
  seen.drawn = cells("idx");
  seen.all = counter.value;
  seen.question = await type("WHO is");
  seen.context = await type("roma)");
  seen.accents = await type("  ÖSLO, “norway");
  seen.answers = await type("in oslo");
  seen.nothing = await type("nowhere <b>");
  await type("");
  seen.filters = Object.fromEntries(Object.keys(FILTERS).map((name) => [name, show(name)]));
  seen.both = (show("wrong"), await type("norway"));
  await type("");
  show("all");
  seen.up = sort("confidence");
  seen.down = sort("confidence");
  seen.texts = sort("guess");
  sort("idx");
  body.querySelector("button").focus();
  press("ArrowDown"); press("ArrowDown"); press("ArrowUp");
  seen.focused = document.activeElement.closest("tr").cells[0].textContent;
  const open = (place) => {
    body.querySelectorAll(".row")[place].click();
    const detail = body.querySelector(".detail");
    const marks = [...detail.querySelectorAll("p mark")].map((m) => [m.textContent, m.className]);
    return [detail, marks];
  };
  seen.hostile_marks = open(6)[1];
  body.querySelectorAll(".row")[6].click();
  const [detail, marks] = open(0);
  seen.marks = marks;
  seen.context_text = detail.querySelector("p").textContent;
  seen.detail = [...detail.querySelectorAll("dl div")].map((line) =>
    [...line.children].map((cell) => cell.textContent));
  seen.forms = FORMS.map(([context, guess]) =>
    marked(context, guess, []).filter((piece) => piece.nodeType).map((m) => m.textContent));
  seen.expanded = body.querySelector("button").getAttribute("aria-expanded");
  body.querySelector(".row").click();
  seen.closed = body.querySelector(".detail") === null;
  seen.fits = document.documentElement.scrollWidth <= innerWidth;
  seen.images = document.images.length;
  seen.errors = errors;
  document.body.replaceChildren(element("pre", { id: "seen" }, JSON.stringify(seen)));
});
</script>
"""
CATCH = """<head><script>
const errors = [];
window.alert = () => errors.push("alert");
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
</script>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    """What a browser shows to a user who searches, filters, sorts and opens a row."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("needs a browser: the Debian package chromium")
    folder = tmp_path_factory.mktemp("browser")
    rows = [*ROWS, row(6, HOSTILE, ("$x+(", "ROM"), 0.6, HOSTILE + " Rome, $X+( and Roman")]
    html = report_page(rows, SUMMARY, "results.jsonl")
    script = TRY_IT.replace(
        "%FORMS%", json.dumps([[context, guess] for context, guess, _ in FORMS])
    )
    (folder / "page.html").write_text(html.replace("<head>", CATCH) + script, "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    command = [browser, *flags, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900"]
    command += ["--dump-dom", f"file://{folder / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search('<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(unescape(found[1]))


def test_in_a_browser_all_rows_are_shown_without_errors(seen):
    assert seen["errors"] == []
    assert seen["drawn"] == list("0123456") and seen["all"] == "7 of 7 questions"
    assert seen["fits"] and seen["images"] == 0


def test_in_a_browser_search_finds_questions_answers_and_contexts(seen):
    assert seen["question"] == ["1 of 7 questions", ["2"]]
    assert seen["context"] == ["3 of 7 questions", ["1", "2", "5"]]
    assert seen["accents"] == ["3 of 7 questions", ["0", "3", "4"]]
    assert seen["answers"] == ["1 of 7 questions", ["0"]]
    assert seen["nothing"] == ["0 of 7 questions", []]


def test_in_a_browser_filters(seen):
    assert seen["filters"] == {
        "all": list("0123456"),
        "wrong": ["1", "3", "4", "6"],
        "right": ["0", "2", "5"],
        "abstained": ["2", "4", "5"],
        "should_have": ["3"],
        "negatives": ["5", "6"],
    }
    assert seen["both"] == ["2 of 7 questions", ["3", "4"]]


def test_in_a_browser_sorting(seen):
    assert seen["up"] == ["ascending", ["3", "4", "1", "6", "2", "5", "0"]]
    assert seen["down"] == ["descending", ["0", "5", "2", "6", "1", "4", "3"]]
    assert seen["texts"][1][1:] == ["3", "5", "2", "4", "0", "1"]


def test_in_a_browser_a_row_opens_with_its_guess_marked(seen):
    assert seen["focused"] == "1"
    # Not in "Westoslo" or "Osloite": whole words stand elsewhere.
    assert seen["marks"] == [["Oslo", "guess reference"], ["OSLO", "guess reference"]]
    assert seen["hostile_marks"] == [
        [HOSTILE, "guess"],
        ["Rom", "reference"],
        ["$X+(", "reference"],
        ["Rom", "reference"],
    ]
    assert seen["context_text"] == OSLO
    assert ["references", "Oslo; in Oslo"] in seen["detail"]
    assert ["tokens", "40 read, 2 written"] in seen["detail"]
    assert ["id", "q0 (idx 0)"] in seen["detail"]
    assert seen["expanded"] == "true" and seen["closed"]


def test_in_a_browser_the_guess_is_marked_in_whatever_form_it_is_written(seen):
    assert seen["forms"] == [marked for *_, marked in FORMS]
