"""Rules of the code base: imports, packages, scripts, and where script flags may appear."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"squad_utils"}  # at the root, but not a script
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in MODULES)
FOLDERS = ("common", "mamba_lm", "context_qa", "data", "benchmarks", "studies")
SHARED = {"common", "squad_utils", "mamba_lm", "context_qa"}

# What each part may import besides itself. Each study, studies.<name>, is a part.
ALLOWED = {
    "common": set(),
    "squad_utils": {"common"},
    "mamba_lm": {"common"},
    "context_qa": {"common", "squad_utils", "mamba_lm"},
    "data": SHARED,
    "benchmarks": SHARED,
    "studies.numpy_mamba": set(),
}
NUMPY_STUDY = {"numpy", "pandas"}

# Files that break a rule today. A file that no longer does is removed here, and none is added.
NAMESPACE_BELOW_SCRIPTS: set[str] = {
    "context_qa/arguments.py",
    "studies/base_model/train_base_model.py",
}
FLAG_BELOW_SCRIPTS: set[str] = set()


def sources() -> list[Path]:
    paths = [*ROOT.glob("*.py"), *(path for f in FOLDERS for path in (ROOT / f).rglob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in paths)


def part_of(module: str) -> str:
    """The part of the code base that a dotted name belongs to."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "studies" else names[0]


def imports(source: str, path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    package = path.parent.parts
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # In `from studies import x`, the imported name is a module.
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def forbidden_imports(source: str, path: Path) -> set[str]:
    """Imports of other parts of this code base that the file's part may not import."""
    own = part_of(".".join(path.with_suffix("").parts))
    allowed = {own} | ALLOWED.get(own, SHARED)
    code_base = {*FOLDERS, *MODULES, *SCRIPTS, "tests"}
    local = {name for name in imports(source, path) if name.split(".")[0] in code_base}
    return {name for name in local if part_of(name) not in allowed}


def touches_sys_path(source: str) -> bool:
    named = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            named.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom):
            named |= {f"{node.module}.{alias.name}" for alias in node.names}
    return bool(named & {"sys.path", "site.addsitedir"})


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_downwards_only(path):
    assert not forbidden_imports((ROOT / path).read_text(), path)


@pytest.mark.parametrize("path", sources(), ids=str)
def test_no_sys_path_edits(path):
    assert not touches_sys_path((ROOT / path).read_text())


@pytest.mark.parametrize(
    "path, source",
    [
        ("common/errors.py", "import squad_utils"),
        ("squad_utils.py", "from mamba_lm.models.mamba import MambaLM"),
        ("squad_utils.py", "def f():\n    import context_qa.results.rows"),
        ("mamba_lm/models/mamba.py", "from squad_utils import Example"),
        ("mamba_lm/selective_scan/cpu/__init__.py", "import context_qa"),
        ("context_qa/batches.py", "import train_mamba_with_context"),
        ("context_qa/batches.py", "from studies.lora_finetuning import train"),
        ("context_qa/batches.py", "from studies.demo_model.make_demo import make_passage"),
        ("prompt_mamba.py", "import eval_n_shot_mamba"),
        ("prompt_mamba.py", "from studies.lora_finetuning import train"),
        ("studies/lora_finetuning/train.py", "from studies.delta_filtering.probe import Probe"),
        ("studies/lora_finetuning/train.py", "from ..delta_filtering import probe"),
        ("studies/lora_finetuning/train.py", "from studies import delta_filtering"),
        ("studies/numpy_mamba/generate.py", "from mamba_lm.models.mamba import MambaLM"),
        ("benchmarks/scan.py", "import studies.lora_finetuning.train"),
        ("benchmarks/scan.py", "from tests.mamba_lm import conftest"),
    ],
)
def test_the_import_rule_refuses(path, source):
    assert forbidden_imports(source, Path(path))


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "mamba_lm/models/mamba.py",
            "import torch\nfrom mamba_lm.selective_scan import selective_scan",
        ),
        (
            "mamba_lm/selective_scan/cpu/__init__.py",
            "from . import reference\nfrom common.errors import UserError",
        ),
        (
            "context_qa/batches.py",
            "from squad_utils import Example\nimport mamba_lm.training.trainer",
        ),
        ("studies/lora_finetuning/train.py", "from studies.lora_finetuning import news"),
        ("studies/lora_finetuning/train.py", "from .news import x\nfrom context_qa import results"),
        ("prompt_mamba.py", "import data_tools\nfrom datasets import load_dataset"),
    ],
)
def test_the_import_rule_allows(path, source):
    assert not forbidden_imports(source, Path(path))


