"""The results file as it is written: nothing is lost or mixed, and a second run resumes it."""

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
from tqdm import tqdm

from common.errors import UserError
from common.provenance import describe_run, sha256
from context_qa.results.reading import read_results
from context_qa.results.results_file import ResultsFile
from context_qa.results.rows import Answer, result_row
from context_qa.results.score_table import print_summary
from context_qa.results.summary import read_summary
from squad_utils import NO_ANSWER, Example

ROOT = Path(__file__).parents[3]
EXAMPLES = [
    Example(f"q{idx}", f"Bo is\u2028a “cat” of {idx // 2}.", f"Who is {idx}?", answers, article)
    for idx, (answers, article) in enumerate(
        [(("a cat", "Bo"), "cats"), ((), "cats"), (("x",), "dogs"), ((), "dogs"), (("y",), "dogs")]
    )
]
SETTINGS = {"model": "abc", "limit": None}


def row(idx: int, guess: str = "x\ny\u2028“z”") -> dict:
    return result_row(idx, EXAMPLES[idx], Answer(guess, 0.5, 0.25, 0.5, 140, 3))


ROWS = [row(idx) for idx in range(len(EXAMPLES))]


def opened(path: Path, overwrite: bool = False, examples=EXAMPLES, **settings) -> ResultsFile:
    record = {"settings": SETTINGS | settings}
    return ResultsFile(str(path), examples, record, overwrite)


def write(path: Path, *rows: dict, **arguments) -> None:
    with opened(path, **arguments) as results:
        results.write(rows)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "results.jsonl"


def test_rows_are_on_disk_after_each_write_one_a_line(tmp_path):
    path = tmp_path / "new" / "folder" / "results.jsonl"
    with opened(path) as results:
        results.write(ROWS[:2])
        assert read_results(str(path)) == ROWS[:2]
        results.write([])
        results.write(ROWS[2:])
        assert read_results(str(path)) == ROWS
    text = path.read_text("utf-8")
    assert text.count("\n") == len(ROWS) and "“cat”" in text  # for a reader's eyes, not escaped


def test_a_second_run_resumes(path):
    write(path, *ROWS[:2])
    with opened(path) as results:
        assert results.done == {0, 1}
        results.write(ROWS[2:])
        summary = results.finish()
    assert read_results(str(path)) == ROWS
    assert summary["rows_of_earlier_runs"] == 2 and summary["scores"]["num_questions"] == 5


WHOLE_LINE = json.dumps(ROWS[2], ensure_ascii=False).encode()
TORN = [WHOLE_LINE[:length] for length in (*range(1, 30), *range(30, len(WHOLE_LINE), 9))]
TORN += [b"\0\0\0", WHOLE_LINE[:20] + b"\0" * 9]


@pytest.mark.parametrize("torn", TORN)
def test_a_torn_line_is_dropped(path, torn):
    write(path, *ROWS[:2])
    path.write_bytes(path.read_bytes() + torn)
    assert read_results(str(path)) == ROWS[:2]
    with opened(path) as results:
        assert results.done == {0, 1}
        results.write(ROWS[2:])
    assert read_results(str(path)) == ROWS


def test_nothing_of_a_long_torn_line_is_left_behind_a_shorter_one(path):
    write(path, *ROWS[:4])
    path.write_bytes(path.read_bytes() + WHOLE_LINE[:30] + b"x" * 5000)
    write(path, ROWS[4])
    assert read_results(str(path)) == ROWS
    assert len(path.read_bytes().split(b"\n")) == len(ROWS) + 1


def test_a_run_that_computes_nothing_leaves_nothing(path):
    with pytest.raises(ZeroDivisionError), opened(path):
        raise ZeroDivisionError
    assert os.listdir(path.parent) == []
    path.touch()
    opened(path).__exit__()
    assert path.exists()  # it is not ours


def test_a_whole_line_without_its_newline_is_written_again(path):
    write(path, *ROWS[:2])
    path.write_bytes(path.read_bytes()[:-1])
    write(path, *ROWS[1:])
    assert read_results(str(path)) == ROWS


