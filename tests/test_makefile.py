"""`make setup` leaves an environment alone that has all that is required."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$0 $*" >> {log}
case "$*" in
    *--dry-run*) exit {missing} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Run make in a clone of its own, with an environment of which packages are missing or not;
    its exit status, and what was run by the environment's Python and pip."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    clone = tmp_path / "clone"
    clone.mkdir()
    for path in (ROOT / "Makefile", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, clone)

    def make(goal: str, venv: str, missing: int, is_given: bool) -> tuple[int, list[str]]:
        log = tmp_path / "log"
        text = PYTHON.format(log=log, missing=missing)
        for path in (clone / venv / "bin/python", clone / venv / "bin/pip", clone / "python"):
            if path.parent.exists() or missing < 2:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                path.chmod(0o755)
        given = [f"VENV={venv}"] if is_given else []
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = ["make", goal, f"PYTHON={clone}/python", *given]
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
        if done.returncode:
            assert f"make setup VENV={venv} installs it there" in done.stdout
        return done.returncode, log.read_text().splitlines() if log.exists() else []

    return make


@pytest.mark.parametrize("goal", ["setup", "test"])
@pytest.mark.parametrize("is_given", [False, True])
def test_what_is_there_is_not_installed_again(make, goal, is_given):
    venv = "../other" if is_given else ".venv"
    code, calls = make(goal, venv, missing=0, is_given=is_given)
    assert code == 0
    changing = [call for call in calls if " install " in call and "--dry-run" not in call]
    assert changing == [] and not any("-m venv" in call for call in calls)
    assert any("-m pytest" in call for call in calls) == (goal == "test")


def test_an_environment_of_the_clones_own_is_completed(make):
    code, calls = make("test", ".venv", missing=1, is_given=False)
    assert code == 0 and any("pip install --quiet -r" in call for call in calls)


def test_an_environment_that_is_given_is_completed_if_that_is_asked_for_alone(make):
    code, calls = make("test", "../other", missing=1, is_given=True)
    assert code != 0 and not any("pip install --quiet -r" in call for call in calls)
    code, calls = make("setup", "../other", missing=1, is_given=True)
    assert code == 0 and any("pip install --quiet -r" in call for call in calls)


@pytest.mark.parametrize("is_given", [False, True])
def test_an_environment_that_is_not_there_is_made(make, is_given):
    code, calls = make("setup", "../new" if is_given else ".venv", missing=2, is_given=is_given)
    assert code == 0
    assert any("-m venv" in call for call in calls)
    assert any("pip install --quiet -r" in call for call in calls)
