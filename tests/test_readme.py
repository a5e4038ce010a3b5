"""The documentation is true: its commands parse, its Python runs, its links lead somewhere."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "*/*.md", "studies/*/*.md")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith(".")
)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def shown_commands() -> list[str]:
    """Every `python SCRIPT ...` of a fenced block or of inline code, continuation lines joined."""
    commands = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        lines = [
            line
            for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
            for line in block.replace("\\\n", " ").splitlines()
        ]
        lines += [code for code in re.findall(r"`(python [^`]+)`", text) if " ... " not in code]
        for line in lines:
            command = line.split("   #")[0].split(" > ")[0].split("| ")[-1].strip()
            command = re.sub(r"^(\.venv/bin/|uv run )", "", command)
            command = re.sub(r"^torchrun --nproc_per_node \w+ ", "python ", command)
            if re.match(
                r"python (-m (data|benchmarks|context_qa|studies\.(base|demo|shared))|\w+\.py)\S*",
                command,
            ):
                commands.append(command)
    return list(dict.fromkeys(commands))


@pytest.mark.parametrize("command", shown_commands())
def test_a_shown_command_parses(command, monkeypatch):
    """What takes long, real data, the network or a GPU is not run, but its arguments are parsed."""
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


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_shown_python_runs(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})
    if page == "README.md":
        answers = capsys.readouterr().out.splitlines()
        assert answers[0].startswith("Marco Quill 0.") and answers[1].startswith("I don't know. ")


def test_shown_rows_are_read(tmp_path):
    """The rows of the README are data that training reads."""
    from squad_utils import read_examples

    [rows] = blocks("README.md", "json")
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    examples = read_examples(str(tmp_path / "rows.jsonl"))
    assert [example.answers for example in examples] == [("Ann",), ()]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in found)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent.joinpath(path) if path else ROOT / page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_shown_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", text, flags=re.MULTILINE)):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", makefile, flags=re.MULTILINE), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