@pytest.mark.parametrize("left", [b"", b'{"idx": 0, "id'])
def test_a_file_without_a_whole_line_is_restarted_by_any_run(path, left):
    write(path, *ROWS, model="other")
    path.write_bytes(left)
    write(path, *ROWS)
    assert read_results(str(path)) == ROWS
    assert read_summary(path)["settings"] == SETTINGS


@pytest.mark.parametrize("other", [True, False], ids=["of another run", "of an unknown run"])
def test_the_one_row_of_another_run_without_its_newline_is_kept(path, other):
    write(path, ROWS[0], model="other")
    path.write_bytes(path.read_bytes()[:-1])
    if not other:
        path.with_name("results.jsonl.summary.json").unlink()
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"results of an{'other' if other else ' unknown'} run"):
        opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("left", [b"my notes", b'{"idx": 1}\n', b'{"idx": 7, "id": "x", "my": "no'])
def test_what_another_program_puts_there_before_the_first_row_is_kept(path, left):
    for overwrite, before in ((True, [*ROWS[:2]]), (False, [])):
        if before:
            write(path, *before, model="other")
        with opened(path, overwrite=overwrite) as results:
            path.write_bytes(left)
            results.write(ROWS)
            results.finish()
        assert read_results(str(path)) == ROWS
        [kept] = path.parent.glob("*.replaced")
        assert kept.read_bytes() == left
        for file in path.parent.iterdir():
            file.unlink()


def test_a_summary_that_another_program_puts_there_is_kept(path):
    summary = path.with_name("results.jsonl.summary.json")
    with opened(path) as results:
        summary.write_text("mine")
        with pytest.raises(UserError, match="something other than the summary of a run"):
            results.write(ROWS)
    assert summary.read_text() == "mine"
    summary.unlink()
    with opened(path) as results:
        results.write(ROWS)
        summary.write_text("mine")
        with pytest.raises(UserError, match="something other than the summary of a run"):
            results.finish()
    assert summary.read_text() == "mine" and read_results(str(path)) == ROWS


@pytest.mark.parametrize("extra", [{"note": "mine"}, {"note": "\ud800"}])
def test_rows_with_a_column_more_are_kept(path, extra):
    write(path, ROWS[1], ROWS[0])
    path.write_text("".join(json.dumps(row | extra) + "\n" for row in (ROWS[1], ROWS[0])))
    before = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"another layout|something other than results"):
            opened(path, overwrite=overwrite)
    assert path.read_bytes() == before


def test_a_clock_that_is_set_back_does_not_matter(path, monkeypatch):
    clock = iter(range(10**6, 0, -1000))
    with opened(path) as results:
        monkeypatch.setattr("time.time", lambda: next(clock))
        results.write(ROWS)
        assert 0 <= results.finish()["wall_seconds"] < 600


def test_rows_in_any_order_end_in_the_order_of_the_data(path):
    with opened(path) as results:
        results.write([ROWS[3], ROWS[1]])
        results.write([ROWS[4]])
    with opened(path) as results:
        assert results.done == {1, 3, 4}
        results.write([ROWS[2], ROWS[0]])
        results.finish()
    assert read_results(str(path)) == ROWS
    assert sorted(os.listdir(path.parent)) == ["results.jsonl", "results.jsonl.summary.json"]


def test_a_link_stays_a_link(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere" / "real.jsonl")
    with opened(path) as results:
        results.write(ROWS[::-1])
        results.finish()
    assert path.is_symlink() and read_results(str(path)) == ROWS


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"model": "def"}, "model: abc there, def now"),
        ({"limit": 7, "model": "def"}, "model: abc there, def now; limit: None there, 7 now"),
        ({"prompt_order": "read_twice"}, "prompt order: None there, read_twice now"),
    ],
)
def test_another_run_is_refused_and_the_difference_is_named(path, other, complaint):
    write(path, *ROWS[:2])
    before = path.read_bytes()
    with pytest.raises(UserError, match=re.escape(f"results of another run ({complaint}); give")):
        opened(path, **other)
    assert path.read_bytes() == before


def test_other_data_is_refused(path):
    write(path, *ROWS[:2])
    changed = [EXAMPLES[0], EXAMPLES[2], *EXAMPLES[2:]]
    with pytest.raises(UserError, match="in line 2 that is edited, or not of the data's idx 1"):
        opened(path, examples=changed)
    with pytest.raises(UserError, match="an idx, 1, in line 2 that is too high"):
        opened(path, examples=EXAMPLES[:1])


