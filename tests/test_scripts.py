"""The root scripts as a user runs them: from training to SQL, and what bad input gets."""

from common.script import run_script

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from context_qa.answering import Answerer
from context_qa.results.rows import Answer, result_row
from context_qa.results.summary import read_summary
from squad_utils import NO_ANSWER, Example

ROOT = Path(__file__).parents[1]
TOKENIZER = "data/demo/tokenizer"
TRAIN, EVAL, N_SHOT = "train_mamba_with_context", "eval_mamba_with_context", "eval_n_shot_mamba"
PROMPT, PROMPT_N_SHOT = "prompt_mamba_with_context", "prompt_mamba"

HOMES = {"Ann": "Oslo", "Ben": "Rome", "Cy": "Bern", "Dee": "Paris"}
CONTEXT = " ".join(f"{name} lives in {town}." for name, town in HOMES.items())
ROWS = [
    {"context": CONTEXT, "prompt": f"Where does {name} live?", "response": town}
    for name, town in [*HOMES.items(), ("Eve", NO_ANSWER)]
]
TINY = {"d_model": 64, "n_layer": 1, "vocab_size": 2156, "ssm_cfg": {"d_state": 4}}
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(script: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, f"{script}.py", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(script: str, *arguments: object, stdin: str = "") -> str:
    """Run a script as a process that must succeed; its standard output."""
    process = start(script, *arguments)
    out, err = process.communicate(stdin, timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """A tiny model that knows five answers by heart, its data and what its training printed."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "tiny.json"
    config.write_text(json.dumps(TINY))
    data = write_rows(folder / "data.jsonl", ROWS)
    model = folder / "new" / "model"
    out = run(
        TRAIN,
        *("--model", config, "--tokenizer", TOKENIZER, "--data_path", data, "--output", model),
        *("--num_epochs", 120, "--learning_rate", 1e-2, "--negatives", "none", "--batch_size", 8),
    )
    return SimpleNamespace(folder=folder, data=data, model=model, out=out)


def test_train_writes_a_model_with_its_arguments(trained):
    assert "data: 5 questions, 4 of them answerable, on 1 contexts\n" in trained.out
    assert "an epoch: 5 examples, 0 of them negatives; " in trained.out
    assert trained.out.rstrip().endswith(f"model written to {trained.model}")
    record = json.loads((trained.model / "training_args.json").read_text())
    assert record["arguments"]["learning_rate"] == 0.01
    names = {path.name for path in trained.model.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "training_args.json", "training_log.jsonl", "training_log.png"),
        "checkpoint-120",
    }


def test_evaluation_finds_what_training_taught_and_sql_and_prompt_agree(trained, tmp_path):
    results = tmp_path / "new" / "folder" / "results.jsonl"
    out = run(
        EVAL, trained.model, trained.data, results, "--max_batch_tokens", 2, "--max_new_tokens", 9
    )
    rows = read_rows(results)
    assert [(row["idx"], row["question"], row["answer"]) for row in rows] == [
        (idx, row["prompt"], row["response"]) for idx, row in enumerate(ROWS)
    ]
    assert [row["guess"] for row in rows] == [row["response"] for row in ROWS]
    assert re.search(r"^without answer +1 +100\.0 ", out, re.MULTILINE)
    summary = read_summary(results)
    assert summary["scores"]["exact_match"] == 100.0
    assert summary["arguments"]["max_batch_tokens"] == 2

    sql = "SELECT is_correct, COUNT(*) AS n FROM df GROUP BY is_correct"
    assert run("query_results", results, sql, "--format", "csv") == "is_correct,n\ntrue,5\n"

    context = tmp_path / "context.txt"
    context.write_text(CONTEXT)
    questions = [argument for row in ROWS[3:] for argument in ("--question", row["prompt"])]
    out = run(PROMPT, trained.model, "--context_file", context, *questions, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["answer"] for answer in answers] == ["Paris", NO_ANSWER]
    for answer, row in zip(answers, rows[3:], strict=True):
        assert answer["confidence"] == pytest.approx(row["confidence"], abs=1e-5)


OWNER = "Tell me the name of the owner of the Bright Feather Hotel."
ROOMS = "What number of rooms does the Wild Swan Hotel have?"


def test_questions_are_piped_in_and_json_comes_out():
    """As in `cat questions.txt | python prompt_mamba_with_context.py ... --json | jq .answer`."""
    flags = ("models/demo", "--context_file", "data/demo/passage.txt", "--json", "--explain")
    out = run(PROMPT, *flags, stdin=f"{OWNER}\n\n{ROOMS}\n")
    first, second = map(json.loads, out.splitlines())
    assert (first["answer"], second["answer"]) == ("Marco Quill", NO_ANSWER)
    assert second["time_to_first_token"] < first["time_to_first_token"]
    context = (ROOT / "data/demo/passage.txt").read_text().strip()
    assert [context[start:end] for start, end in first["spans"]] == ["Marco Quill"]
    assert second["spans"] == [] and len(second["delta"]) == 105


def test_a_context_is_piped_in_and_plain_lines_come_out():
    context = (ROOT / "data/demo/passage.txt").read_text()
    asked = ("--question", OWNER, "--question", ROOMS)
    out = run(PROMPT, "models/demo", "--context_file", "-", *asked, stdin=context)
    assert re.fullmatch(
        r"Marco Quill   \(confidence 0\.\d\d, no answer 0\.\d\d\)\n"
        r"I don't know\.   \(confidence 0\.\d\d, an answer 0\.\d\d\)\n",
        out,
    )


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        ("<&-", 0, ""),
        (">&-", 0, ""),
        pytest.param(
            *(">/dev/full", 2, "error: standard output or input: No space left on device\n"),
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here"),
        ),
    ],
)
def test_streams_that_are_closed_or_full(redirection, code, said):
    command = (
        f"{sys.executable} {PROMPT}.py models/demo --context_file data/demo/passage.txt "
        f"--question 'Who?' {redirection}"
    )
    process = subprocess.run(
        ["/bin/sh", "-c", command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert process.returncode == code and "Traceback" not in process.stderr
    assert process.stderr.endswith(said)


def test_n_shot_scripts_ask_without_a_context(trained, tmp_path):
    results = tmp_path / "results.jsonl"
    run(N_SHOT, trained.model, trained.data, results, "--limit", 2, "--max_new_tokens", 3)
    rows = read_rows(results)
    assert [row["question"] for row in rows] == [row["prompt"] for row in ROWS[:2]]
    question = ROWS[1]["prompt"]
    out = run(
        PROMPT_N_SHOT, trained.model, "--json", "--max_new_tokens", 3, stdin=f"\n{question}\n"
    )
    [answer] = [json.loads(line) for line in out.splitlines()]
    assert (answer["question"], answer["answer"]) == (question, rows[1]["guess"])
    assert answer["confidence"] == pytest.approx(rows[1]["confidence"], rel=1e-4)
    assert rows[0]["confidence"] != pytest.approx(rows[1]["confidence"], rel=1e-4)


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")],
)
def test_a_signal_leaves_whole_lines_and_is_told(trained, tmp_path, sent, code, said):
    data = write_rows(tmp_path / "data.jsonl", ROWS * 2000)
    results = tmp_path / "results.jsonl"
    process = start(EVAL, trained.model, data, results, "--max_batch_tokens", 500)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not (results.exists() and results.stat().st_size):
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.endswith(said) and "Traceback" not in err
    content = results.read_text()
    assert content.endswith("\n")
    rows = read_rows(results)
    places = [row["idx"] for row in rows]
    assert len(set(places)) == len(places) and 0 < len(places) < 2000 * len(ROWS)
    assert all(row["question"] == ROWS[row["idx"] % len(ROWS)]["prompt"] for row in rows)


def test_an_error_is_the_only_line_that_a_process_prints(trained, tmp_path):
    process = start(EVAL, "nobody/no-such-model", trained.data, tmp_path / "results.jsonl")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.fixture
def refuse(monkeypatch, capfd, tmp_path):
    """Run a script in this process on input that cannot work; what it says on stderr."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def run_to_failure(script: str, *arguments: object) -> str:
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_script(module.main, module.parse_args)
        out, err = capfd.readouterr()
        assert caught.value.code == 2
        assert out == ""
        return err

    return run_to_failure


@pytest.fixture
def fail(refuse):
    """As `refuse`, where one line must say it all."""

    def run_to_failure(script: str, *arguments: object) -> str:
        err = refuse(script, *arguments)
        lines = [line for line in err.splitlines() if not line.startswith("selective scan: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return run_to_failure


def reading(script: str, model: object, data: object, output: object = "output") -> list[object]:
    """The arguments of a script that reads data and writes an output."""
    if script == TRAIN:
        return ["--model", model, "--data_path", data, "--output", output]
    return [model, data, output]


reads_data = pytest.mark.parametrize("script", [TRAIN, EVAL, N_SHOT])
every_script = pytest.mark.parametrize("script", [TRAIN, EVAL, N_SHOT, PROMPT, PROMPT_N_SHOT])


@reads_data
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "data.jsonl: cannot be read"),
        (b"", "data.jsonl: no question in it"),
        (b"GOOD\nGOOD\n{'context': 1}\nGOOD\n", "data.jsonl line 3: not JSON"),
        (b'GOOD\n{"context": "c", "prompt": "p"}\n', "data.jsonl line 2: 'response' is missing"),
        (b'GOOD\n{"context": ["c"], "prompt": "p"}\n', "data.jsonl line 2: 'context' is ['c']"),
        (b'{"context": "M\xe9xico"}\n', "data.jsonl line 1: not UTF-8"),
    ],
    ids=["missing", "empty", "not JSON", "missing key", "wrong type", "latin-1"],
)
def test_bad_data_is_named_with_its_line(fail, trained, tmp_path, script, content, complaint):
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_bytes(content.replace(b"GOOD", json.dumps(ROWS[0]).encode()))
    assert complaint in fail(script, *reading(script, trained.model, data))
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "context.txt: cannot be read"),
        (b"\n", "context.txt: the context is empty"),
        (b"M\xe9xico", "context.txt line 1: not UTF-8"),
    ],
    ids=["missing", "empty", "latin-1"],
)
def test_a_bad_context_file_is_named(fail, trained, tmp_path, content, complaint):
    context = tmp_path / "context.txt"
    if content is not None:
        context.write_bytes(content)
    assert complaint in fail(PROMPT, trained.model, "--context_file", context)