@pytest.mark.parametrize(
    "source",
    ["import sys\nsys.path.insert(0, '..')", "from sys import path", "site.addsitedir('x')"],
)
def test_sys_path_edits_are_caught(source):
    assert touches_sys_path(source)
    assert not touches_sys_path("import os, sys\nos.path.join('a')\nsys.exit()")


def test_the_numpy_study_imports_numpy_pandas_and_the_standard_library_only():
    folder = Path("studies/numpy_mamba")
    if not (ROOT / folder).exists():
        pytest.skip(f"{folder} does not exist yet")
    for path in (ROOT / folder).rglob("*.py"):
        names = imports(path.read_text(), path.relative_to(ROOT))
        others = {name.split(".")[0] for name in names if part_of(name) != "studies.numpy_mamba"}
        assert others <= NUMPY_STUDY | sys.stdlib_module_names, path


@pytest.mark.parametrize("folder", sorted({path.parent for path in sources()} - {Path()}), ids=str)
def test_every_package_has_an_init_file(folder):
    packages = [folder, *folder.parents][:-1]
    assert not [
        str(package) for package in packages if not (ROOT / package / "__init__.py").exists()
    ]


# Arguments and flags of scripts

ENTRY_POINTS = ("parse_args", "main")


def names_namespace(source: str) -> bool:
    """Whether a module names argparse.Namespace anywhere but in parse_args and main."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in ENTRY_POINTS]
    return any(
        (isinstance(node, ast.Attribute) and node.attr == "Namespace")
        or (isinstance(node, ast.Name) and node.id == "Namespace")
        for node in ast.walk(tree)
    )


def names_flag(source: str) -> bool:
    """Whether a string of a module, a docstring too, names a script's flag."""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return any(isinstance(text, str) and re.search(r"--[a-z_]+", text) for text in strings)


def test_namespaces_end_at_the_scripts():
    """Modules take named settings. Studies, data tools and benchmarks are scripts and may have
    functions of their arguments; in them only `parse_args` and `main` name the class."""
    below = [path for path in sources() if path.parent != Path()]
    found = {str(path) for path in below if names_namespace((ROOT / path).read_text())}
    assert found == NAMESPACE_BELOW_SCRIPTS


def test_modules_below_the_scripts_name_no_flag():
    """Their errors name the setting. Exempt: the parser, `__main__` modules, git's flags."""
    exempt = {"common/command_line.py", "common/provenance.py"}
    below = [path for path in sources() if path.parts[0] in ("common", "mamba_lm")]
    below = [path for path in below if str(path) not in exempt and path.name != "__main__.py"]
    found = {str(path) for path in below if names_flag((ROOT / path).read_text())}
    assert found == FLAG_BELOW_SCRIPTS


@pytest.mark.parametrize(
    "source, is_named",
    [
        ("import argparse\ndef f(args: argparse.Namespace): pass", True),
        ("from argparse import Namespace\nx = Namespace(a=1)", True),
        ("class A:\n    def main(self, args: argparse.Namespace): pass", True),
        ("def parse_args() -> argparse.Namespace: pass", False),
        ("def main(args: argparse.Namespace) -> None: pass", False),
    ],
)
def test_the_namespace_rule(source, is_named):
    assert names_namespace(source) == is_named


@pytest.mark.parametrize(
    "source, is_named",
    [
        ("raise UserError('give --tokenizer')", True),
        ("raise UserError(f'{model}: give --max_steps {n}')", True),
        ("def f():\n    'Sets --seed.'", True),
        ("x = 'a -- b', 1--a, '---'", False),
    ],
)
def test_the_flag_rule(source, is_named):
    assert names_flag(source) == is_named


# Scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_common_form(script):
    """A docstring with the exact command, parse_args, main(args), and a guard that runs them."""
    source = (ROOT / f"{script}.py").read_text()
    tree = ast.parse(source)
    assert f"python {script}.py" in (ast.get_docstring(tree) or "")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    arguments = {f.name: [argument.arg for argument in f.args.args] for f in functions}
    assert arguments["parse_args"] == []
    assert arguments["main"] == ["args"]
    guard = tree.body[-1]
    assert isinstance(guard, ast.If) and ast.unparse(guard.test) == "__name__ == '__main__'"
    assert [ast.unparse(line) for line in guard.body] == ["run_script(main, parse_args)"]


@pytest.mark.parametrize(
    "name, limit", [*((f"{script}.py", 160) for script in SCRIPTS), ("squad_utils.py", 300)]
)
def test_files_stay_short(name, limit):
    assert len((ROOT / name).read_text().splitlines()) <= limit


def test_the_fixed_scripts_exist():
    """Users type these names."""
    assert {
        "prompt_mamba",
        "eval_n_shot_mamba",
        "train_mamba_with_context",
        "prompt_mamba_with_context",
        "eval_mamba_with_context",
    } <= set(SCRIPTS)
