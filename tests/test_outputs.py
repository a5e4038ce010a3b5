"""No file of a user is ever lost: what is read, and what this project did not write, stays."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from context_qa.results.rows import Answer, result_row
from squad_utils import Example

ROOT = Path(__file__).parents[1]
EVAL, N_SHOT, REPORT = "eval_mamba_with_context", "eval_n_shot_mamba", "report_results"
PREPARE, RECALL, NEGATIVES = "data.prepare_squad", "data.make_recall", "data.make_negatives"
MODEL = ROOT / "models/demo"
ROWS = [
    {"context": "Bo is a cat.", "prompt": "Who is Bo?", "response": "a cat"},
    {"context": "Ann is a dog.", "prompt": "Who is Ann?", "response": "a dog"},
]
RESULT = result_row(
    0, Example("q", "Bo is a cat.", "Bo?", ("cat",)), Answer("x", 0.5, 0.1, 1, 9, 2)
)
SUMMARY = {"settings": {"model": "another"}, "articles": [[None, 1]], "num_questions": 1}
FOREIGN = {
    "text": "my notes\n",
    "empty object": "{}",
    "JSON": '{"settings": {"colour": "red"}}',
    "page": "<!doctype html>\n<p>mine</p>\n",
    "data": "".join(json.dumps(row) + "\n" for row in ROWS),
    "results and a note": json.dumps(RESULT) + "\nmy note",
    "results and a line": json.dumps(RESULT) + "\nmy note\n",
    "a column more": json.dumps(RESULT | {"checked by": "me"}) + "\n",
    "an older layout": json.dumps({"question": "q", "answer": "a", "guess": "g"}) + "\n",
    "what only begins as a row": '{"idx": 1, "text": "my only copy"}',
    "a torn line of something else": '{"idx": 1, "id": "a", "note": "mine',
    "a row's first columns": json.dumps(dict(list(RESULT.items())[:4])),
    "and a note": json.dumps(dict(list(RESULT.items())[:4])) + " my note",
    "bytes": b"\x00\x01\xff" * 99,
    "training record": '{"settings": {}, "arguments": {}, "complete": true}',
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory: data.jsonl, r.jsonl with its summary, and a folder `model`."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text(FOREIGN["data"])
    (tmp_path / "other.jsonl").write_text(FOREIGN["data"].replace("is a", "has no"))
    write_results(tmp_path / "r.jsonl")
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path


def write_results(path: Path) -> None:
    path.write_text(json.dumps(RESULT) + "\n")
    path.with_name(f"{path.name}.summary.json").write_text(json.dumps(SUMMARY))


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(folder, monkeypatch):
    """A script's complaint, without and, where it has the flag, with --overwrite: nothing is
    lost."""

    def refused(script: str, *arguments: object, flag: bool = True) -> str:
        module = importlib.import_module(script)
        before = contents(folder)
        for more in ([], ["--overwrite"]) if flag else ([],):
            monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), *more])
            with pytest.raises(UserError) as caught:
                module.main(module.parse_args())
            assert contents(folder) == before
            assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused


# Inputs


@pytest.mark.parametrize("script", [EVAL, N_SHOT])
@pytest.mark.parametrize(
    ("data", "output"),
    [
        ("x.jsonl.summary.json", "x.jsonl"),
        ("data.jsonl", "data.jsonl"),
        ("data.jsonl", "./model/../data.jsonl"),
        ("r.jsonl", "r.jsonl"),  # which is data too
        ("data.jsonl", "link.jsonl"),
        ("data.jsonl", "hard.jsonl"),
        ("data.jsonl", "linked.jsonl"),
    ],
)
def test_data_is_kept(refused, folder, script, data, output):
    put(folder / "x.jsonl.summary.json", FOREIGN["data"])
    (folder / "link.jsonl").symlink_to("data.jsonl")
    (folder / "hard.jsonl").hardlink_to("data.jsonl")
    (folder / "linked.jsonl.summary.json").symlink_to("data.jsonl")
    assert "data.jsonl: is also an input and would be overwritten" in refused(
        script, MODEL, data, output
    ).replace(data, "data.jsonl")


@pytest.mark.parametrize(
    "derived", ["", ".summary.json", ".tuning.jsonl", ".tuning.jsonl.summary.json"]
)
def test_the_data_that_a_threshold_is_tuned_on_is_kept(refused, folder, derived):
    put(folder / f"x.jsonl{derived}", FOREIGN["data"])
    said = refused(EVAL, MODEL, "other.jsonl", "x.jsonl", "--tune_on", f"x.jsonl{derived}")
    assert f"x.jsonl{derived}: is also an input and would be overwritten" in said


def test_a_config_or_a_tokenizer_that_is_read_is_kept(refused, folder):
    shutil.copy(MODEL / "config.json", "x.jsonl.summary.json")
    said = refused(EVAL, "x.jsonl.summary.json", "data.jsonl", "x.jsonl")
    assert "x.jsonl.summary.json: is also an input" in said
    shutil.copy(MODEL / "tokenizer.json", "x.jsonl")
    assert "x.jsonl: is also an input" in refused(
        EVAL, MODEL, "data.jsonl", "x.jsonl", "--tokenizer", "x.jsonl"
    )


def test_outputs_of_one_command_do_not_coincide(refused, folder):
    (folder / "x.jsonl.summary.json").symlink_to("x.jsonl")
    assert "is the same file as" in refused(EVAL, MODEL, "data.jsonl", "x.jsonl")
    (folder / "y.jsonl.tuning.jsonl").symlink_to("y.jsonl")
    said = refused(EVAL, MODEL, "data.jsonl", "y.jsonl", "--tune_on", "other.jsonl")
    assert "y.jsonl: is the same file as y.jsonl.tuning.jsonl" in said


# Other files


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize(
    "derived", ["", ".summary.json", ".tuning.jsonl", ".tuning.jsonl.summary.json"]
)
def test_what_is_not_ours_is_not_replaced_by_an_evaluation(refused, folder, content, derived):
    put(folder / f"x.jsonl{derived}", content)
    said = refused(EVAL, MODEL, "data.jsonl", "x.jsonl", "--tune_on", "other.jsonl")
    assert said.startswith(f"x.jsonl{derived}: contains something other than ")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"]
)
def test_a_models_files_are_not_replaced(refused, folder, name):
    for model in ("model", MODEL):
        said = refused(EVAL, model, "data.jsonl", f"model/{name}")
        assert f"model/{name}: contains something other than results" in said
    assert "something other" in refused(REPORT, "r.jsonl", "--output", f"model/{name}")


def test_data_and_output_swapped(refused):
    assert "data.jsonl: contains something other than results" in refused(
        EVAL, MODEL, "r.jsonl", "data.jsonl"
    )


def test_a_summary_without_its_results_is_replaced_by_overwriting_alone(folder, monkeypatch):
    from context_qa.results.results_file import ResultsFile

    Path("r.jsonl").unlink()
    before = contents(folder)
    with pytest.raises(
        UserError, match=r"no results, and r\.jsonl\.summary\.json is of an.*set ov"
    ):
        ResultsFile("r.jsonl", [], {"settings": {}})
    assert contents(folder) == before
    ResultsFile("r.jsonl", [], {"settings": {}}, overwrite=True).__exit__()
    assert contents(folder) == before


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("output", ["page.html", "a.py", "r.html"])
def test_a_page_replaces_pages_alone(refused, folder, content, output):
    put(folder / output, content)
    arguments = [] if output == "r.html" else ["--output", output]
    said = refused(REPORT, "r.jsonl", *arguments)
    assert said.startswith(f"{output}: contains something other than a page of results")


@pytest.mark.parametrize("output", ["data.jsonl", "other.jsonl", "r.jsonl.summary.json", "r.jsonl"])
def test_a_page_replaces_no_data_and_no_results(refused, output):
    refused(REPORT, "r.jsonl", "--output", output)


def test_results_called_html_are_no_page(refused, folder):
    shutil.copy("r.jsonl", "x.html")
    assert "x.html: is also an input and would be overwritten" in refused(REPORT, "x.html")


def test_another_page_is_replaced_by_overwriting_alone(folder, monkeypatch):
    import report_results

    def report(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["report_results", "r.jsonl", *map(str, arguments)])
        report_results.main(report_results.parse_args())

    report()
    first = Path("r.html").read_bytes()
    report()  # which changes nothing
    Path("r.jsonl").write_text(json.dumps(RESULT | {"guess": "another"}) + "\n")
    with pytest.raises(UserError, match=r"r\.html: contains a page of results; .* overwrite"):
        report()
    assert Path("r.html").read_bytes() == first
    report("--overwrite")
    assert Path("r.html").read_bytes() != first


@pytest.mark.parametrize(
    ("script", "source"), [(PREPARE, "data.jsonl"), (RECALL, "text.txt"), (NEGATIVES, "data.jsonl")]
)
@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_prepared_data_replaces_nothing(refused, folder, script, source, content):
    words = "Bo met Ann in Oslo. " + "They walked on and on by the sea. " * 6 + "Then Bo left Ann. "
    put(folder / "text.txt", words + "So Bo and Ann met in Oslo again.")
    put(folder / "out", content)
    said = refused(script, source, "out", flag=False)
    assert said.startswith("out: exists and is not overwritten; remove it or give another path")
    assert f"{source}: is also an input" in refused(script, source, source, flag=False)


def test_lists_and_contexts_that_are_read_are_kept(refused, folder):
    put(folder / "ids.txt", "q\n")
    assert "is also an input" in refused(
        PREPARE, "data.jsonl", "ids.txt", "--ids", "ids.txt", flag=False
    )
    arguments = ("data.jsonl", "other.jsonl", "--contexts", "other.jsonl")
    assert "is also an input" in refused(NEGATIVES, *arguments, flag=False)


@pytest.mark.parametrize(
    ("benchmark", "flag"),
    [("bench_model", "--json"), ("bench_growth", "--json"), ("bench_growth", "--plot")],
)
@pytest.mark.parametrize("name", ["data.jsonl", "r.jsonl", "model/config.json"])
def test_benchmarks_replace_nothing(refused, benchmark, flag, name):
    said = refused(f"benchmarks.{benchmark}", "--quick", flag, name, flag=False)
    assert said.startswith(f"{name}: exists and is not overwritten")


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_the_learning_benchmark_adds_to_its_own_rows_alone(refused, folder, content):
    put(folder / "rows.jsonl", content)
    said = refused(
        "studies.shared_contexts.learning", "data.jsonl", "other.jsonl", "rows.jsonl", flag=False
    )
    assert said.startswith("rows.jsonl: contains something other than rows of this benchmark")
    assert "is also an input" in refused(
        "studies.shared_contexts.learning", "data.jsonl", "other.jsonl", "other.jsonl", flag=False
    )


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_demo_data_replaces_nothing(folder, content):
    from studies.demo_model import make_demo

    put(folder / "train.jsonl", content)
    with pytest.raises(UserError, match=r"train\.jsonl: exists and is not overwritten"):
        make_demo.write_rows(folder / "train.jsonl", [[ROWS[0]]])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_demo_tokenizer_replaces_nothing(folder, name):
    from studies.demo_model import make_demo

    (folder / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name}: exists and is not overwritten"):
        make_demo.write_tokenizer(folder)
    assert (folder / name).read_text() == "{}"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "notes.txt"]
)
def test_new_models_and_tokenizers_are_written_into_new_folders(refused, folder, name):
    put(folder / "mine" / name, "mine")
    put(folder / "text.txt", "= A =\nBo met Ann.\n")
    said = refused("studies.base_model.train_tokenizer", "text.txt", "--output", "mine", flag=False)
    assert said.startswith(f"mine: contains other files ({name})")
    export = "studies.base_model.export_bfloat16"
    assert refused(export, MODEL, "mine", flag=False) == said


@pytest.mark.parametrize("name", ["log.jsonl", "model.safetensors", "notes.txt"])
def test_a_base_models_run_begins_in_a_new_folder(refused, folder, name):
    from studies.base_model import pack

    pack.pack(["Bo met Ann. " * 99] * 9, str(MODEL), "tokens", processes=1)
    put(folder / "mine" / name, json.dumps(ROWS[0]) + "\n")
    said = refused(
        "studies.base_model.train_base_model", "--config", MODEL, "--tokens", "tokens",
        "--output", "mine", "--max_steps", 1, "--held_out", 200, "--device", "cpu", flag=False,
    )  # fmt: skip
    assert "mine: contains other files" in said or "log.jsonl: contains something other" in said


@pytest.mark.parametrize("ending", [".bin", ".json", ".bin.partial"])
def test_a_token_file_replaces_nothing(refused, folder, ending):
    put(folder / f"out{ending}", "mine")
    put(folder / "text.txt", "= A =\nBo met Ann.\n")
    arguments = ("text.txt", "--tokenizer", MODEL, "--output", "out")
    said = refused("studies.base_model.pack", *arguments, flag=False)
    assert said.startswith(f"out{ending}: exists and is not overwritten")


def test_a_file_that_comes_during_a_benchmark_is_kept(folder):
    from benchmarks import bench_growth, timing

    put(folder / "out", "mine")
    with pytest.raises(UserError, match="out: exists and is not overwritten"):
        timing.report("title", [{"name": "a"}], "out")
    plt = pytest.importorskip("matplotlib.pyplot")
    ways = [*bench_growth.BY_QUESTIONS, *bench_growth.BY_LENGTH]
    seconds = {bench_growth.name(s, way): 1.0 for s in ways for way in bench_growth.WAYS}
    with pytest.raises(UserError, match="out: exists and is not overwritten"):
        bench_growth.draw(plt, seconds, bench_growth.BY_LENGTH, "out")
    assert Path("out").read_text() == "mine"


def test_links_to_nothing_and_empty_files_are_free(folder):
    from common.output_files import write_output

    Path("empty").touch()
    Path("link").symlink_to("target")
    for name in ("empty", "link", "new/deep/file"):
        write_output(name, "text")
        assert Path(name).read_text() == "text"
    assert Path("link").is_symlink()


def test_a_file_that_comes_while_another_is_written_is_kept(folder, monkeypatch):
    from common import atomic_files
    from common.output_files import write_output

    write_at = atomic_files.write_at

    def meanwhile(*arguments):
        write_at(*arguments)
        put(folder / "out", "mine")

    monkeypatch.setattr(atomic_files, "write_at", meanwhile)
    with pytest.raises(UserError, match="out: exists and is not overwritten"):
        write_output("out", "text")
    assert Path("out").read_text() == "mine"
    assert not list(folder.glob("*.partial"))


def test_a_file_called_as_a_partial_one_is_kept(folder):
    from common.output_files import write_output

    partial = folder / f"out.{os.getpid()}.partial"
    partial.write_text("mine")
    write_output("out", "text")
    assert partial.read_text() == "mine" and Path("out").read_text() == "text"


def test_a_folder_called_as_a_partial_one_is_kept(folder):
    from common.atomic_files import atomic_folder

    partial = folder / f".new.partial-{os.getpid()}"
    put(partial / "file", "mine")
    with pytest.raises(UserError), atomic_folder(folder / "new"):
        pass
    assert (partial / "file").read_text() == "mine"