def test_bad_arguments_of_the_consoles_are_named(fail, trained, tmp_path):
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"question": "Who?"}\n')
    said = fail(PROMPT_N_SHOT, trained.model, "--shots", shots)
    assert "shots.jsonl line 1: 'answer' is missing; a row needs text in question, answer" in said
    assert "shots: is empty" in fail(PROMPT_N_SHOT, trained.model, "--shots", "")
    assert "context_file: is empty" in fail(PROMPT, trained.model, "--context_file", "")
    assert "ask by --question" in fail(PROMPT, trained.model, "--context_file", "-")
    assert "give a temperature above 0" in fail(PROMPT, trained.model, "--top_k", 3)
    context = tmp_path / "context.txt"
    context.write_text("Bo is a cat.")
    assert "--question: is empty" in fail(
        PROMPT, trained.model, "--context_file", context, "--question", ""
    )
    layers = trained.model / "delta_layers.json"
    layers.write_text("[7]")
    try:
        said = fail(PROMPT, trained.model, "--context_file", context, "--explain")
    finally:
        layers.unlink()
    assert said.endswith("delta_layers.json: give a list of layers, each from 0 to 0")


def test_a_model_that_learnt_another_prompt_is_told(refuse, tmp_path):
    record = {"arguments": {"prompt_order": "read_twice"}}
    (tmp_path / "training_args.json").write_text(json.dumps(record))
    warning = "was trained with --prompt_order read_twice; here the context is read first"
    assert warning in refuse(PROMPT, tmp_path)
    assert warning not in refuse(PROMPT_N_SHOT, tmp_path)