def test_twice_the_same_row_is_refused(path):
    write(path, ROWS[0], ROWS[0])
    with pytest.raises(UserError, match="an idx, 0, in line 2 that"):
        opened(path)


def test_rows_of_an_unknown_run_are_refused(path):
    write(path, *ROWS[:2])
    path.with_name("results.jsonl.summary.json").unlink()
    with pytest.raises(
        UserError, match=r"unknown run: no results.jsonl.summary.json; .*set overwrite"
    ):
        opened(path)
    assert read_results(str(path)) == ROWS[:2]


def test_a_line_that_is_no_row_is_refused(path):
    write(path, *ROWS[:2])
    path.write_bytes(b"hello\n" + path.read_bytes())
    with pytest.raises(
        UserError, match=r"results\.jsonl line 1: not a JSON object.*move the file away"
    ):
        opened(path)


@pytest.mark.parametrize("missing", ["idx", "f1", "num_new_tokens"])
def test_a_run_does_not_resume_another_layout(path, missing):
    """Which its readers complete."""
    write(path, *ROWS[:2])
    older = {name: value for name, value in ROWS[1].items() if name != missing}
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(older) + "\n")
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        opened(path)
    assert str(caught.value) == (
        f"{path} line 2: another layout (columns: {', '.join(older)}); needed: "
        f"{', '.join(ROWS[0])}; give another path or move the file away"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "edited",
    [{"guess": NO_ANSWER}, {"exact_match": 1.0}, {"f1": 0.5}, {"is_correct": True}, {"time": 0.0}],
)
def test_rows_that_were_edited_are_refused(path, edited):
    write(path, ROWS[0], ROWS[1] | edited)
    with pytest.raises(UserError, match="in line 2 that is edited, or not of the data's idx 1"):
        opened(path)


# Another program changes the file during a run

ORDERS = {"in order": ROWS, "not in order": [ROWS[1], ROWS[3], ROWS[0], ROWS[4], ROWS[2]]}


def overwritten(path: Path) -> None:
    """Other bytes, as many as there were."""
    path.write_bytes(path.read_bytes().replace(b"dogs", b"cats").swapcase())


CHANGES = {
    "truncated": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 5),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b'{"idx": 7}\n'),
    "other": overwritten,
    "removed": lambda path: path.unlink(),
    "replaced": lambda path: (path.unlink(), path.write_text("notes")),
    "renamed": lambda path: path.rename(path.with_name("moved")),
}


