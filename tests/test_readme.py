"""The commands that the documentation shows are commands that the scripts take."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "data/README.md", "docs/LOG.md", "benchmarks/README.md"]


def shown_commands() -> list[str]:
    """Every `python SCRIPT ...` line of a fenced block, continuation lines joined."""
    commands = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.split("   #")[0].split(" > ")[0].split("| ")[-1].strip()
                if re.match(r"python (-m (data|benchmarks|context_qa)\.|\w+\.py)", command):
                    commands.append(command)
    return commands


@pytest.mark.parametrize("command", shown_commands())
def test_a_shown_command_parses(command, monkeypatch):
    words = shlex.split(command)[1:]
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    arguments = words[2:] if words[0] == "-m" else words[1:]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    assert importlib.import_module(module).parse_args() is not None


def test_commands_are_shown():
    shown = " ".join(shown_commands())
    for script in ROOT.glob("*.py"):
        if "def parse_args" in script.read_text(encoding="utf-8"):
            assert script.name in shown


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_make_target_shown_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([\w-]+)", text, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