@every_script
@pytest.mark.parametrize(
    "model", ["nobody/no-such-model", "models/no/such/folder", "./none", "a" * 300]
)
def test_an_unknown_model_is_named(fail, trained, script, model):
    has_data = script in (TRAIN, EVAL, N_SHOT)
    arguments = reading(script, model, trained.data) if has_data else [model]
    assert fail(script, *arguments).startswith(f"error: {model}: ")


@every_script
def test_a_truncated_model_is_named(fail, trained, tmp_path, script):
    model = tmp_path / "model"
    model.mkdir()
    for path in filter(Path.is_file, trained.model.iterdir()):
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = (
        [model] if script in (PROMPT, PROMPT_N_SHOT) else reading(script, model, trained.data)
    )
    assert f"{weights}: truncated" in fail(script, *arguments)


@reads_data
@pytest.mark.parametrize("output", ["file", "file/below", "file/far/below", "a" * 300])
def test_an_output_that_cannot_be_written_is_named(fail, trained, tmp_path, script, output):
    (tmp_path / "file").write_text("kept")
    complaint = fail(script, *reading(script, trained.model, trained.data, tmp_path / output))
    assert complaint.startswith(f"error: {tmp_path / output}: ")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("script", [EVAL, N_SHOT])
def test_results_outlive_a_run_that_cannot_start(fail, trained, tmp_path, script):
    results = tmp_path / "results.jsonl"
    results.write_text('{"idx": 0}\n')
    arguments = reading(script, trained.model, trained.data, results)
    complaint = fail(script, *arguments)
    assert "results.jsonl line 1: another layout (columns: idx); needed: idx, id, " in complaint
    assert complaint.endswith("; give another path or move the file away")
    results.write_text("notes")
    for more in ([], ["--overwrite"]):
        said = fail(script, *arguments, *more)
        assert "results.jsonl: contains something else than results" in said
    row = result_row(0, Example("q", "c", "q", ()), Answer("x", 0.5, 0.5, 0.5, 1, 1))
    write_rows(results, [row])
    fail(script, *reading(script, "./none", trained.data, results), "--overwrite")
    assert read_rows(results) == [row]