@pytest.mark.parametrize("rows", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("last", [False, True], ids=["on the way", "before the end"])
def test_a_file_that_is_changed_is_written_again(path, capfd, rows, change, last):
    with opened(path) as results:
        results.write(rows[:2])
        if not last:
            change(path)
        results.write(rows[2:4])
        results.write(rows[4:])
        if last:
            change(path)
        summary = results.finish()
    assert read_results(str(path)) == ROWS
    assert summary["complete"] is True and read_summary(path) == json.loads(json.dumps(summary))
    warning = capfd.readouterr().err
    assert re.fullmatch(
        rf"warning: {path}: was (removed|changed|(changed|replaced) \(.* is now .*\)) "
        r"during the run; its \d rows are written again\n",
        warning,
    )


@pytest.mark.parametrize("change", [c for name, c in CHANGES.items() if name != "other"])
def test_a_run_that_is_cut_off_after_a_change_loses_nothing(path, change):
    with pytest.raises(KeyboardInterrupt), opened(path) as results:
        results.write(ROWS[:2])
        change(path)
        raise KeyboardInterrupt
    assert read_results(str(path)) == ROWS[:2]
    with opened(path) as results:
        assert results.done == {0, 1}


def test_a_change_is_noticed_in_a_resumed_file_too(path, capfd):
    """Of which a user has formatted a line: that was before the run."""
    write(path, *ROWS[:2])
    path.write_bytes(path.read_bytes().replace(b'{"idx": 0, ', b'{  "idx":0,'))
    with opened(path) as results:
        results.write(ROWS[2:4])
        assert capfd.readouterr().err == ""
        os.truncate(path, 100)
        results.write(ROWS[4:])
        results.finish()
    assert read_results(str(path)) == ROWS
    assert capfd.readouterr().err.count("its 4 rows are written again\n") == 1


@pytest.mark.parametrize("change", [CHANGES["longer"], CHANGES["other"]])
def test_what_another_program_writes_into_the_file_is_kept(path, change):
    with opened(path) as results:
        results.write(ROWS[:2])
        change(path)
        found = path.read_bytes()
        results.write(ROWS[2:])
        results.finish()
    assert read_results(str(path)) == ROWS
    assert path.with_name("results.jsonl.replaced").read_bytes() == found


def test_another_programs_file_is_kept(path):
    with opened(path) as results:
        for number, text in enumerate(["notes", "more"]):
            results.write(ROWS[number : number + 1])
            path.unlink()
            path.write_text(text)
        results.write(ROWS[2:])
        results.finish()
    assert read_results(str(path)) == ROWS
    assert path.with_name("results.jsonl.replaced").read_text() == "notes"
    assert path.with_name("results.jsonl.replaced1").read_text() == "more"


def test_a_file_that_another_run_writes_in_its_place_is_left_alone(path):
    results = opened(path)
    results.write(ROWS[:2])
    path.unlink()
    with opened(path) as other:
        other.write(ROWS[:1])
        for again in (lambda: results.write(ROWS[2:]), results.finish, results.__exit__):
            with pytest.raises(UserError, match="another run is writing it"):
                again()
    assert read_results(str(path)) == ROWS[:1]


def test_a_folder_that_is_removed_is_made_again(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    with opened(path) as results:
        results.write(ROWS[:2])
        shutil.rmtree(path.parent)
        results.write(ROWS[2:3])
    assert read_results(str(path)) == ROWS[:3]
    with opened(path) as results:  # which the summary alone allows
        assert results.done == {0, 1, 2}


def test_a_file_that_is_removed_before_the_first_row(path):
    write(path, *ROWS[:2], model="other")
    with opened(path, overwrite=True) as results:
        path.unlink()
        results.write(ROWS)
        results.finish()
    assert read_results(str(path)) == ROWS


def test_the_progress_bar_does_not_cut_the_warning(path, capfd):
    with opened(path) as results, tqdm(total=5) as progress:
        results.write(ROWS[:2])
        progress.update(2)
        os.truncate(path, 0)
        results.write(ROWS[2:])
    lines = re.split("[\r\n]", capfd.readouterr().err)
    assert [line for line in lines if "warning" in line and line.startswith("warning: ")]


def test_the_lock_outlives_the_sorting(path, monkeypatch):
    """A run that comes while the first one computes intervals must not begin."""
    with opened(path) as results:
        results.write(ROWS[::-1])

        def summarize(*arguments):
            with pytest.raises(UserError, match="another run is writing it"):
                opened(path, overwrite=True)
            return {}

        monkeypatch.setattr("context_qa.results.results_file.summarize", summarize)
        assert results.finish()["complete"]
    assert read_results(str(path)) == ROWS


def test_a_summary_of_other_results_does_not_outlive_them(path, monkeypatch):
    """Should the disk be full when the new one is written."""
    with opened(path) as results:
        results.write(ROWS)
        results.finish()

    def full(*arguments, **more):
        raise UserError("full")

    monkeypatch.setattr("context_qa.results.results_file.write_output", full)
    with opened(path, overwrite=True, model="other") as results, pytest.raises(UserError):
        results.write(ROWS)
    assert read_summary(path) == {} and path.read_bytes() == b""


def test_a_complete_file_is_scored_again_from_its_rows(path):
    with opened(path) as results:
        results.write(ROWS)
        first = results.finish()
    text = path.with_name("results.jsonl.summary.json").read_text()
    forged = text.replace('"num_questions": 5', '"num_questions": 7')
    path.with_name("results.jsonl.summary.json").write_text(forged)
    with opened(path) as results:
        assert results.finish()["scores"] == first["scores"]


@pytest.mark.parametrize("complete", [True, False, 1, "yes", None])
def test_the_first_negative_is_that_of_the_last_run(path, complete):
    with opened(path) as results:
        results.record["first_negative"] = 3
        results.write(ROWS)
        results.finish(device="first")
    summary = json.loads(path.with_name("results.jsonl.summary.json").read_text())
    summary |= {"complete": complete, "first_negative": 1}
    path.with_name("results.jsonl.summary.json").write_text(json.dumps(summary))
    with opened(path) as results:
        results.record["first_negative"] = 3
        again = results.finish(device="second")
    assert again["first_negative"] == 3 and again["scores"]["negatives_num_questions"] == 2
    assert again["device"] == ("first" if complete is True else "second")


def test_who_may_read_the_file_stays_the_same(path):
    path.touch(mode=0o600)
    with opened(path) as results:
        results.write(ROWS[::-1])
        results.finish()
    assert path.stat().st_mode & 0o777 == 0o600


def test_overwriting_waits_for_the_first_row(path):
    write(path, *ROWS[:2], model="other")
    with opened(path, overwrite=True) as results:
        assert results.done == set()
        assert read_results(str(path)) == ROWS[:2]
        assert read_summary(path)["settings"]["model"] == "other"
        results.write(ROWS[2:3])
        assert read_results(str(path)) == ROWS[2:3]
        assert read_summary(path)["settings"]["model"] == "abc"


def test_a_run_that_does_not_answer_all_is_not_complete(path, capfd):
    with opened(path) as results:
        results.write(ROWS[:3])
        assert results.finish()["complete"] is False
    assert capfd.readouterr().err == f"warning: {path}: is incomplete: 3 of 5 questions\n"
    with opened(path) as results:
        results.write(ROWS[3:])
        assert results.finish()["complete"] is True


def test_two_runs_do_not_write_one_file(path):
    with opened(path), pytest.raises(UserError, match="another run is writing it"):
        opened(path)
    opened(path).__exit__()


@pytest.mark.parametrize(
    "output", [".", "file/results.jsonl", "file/deeper/results.jsonl", "a" * 300, "fifo"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_path_that_cannot_be_written_is_an_error_at_once(tmp_path, output, overwrite):
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError) as caught:
        opened(tmp_path / output, overwrite)
    assert str(tmp_path / output) in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_summary_that_cannot_be_written_is_an_error_at_once(path):
    path.with_name("results.jsonl.summary.json").mkdir()
    with pytest.raises(UserError, match=r"summary\.json: cannot be written \(not a file\)"):
        opened(path)


# A full disk, and a signal while rows are written


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root, who may mount a tmpfs, for a disk that is full")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(path: Path) -> None:
    """Rows until there is no room, then a rerun that finds as little."""
    many = EXAMPLES[:1] * 5000
    rows = [ROWS[0] | {"idx": idx} for idx in range(len(many))]
    for _ in range(2):
        with opened(path, examples=many) as results:
            count = len(results.rows)
            complaint = r"results\.jsonl(\.summary\.json)?: cannot be written \(.+\); fix"
            with pytest.raises(UserError, match=complaint):
                for idx in range(count, len(many), 7):
                    results.write(rows[idx : idx + 7])
            written = list(results.rows)
        assert read_results(str(path)) == written == rows[: len(written)]
        assert path.read_bytes().endswith(b"\n")
    assert len(written) > 50


def test_a_full_disk_is_an_error_and_leaves_whole_lines(small_disk):
    path = small_disk / "results.jsonl"
    fill(path)
    with opened(path, examples=EXAMPLES[:1] * 5000) as results:
        with pytest.raises(UserError, match=r"summary.json: cannot be written .No space left"):
            results.finish()
        assert len(read_results(str(path))) == len(results.rows)
    assert read_summary(path)["complete"] is False
    assert len(os.listdir(small_disk)) == 2


def test_a_limit_on_the_file_size_is_as_a_full_disk(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        fill(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_signal_during_a_write_leaves_whole_lines(path, monkeypatch):
    pwrite = os.pwrite

    def interrupted(descriptor, data, offset):
        pwrite(descriptor, data[:10], offset)
        raise KeyboardInterrupt

    with opened(path) as results:
        results.write(ROWS[:2])
        monkeypatch.setattr(os, "pwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            results.write(ROWS[2:])
        assert read_results(str(path)) == ROWS[:2]
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
        results.write(ROWS[2:])  # a system that writes a few bytes at a time
    assert read_results(str(path)) == ROWS


# The summary


@pytest.fixture
def summary(tmp_path) -> dict:
    """Of five rows of two articles: three answerable, one of them right; two unanswerable, both."""
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    data.write_text("{}")
    guesses = ["bo", NO_ANSWER, "small x", "I dont know", "z"]
    rows = [row(idx, guess) for idx, guess in enumerate(guesses)]
    args = argparse.Namespace(model=str(model), data=str(data), batch_size=32, limit=None)
    hashes = {"model_sha256": None, "tokenizer_sha256": None, "data_sha256": sha256(args.data)}
    record = {"settings": SETTINGS} | describe_run(vars(args)) | hashes
    path = tmp_path / "results.jsonl"
    with ResultsFile(str(path), EXAMPLES, record) as results:
        results.write(rows[:1])
        assert read_summary(path) == {"complete": False} | results.record
        results.write(rows[1:])
        returned = results.finish(device="cpu")
    assert json.loads(json.dumps(returned)) == read_summary(path)
    return read_summary(path)


# The versions that made the rows

OLD = {"git_commit": "a1", "python": "3.11.7", "packages": {"torch": "2.11", "numba": "0.6"}}
NEW = {"git_commit": "b2", "python": "3.12.1", "packages": {"torch": "2.13", "numba": "0.6"}}
NEWEST = NEW | {"git_commit": "c3"}


def run_by(versions: dict, path: Path, rows: list[dict], ends: bool = False) -> dict:
    """A run of these versions that writes these rows, one by one, and ends or is killed; its
    summary."""
    results = ResultsFile(str(path), EXAMPLES, {"settings": SETTINGS} | versions)
    for row in rows:
        results.write([row])
    if ends:
        results.finish()
    os.close(results.descriptor)
    return read_summary(path)


def made(*entries: tuple[int, dict]) -> list[dict]:
    return [{"rows": rows} | versions for rows, versions in entries]


def test_a_summary_names_all_versions_that_made_its_rows(path):
    assert run_by(OLD, path, ROWS[:2])["made_by"] == []  # known when the next run begins
    assert run_by(NEW, path, ROWS[2:3])["made_by"] == made((2, OLD))
    summary = run_by(NEWEST, path, ROWS[3:], ends=True)
    assert summary["made_by"] == made((2, OLD), (1, NEW), (2, NEWEST))
    assert summary["git_commit"] == "c3" and summary["rows_of_earlier_runs"] == 3


def test_runs_of_the_same_versions_in_a_row_are_one_entry(path):
    for versions, rows in ((OLD, ROWS[:1]), (OLD, ROWS[1:2]), (NEW, ROWS[2:3]), (OLD, ROWS[3:4])):
        run_by(versions, path, rows)
    summary = run_by(OLD, path, ROWS[4:], ends=True)
    assert summary["made_by"] == made((2, OLD), (1, NEW), (2, OLD))


def test_a_run_that_adds_no_row_has_no_entry(path):
    run_by(OLD, path, ROWS[:2])
    run_by(NEW, path, [])
    run_by(NEW, path, ROWS[2:])
    summary = run_by(NEWEST, path, [], ends=True)
    assert summary["made_by"] == made((2, OLD), (3, NEW))
    again = run_by(OLD, path, [], ends=True)
    assert again == summary


def test_a_run_that_overwrites_made_all_rows(path):
    run_by(OLD, path, ROWS[:2])
    record = {"settings": SETTINGS} | NEW
    with ResultsFile(str(path), EXAMPLES, record, overwrite=True) as results:
        results.write(ROWS)
        assert results.finish()["made_by"] == made((5, NEW))


@pytest.mark.parametrize("ended", [False, True])
def test_the_rows_of_an_older_summary_are_of_its_versions(path, ended):
    """Which has no made_by."""
    run_by(OLD, path, ROWS[: 5 if ended else 3], ends=ended)
    summary_file = path.with_name("results.jsonl.summary.json")
    old = read_summary(path)
    del old["made_by"]
    summary_file.write_text(json.dumps(old))
    summary = run_by(NEW, path, ROWS[5 if ended else 3 :], ends=True)
    assert summary["made_by"] == (made((5, OLD)) if ended else made((3, OLD), (2, NEW)))


@pytest.mark.parametrize("made_by", [None, {}, [1], [{"rows": "2"}], [{"rows": -1}], [{}]])
def test_a_made_by_that_is_out_of_shape_is_ignored(path, made_by):
    run_by(OLD, path, ROWS[:3])
    edited = read_summary(path) | {"made_by": made_by}
    path.with_name("results.jsonl.summary.json").write_text(json.dumps(edited))
    assert run_by(NEW, path, ROWS[3:], ends=True)["made_by"] == made((3, OLD), (2, NEW))


def test_lines_that_are_gone_were_the_last_ones(path):
    """As after a disk that lost them."""
    run_by(OLD, path, ROWS[:2])
    run_by(NEW, path, ROWS[2:4])
    run_by(NEWEST, path, ROWS[4:], ends=True)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]))
    summary = run_by(NEWEST, path, ROWS[3:4])
    assert summary["made_by"] == made((2, OLD), (1, NEW)) and summary["complete"] is False


def test_a_run_that_continues_the_rows_of_other_versions_warns(path, capfd):
    run_by(OLD, path, ROWS[:2])
    run_by(OLD, path, ROWS[2:3])
    assert capfd.readouterr().err == ""
    run_by(NEW, path, ROWS[3:4])
    assert capfd.readouterr().err == (
        f"warning: {path}: continues rows that other versions made (git commit: a1 there, b2 now; "
        "python: 3.11.7 there, 3.12.1 now; torch: 2.11 there, 2.13 now)\n"
    )
    run_by(NEW, path, ROWS[4:], ends=True)
    assert capfd.readouterr().err.count("\n") == 1
    run_by(NEWEST, path, [], ends=True)  # which continues nothing
    assert capfd.readouterr().err == ""


def test_summary_scores(summary):
    assert summary["complete"] is True
    assert summary["scores"] == {
        "exact_match": 60.0,
        "f1": pytest.approx(100 * (3 + 2 / 3) / 5),
        "is_correct": 20.0,
        "num_questions": 5,
        "has_answer_exact_match": pytest.approx(100 / 3),
        "has_answer_f1": pytest.approx(100 * (1 + 2 / 3) / 3),
        "has_answer_is_correct": 0.0,
        "has_answer_num_questions": 3,
        "no_answer_exact_match": 100.0,
        "no_answer_f1": 100.0,
        "no_answer_is_correct": 50.0,
        "no_answer_num_questions": 2,
    }
    assert summary["intervals_over"] == "2 articles"
    assert summary["articles"] == [["cats", 2], ["dogs", 3]]
    assert summary["abstention"]["precision"] == 100.0


def test_the_summary_records_settings_and_versions(summary, tmp_path):
    assert summary["arguments"] == {
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "data.jsonl"),
        "batch_size": 32,
        "limit": None,
    }
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", summary["git_commit"] or "0" * 40)
    assert summary["packages"]["torch"] == metadata.version("torch")
    assert summary["model_sha256"] is summary["tokenizer_sha256"] is None
    assert summary["data_sha256"] == sha256(str(tmp_path / "data.jsonl"))
    assert summary["model_sha256"] != summary["data_sha256"]
    assert summary["device"] == "cpu" and summary["rows_of_earlier_runs"] == 0
    assert 0 <= summary["wall_seconds"] < 60
    assert 2**24 < summary["peak_memory_bytes"] < 2**40  # in bytes: a Python with torch in it


def test_what_is_not_a_file_has_no_hash():
    assert sha256("rajpurkar/squad:train") is None


def test_printed_summary(summary, capsys):
    print_summary(summary)
    lines = capsys.readouterr().out.splitlines()
    [line] = [line.split() for line in lines if line.startswith("without answer")]
    assert line[:4] == ["without", "answer", "2", "100.0"]
    assert any(line.split() == ["precision", "100.0", "%"] for line in lines)
    assert max(map(len, lines)) <= 80
