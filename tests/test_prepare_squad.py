"""data/prepare_squad.py: the Oxen layout, written whole, from whatever read_examples reads."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from data import prepare_squad
from squad_utils import NO_ANSWER, read_examples

ROOT = Path(__file__).parents[1]
SQUAD = ROOT.parent / "shared/data/squad"

ROWS = [
    {"id": "q1", "context": "Bo is a cat.", "question": "Bo?", "answers": ["a cat", "cat"]},
    {"id": "q2", "context": "Bo is a cat.", "question": "Ann?", "answers": []},
    {
        "id": "q3",
        "context": "Caf\u00e9\u2028\u201431\u201310",
        "question": "Où?",
        "answers": ['"x"'],
    },
]
LINES = [
    '{"context":"Bo is a cat.","prompt":"Bo?","response":"a cat"}\n',
    '{"context":"Bo is a cat.","prompt":"Ann?","response":"I don\'t know."}\n',
    '{"context":"Caf\u00e9\u2028\u201431\u201310","prompt":"Où?","response":"\\"x\\""}\n',
]


@pytest.fixture
def source(tmp_path) -> str:
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


def prepare(source: str, output: Path, ids: str | None = None, limit: int | None = None) -> None:
    prepare_squad.main(argparse.Namespace(source=source, output=str(output), ids=ids, limit=limit))


def test_output_and_counts(source, tmp_path, capsys):
    output = tmp_path / "new/folder/out.jsonl"
    prepare(source, output)
    assert output.read_bytes() == "".join(LINES).encode()
    assert capsys.readouterr().out == (
        f"{output}: 3 rows\ncontexts: 2 (1.50 questions each)\nanswerable: 2, unanswerable: 1\n"
    )
    assert [example.target for example in read_examples(str(output))] == ["a cat", NO_ANSWER, '"x"']
    assert os.listdir(output.parent) == ["out.jsonl"]


def test_ids_select_and_order_and_limit_cuts(source, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("q3\nq1\n")
    output = tmp_path / "out.jsonl"
    prepare(source, output, ids=str(ids))
    assert output.read_bytes() == (LINES[2] + LINES[0]).encode()
    output.unlink()
    prepare(source, output, ids=str(ids), limit=1)
    assert output.read_bytes() == LINES[2].encode()
    output.unlink()
    prepare(source, output, limit=2)
    assert output.read_bytes() == (LINES[0] + LINES[1]).encode()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"q1\nq9\n", "ids.txt line 2: no question 'q9' in "),
        (b"", "ids.txt: no id in it"),
        (b"q\xe9\n", "ids.txt line 1: not UTF-8"),
        (None, "ids.txt: cannot be read"),
    ],
)
def test_bad_ids(source, tmp_path, content, complaint):
    ids = tmp_path / "ids.txt"
    if content is not None:
        ids.write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(source, tmp_path / "out.jsonl", ids=str(ids))
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_failed_write_leaves_nothing(source, tmp_path, monkeypatch):
    output = tmp_path / "out" / "out.jsonl"

    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(source, output)
    assert os.listdir(output.parent) == []


def test_a_file_that_is_there_is_kept(source, tmp_path):
    """It may be Oxen's, or a user's own in the same layout. A rerun changes nothing."""
    output = tmp_path / "out.jsonl"
    prepare(source, output)
    prepare(source, output)
    for content in (LINES[0], "notes", "import this\n"):
        output.write_text(content, "utf-8")
        with pytest.raises(UserError, match=r"out\.jsonl: exists and is not overwritten; rem"):
            prepare(source, output)
        assert output.read_text("utf-8") == content


@pytest.mark.parametrize("output", [".", "source.jsonl/out.jsonl", "a" * 300])
def test_output_that_cannot_be_a_file(source, tmp_path, output):
    with pytest.raises(UserError, match="cannot be written"):
        prepare(source, tmp_path / output)


def test_the_source_is_kept(source, tmp_path):
    before = Path(source).read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for output in (Path(source), link):
        with pytest.raises(UserError, match="is also an input and would be overwritten"):
            prepare(source, output, limit=1)
    assert Path(source).read_bytes() == before


def test_links_stay_links_and_pipes_pipes(source, tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    link.symlink_to(target)
    prepare(source, link)
    assert link.is_symlink() and target.read_bytes() == "".join(LINES).encode()
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a file"):
        prepare(source, pipe)
    assert pipe.is_fifo()


def test_runs_as_a_module_from_the_root(source, tmp_path):
    def run(*args: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data.prepare_squad", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    output = tmp_path / "out.jsonl"
    assert run(source, str(output), "--limit", "1").returncode == 0
    assert output.read_bytes() == LINES[0].encode()
    failed = run(str(tmp_path / "missing.json"), str(output))
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


@pytest.mark.skipif(not SQUAD.exists(), reason=f"real data not present: {SQUAD}")
def test_committed_ids_remake_oxens_validation_file(tmp_path):
    ids = ROOT / "data/squad_val_1k_ids.txt"
    assert len(set(ids.read_text().split())) == 1000
    output = tmp_path / "squad_val_1k.jsonl"
    prepare(str(SQUAD / "dev-v1.1.json"), output, ids=str(ids))
    assert output.read_bytes() == (SQUAD / "squad_val_1k.jsonl").read_bytes()