def test_a_trained_model_is_not_overwritten(fail, trained):
    arguments = reading(TRAIN, trained.model, trained.data, trained.model)
    for more in ([], ["--overwrite"]):
        assert f"{trained.model}: is read too and would be lost" in fail(TRAIN, *arguments, *more)
    arguments = reading(TRAIN, ROOT / "models/demo", trained.data, trained.model)
    assert f"{trained.model}: contains another run (model: " in fail(TRAIN, *arguments)


@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        (TRAIN, "--batch_size", 0),
        (TRAIN, "--learning_rate", -1),
        (TRAIN, "--num_epochs", "nan"),
        (TRAIN, "--gradient_accumulation_steps", 0),
        (TRAIN, "--seed", -1),
        (TRAIN, "--seed", 2**32),
        (EVAL, "--max_batch_tokens", 0),
        (EVAL, "--max_batch_tokens", -1),
        (EVAL, "--limit", 0),
        (EVAL, "--limit", -1),
        (EVAL, "--max_new_tokens", -1),
        (PROMPT, "--max_new_tokens", -1),
        (PROMPT_N_SHOT, "--max_new_tokens", -1),
    ],
)
def test_numbers_that_make_no_sense_are_refused(refuse, trained, script, flag, value):
    has_data = script in (TRAIN, EVAL)
    arguments = reading(script, trained.model, trained.data) if has_data else [trained.model]
    [*_, line] = refuse(script, *arguments, flag, value).splitlines()
    assert flag in line and str(value) in line


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--optim", "no_such"),
        ("--trainer", "no_such=1"),
        ("--trainer", "max_steps"),
        ("--negatives", "same_article"),  # the data has no titles
    ],
)
def test_training_settings_that_cannot_be_are_named(fail, trained, flag, value):
    assert value in fail(TRAIN, *reading(TRAIN, trained.model, trained.data), flag, value)


@pytest.mark.parametrize("script", [TRAIN, EVAL, N_SHOT, PROMPT, PROMPT_N_SHOT])
def test_a_tokenizer_with_more_tokens_than_the_model_is_told(fail, trained, tmp_path, script):
    config = tmp_path / "small.json"
    config.write_text(json.dumps(TINY | {"vocab_size": 100}))
    has_data = script in (TRAIN, EVAL, N_SHOT)
    arguments = reading(script, config, trained.data) if has_data else [config]
    complaint = fail(script, *arguments, "--tokenizer", ROOT / TOKENIZER)
    assert "104 vocabulary rows, the tokenizer" in complaint and "2,155" in complaint


