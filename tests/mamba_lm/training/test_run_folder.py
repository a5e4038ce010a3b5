"""The folder of a run takes values: it knows neither a script nor what is trained."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from common.output_files import Kind
from mamba_lm.training import run_folder
from mamba_lm.training.run_folder import CARD, RunFolder

OURS = Kind("a card of ours", lambda stream: b"ours" in stream.read())
DESCRIPTION = {"arguments": {"color": "red"}, "git_commit": "abc", "data_sha256": "0" * 64}


def enter(folder: Path, color: str = "red", **changes) -> RunFolder:
    settings = {"color": color, "processes": 1}
    return RunFolder(folder, settings, DESCRIPTION, changes.pop("inputs", []), OURS, **changes)


def record(folder: Path) -> dict:
    return json.loads((folder / "training_args.json").read_text())


@pytest.fixture
def finished(tmp_path, monkeypatch) -> Path:
    """The folder of a complete run, whose model is one file."""
    folder = tmp_path / "run"
    monkeypatch.setattr(run_folder, "files_read", lambda name: ([Path(name) / "model"], []))
    with enter(folder) as run:
        assert not run.is_complete and run.checkpoint is None
        run.warn(["odd data"])
        run.begin()
        assert record(folder)["complete"] is False
        for name in ("model", "training_log.jsonl", "training_log.png"):
            (folder / name).write_text(name)
        run.finish("ours: a card", steps=7, scores={"f1": 50.0})
    return folder


def test_the_record_has_what_was_given(finished):
    found = record(finished)
    assert list(found)[:4] == ["settings", "arguments", "git_commit", "data_sha256"]
    assert found["settings"] == {"color": "red", "processes": 1}
    assert found["warnings"] == ["odd data"] and found["complete"] is True
    assert (found["steps"], found["scores"]) == (7, {"f1": 50.0})
    assert list(found["files"]) == ["model"]
    assert (finished / CARD).read_text() == "ours: a card"


def test_a_complete_run_is_recognized(finished):
    with enter(finished) as run:
        assert run.is_complete


def test_another_run_is_refused_and_the_way_to_restart_is_named(finished):
    message = "contains another run (color: red there, blue now); give another folder or "
    with pytest.raises(UserError) as caught, enter(finished, "blue"):
        pass
    assert str(caught.value) == f"{finished}: {message}set overwrite"


def test_a_restart_removes_the_files_of_the_run_alone(finished):
    (finished / "mine.txt").write_text("mine")
    with enter(finished, "blue", overwrite=True) as run:
        assert not run.is_complete
        run.begin()
    assert {path.name for path in finished.iterdir()} == {"mine.txt", "model", "training_args.json"}
    assert record(finished)["settings"]["color"] == "blue"


def test_an_input_in_the_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.data").write_text("x")
    inputs = [None, "a/hub-name", str(tmp_path / "run/.data")]
    with (
        pytest.raises(UserError, match="would be overwritten"),
        enter(tmp_path / "run", inputs=inputs),
    ):
        pass


def test_a_card_of_the_users_own_is_kept(finished):
    (finished / CARD).write_text("mine")
    with (
        pytest.raises(UserError, match="something other than a card of ours"),
        enter(finished, overwrite=True),
    ):
        pass
    assert (finished / CARD).read_text() == "mine"


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with enter(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