@pytest.mark.parametrize("script", [EVAL, N_SHOT])
def test_the_data_is_kept_where_it_is_the_output_too(fail, trained, script):
    before = trained.data.read_bytes()
    complaint = fail(script, trained.model, trained.data, trained.data, "--overwrite")
    assert "is read too and would be lost" in complaint
    assert trained.data.read_bytes() == before


def test_an_empty_question_is_refused(fail, trained):
    arguments = [trained.model, "--context_file", trained.data, "--question", " "]
    assert "--question" in fail(PROMPT, *arguments)


def test_the_same_seed_trains_the_same_model_and_another_seed_another(trained, monkeypatch):
    train = importlib.import_module(TRAIN)
    weights = []
    for run, seed in enumerate((1, 1, 2)):
        output = trained.folder / f"seeded_{run}"
        flags = reading(TRAIN, trained.folder / "tiny.json", trained.data, output)
        flags += ["--tokenizer", ROOT / TOKENIZER, "--seed", seed, "--num_epochs", 1]
        monkeypatch.setattr(sys, "argv", [TRAIN, *map(str, flags)])
        train.main(train.parse_args())
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("kill", [KeyboardInterrupt, MemoryError])
def test_what_was_answered_is_written_when_an_evaluation_breaks_off(
    trained, tmp_path, monkeypatch, kill
):
    script = importlib.import_module(EVAL)
    whole_answer = Answerer.answer

    def answer_some(self, prompts, *settings):
        batches = whole_answer(self, prompts, *settings)
        yield next(batches)
        yield next(batches)
        raise kill

    monkeypatch.setattr(Answerer, "answer", answer_some)
    results = tmp_path / "results.jsonl"
    arguments = reading(EVAL, trained.model, trained.data, results)
    monkeypatch.setattr(sys, "argv", [EVAL, *map(str, arguments), "--max_batch_tokens", "1"])
    with pytest.raises(kill):
        script.main(script.parse_args())
    rows = read_rows(results)
    assert len(rows) == 2
    assert all(row["question"] == ROWS[row["idx"]]["prompt"] for row in rows)


@pytest.mark.parametrize(
    ("script", "required"),
    [
        (TRAIN, ["--model", "m", "--data_path", "d", "--output", "o"]),
        (EVAL, ["m", "d", "o"]),
        (N_SHOT, ["m", "d", "o"]),
        (PROMPT, ["m"]),
        (PROMPT_N_SHOT, ["m"]),
        ("query_results", ["r", "s"]),
        ("compare_results", ["a", "b"]),
        ("report_results", ["r"]),
    ],
)
def test_help_fits_a_screen_and_says_each_default(script, required, monkeypatch, capsys):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, *required])
    values = vars(module.parse_args())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        module.parse_args()
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert len(text.splitlines()) <= 45
    assert module.__doc__ in f"{text}\n" and f"    python {script}.py " in text

    about = dict(re.findall(r"^  --(\w+)(.*?)(?=^  -|\Z)", text, re.MULTILINE | re.DOTALL))
    assert len(about) <= (20 if script == TRAIN else 12)
    for name in about.keys() - {argument.strip("-") for argument in required}:
        value = values[name]
        if value is None or value is False or value == []:
            continue
        [said] = re.findall(r"default: (\S+?)\)?$|(\w+) \(default\)", about[name], re.MULTILINE)
        assert str(value) in said or float("".join(said)) == value, name


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path):
    """As in `query_results.py ... | head -1`."""
    row = result_row(0, Example("q", "c", "q", ("a",)), Answer("x" * 1000, 0.5, 0.5, 1.0, 9, 9))
    results = write_rows(tmp_path / "results.jsonl", [row] * 300)  # more than a pipe holds
    process = start("query_results", results, "SELECT idx, guess FROM df", "--format", "csv")
    assert process.stdout.readline() == "idx,guess\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)
