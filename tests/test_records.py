"""What a result or a model was made with decides whether a run is resumed or complete."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from context_qa.results.reading import read_results
from context_qa.results.summary import find_first_negative, read_summary, summary_path
from mamba_lm.checkpoint import NOTE, load_tokenizer, save_model
from mamba_lm.models.mamba import MambaConfig, MambaLM
from squad_utils import NO_ANSWER

ROOT = Path(__file__).parents[1]
EVAL, TRAIN = "eval_mamba_with_context", "train_mamba_with_context"
CONTEXT = "The Wild Swan Hotel has 62 rooms and charges $95 a night."
ROWS = [
    {"context": CONTEXT, "prompt": "How many rooms are there?", "response": "62", "id": "a#hard"},
    {"context": CONTEXT, "prompt": "Who runs it?", "response": "I don’t know.", "id": "b#hard"},
    {"context": "Nobody is there.", "prompt": "Who is there?", "response": "Nobody", "id": "c"},
]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script; its stderr."""

    def run(script: str, *arguments: object) -> str:
        module = importlib.import_module(script)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capsys.readouterr()
        module.main(module.parse_args())
        return capsys.readouterr().err

    return run


@pytest.fixture
def fail(run, capsys, monkeypatch):
    def fail(script: str, *arguments: object) -> str:
        with pytest.raises(UserError) as caught:
            run(script, *arguments)
        return str(caught.value)

    return fail


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return path


def make_model(folder: Path, seed: int = 0, tokenizer: bool = True) -> Path:
    torch.manual_seed(seed)
    loaded = load_tokenizer("", str(ROOT / "data/demo/tokenizer"))
    model = MambaLM(MambaConfig(len(loaded), d_model=8, n_layer=1, d_state=2)).eval()
    save_model(model, folder, loaded if tokenizer else None)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model")


def evaluate(run, model, data, output, *flags) -> str:
    return run(EVAL, model, data, output, "--max_new_tokens", 3, "--device", "cpu", *flags)


# Results


def shard(folder: Path, order: tuple[int, int], seed: int = 0) -> None:
    """Two whole sets of shards are there, of two models; the index names one of them."""
    path = folder / "model.safetensors"
    if path.exists():
        other = load_file(make_model(folder / "other", seed=1) / "model.safetensors")
        for number, weights in enumerate((load_file(path), other)):
            save_file(weights, folder / f"model-0000{number}-of-00002.safetensors")
        shutil.rmtree(folder / "other")
        path.unlink()
    names = load_file(folder / "model-00000-of-00002.safetensors")
    place_of = dict.fromkeys(names, f"model-0000{order[0]}-of-00002.safetensors")
    index = {"weight_map": place_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: shard(folder, (1, 0)),
        lambda folder: (folder / "added_tokens.json").write_text('{"<new>": 2156}'),
        lambda folder: (folder / "tokenizer_config.json").write_text(
            (folder / "tokenizer_config.json").read_text().replace('"unk_token"', '"other"')
        ),
        lambda folder: (folder / "generation_config.json").write_text('{"max_length": 3}'),
    ],
    ids=["index", "added tokens", "tokenizer config", "generation config"],
)
def test_a_file_never_mixes_two_models(change, run, fail, model, data, tmp_path):
    """Whatever loading reads is in the record: another one refuses to resume."""
    shard(model, (0, 1))
    evaluate(run, model, data, tmp_path / "r.jsonl", "--limit", 3)
    lines = (tmp_path / "r.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_text("".join(lines[:1]), "utf-8")  # cut off
    change(model)
    complaint = fail(
        *(EVAL, model, data, tmp_path / "r.jsonl", "--max_new_tokens", 3, "--limit", 3),
        *("--device", "cpu"),
    )
    assert "results of another run (model: content" in complaint


def test_files_that_loading_does_not_read_do_not_matter(run, model, data, tmp_path):
    evaluate(run, model, data, tmp_path / "r.jsonl")
    before = read_results(str(tmp_path / "r.jsonl"))
    (model / "pytorch_model.bin").write_bytes(b"not read")
    (model / "README.md").write_text("new")
    evaluate(run, model, data, tmp_path / "r.jsonl")
    assert read_results(str(tmp_path / "r.jsonl")) == before


def test_another_tokenizer_is_another_run(run, fail, model, data, tmp_path):
    bare, folder = make_model(tmp_path / "bare", tokenizer=False), tmp_path / "tokenizer"
    shutil.copytree(ROOT / "data/demo/tokenizer", folder)
    evaluate(run, bare, data, tmp_path / "r.jsonl", "--tokenizer", folder)
    (folder / "special_tokens_map.json").write_text("{}")
    flags = ("--max_new_tokens", 3, "--device", "cpu", "--tokenizer", folder)
    complaint = fail(EVAL, bare, data, tmp_path / "r.jsonl", *flags)
    assert "results of another run (tokenizer: content" in complaint


def test_hashes_of_ordinary_models_are_what_they_always_were(run, data, tmp_path):
    """Results and models of earlier versions are resumed."""
    evaluate(run, "models/demo", data, tmp_path / "r.jsonl")
    recorded = read_summary(tmp_path / "r.jsonl")
    assert recorded["model_sha256"] == (
        "e6493b7bffd1de8004efbb95516639d1657225d8f1bc6be9b38715c9cd7bd8cd"
    )


def test_random_weights_are_recorded_as_such(run, data, tmp_path):
    config = tmp_path / "random.json"
    config.write_text(json.dumps({"d_model": 8, "n_layer": 1, "vocab_size": 2156}))
    flags = ("--tokenizer", ROOT / "data/demo/tokenizer")
    said = evaluate(run, config, data, tmp_path / "r.jsonl", *flags)
    assert f"warning: {config} is a config file: the weights are RANDOM" in said
    assert "RANDOM" in read_summary(tmp_path / "r.jsonl")["warnings"][0]
    context = tmp_path / "context.txt"
    context.write_text(CONTEXT)
    question = ("--context_file", context, "--question", "Who?", "--json")
    said = run("prompt_mamba_with_context", config, *question, *flags)
    assert "the weights are RANDOM" in said


# Ids are ids


def test_ids_that_look_like_those_of_negatives_change_nothing(run, model, data, tmp_path):
    evaluate(run, model, data, tmp_path / "r.jsonl")
    summary = read_summary(tmp_path / "r.jsonl")
    assert summary["scores"]["num_questions"] == 3
    assert "negatives_num_questions" not in summary["scores"]
    evaluate(run, model, data, tmp_path / "n.jsonl", "--negatives", "hard")
    scores = read_summary(tmp_path / "n.jsonl")["scores"]
    assert (scores["num_questions"], scores["negatives_num_questions"]) == (3, 2)
    ids = [row["id"] for row in read_results(str(tmp_path / "n.jsonl"))]
    assert sorted(ids[3:]) == ["a#hard#hard", "c#hard"]


def test_summaries_of_earlier_versions_name_the_kind_alone():
    ids = ("a#hard", "b#hard", "c", "c#hard", "b#hard#hard")
    asked = zip(ids, "ABCCB", (0, 1, 1, 0, 0), strict=True)
    rows = [
        {"idx": i, "id": name, "question": question, "answers": ["x"] * number}
        for i, (name, question, number) in enumerate(asked)
    ]
    assert find_first_negative({"settings": {"negatives": "hard"}}, rows) == 3
    assert find_first_negative({"settings": {"negatives": "random"}}, rows) is None
    assert find_first_negative({"settings": {"negatives": None}}, rows) is None
    assert find_first_negative({"first_negative": 4, "settings": {"negatives": "hard"}}, rows) == 4
    assert find_first_negative({}, rows) is None
    # Questions without an answer of their own, whose ids look like those of negatives
    rows[3]["question"] = "Another?"
    assert find_first_negative({"settings": {"negatives": "hard"}}, rows) == 4
    rows[4]["id"] = "a#hard#hard"
    assert find_first_negative({"settings": {"negatives": "hard"}}, rows) is None


def test_a_curly_apostrophe_abstains(run, model, data, tmp_path):
    evaluate(run, model, data, tmp_path / "r.jsonl")
    rows = read_results(str(tmp_path / "r.jsonl"))
    assert [row["answers"] for row in rows] == [["62"], [], ["Nobody"]]
    assert rows[1]["answer"] == NO_ANSWER


# A training that is complete


@pytest.fixture
def train(run, data, tmp_path):
    """Train for two steps from a model, or resume; its stderr."""
    model = make_model(tmp_path / "start")
    (model / NOTE).write_text("This demo knows one thing.")

    def train(*more: object) -> str:
        return run(
            *(TRAIN, "--model", model, "--data_path", data, "--output", tmp_path / "out"),
            *("--max_steps", 2, "--batch_size", 4, "--negatives", "none"),
            *("--trainer", "use_cpu=true", "--trainer", "save_steps=1", *more),
        )

    return train


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("change", [damage, Path.unlink], ids=["damaged", "missing"])
def test_a_complete_run_is_looked_at(change, name, train, tmp_path, capsys):
    train()
    folder = tmp_path / "out"
    whole = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "warning" not in train()
    change(folder / name)
    said = train()
    assert f"warning: {folder}: {name} is " in said
    assert said.endswith("; the model is written again from checkpoint-2\n")
    assert (folder / name).read_bytes() == whole[name]
    assert "warning" not in train()


def test_a_file_that_loading_would_read_makes_a_run_incomplete(train, tmp_path):
    train()
    (tmp_path / "out/added_tokens.json").write_text('{"the": 2156}')
    assert "added_tokens.json is not of the run, but loading reads it" in train()
    assert not (tmp_path / "out/added_tokens.json").exists()
    assert "warning" not in train()


def test_a_damaged_run_without_a_checkpoint_is_not_trained_again_unasked(train, tmp_path):
    train()
    shutil.rmtree(tmp_path / "out/checkpoint-1", ignore_errors=True)
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    damage(tmp_path / "out/tokenizer_config.json")
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="no checkpoint is left to write the model from; set over"):
        train()
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights


def test_a_record_of_earlier_versions_is_looked_at_too(train, tmp_path):
    train()
    folder = tmp_path / "out"
    record = json.loads((folder / "training_args.json").read_text())
    del record["files"]
    (folder / "training_args.json").write_text(json.dumps(record))
    assert "warning" not in train()
    (folder / "config.json").unlink()
    assert "its model is damaged" in train()
    assert "warning" not in train()


def test_a_note_is_not_passed_on(train, tmp_path):
    train()
    assert not (tmp_path / "out" / NOTE).exists()


def test_training_warns_of_its_data(train, data, tmp_path):
    rows = [row | {"id": "same", "response": "two\nlines"} for row in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    said = train()
    assert f"warning: {data}: 1 id occurs more than once" in said
    assert f"warning: {data}: 3 questions teach an answer that no guess can be" in said
    record = json.loads((tmp_path / "out/training_args.json").read_text())
    assert len(record["warnings"]) == 2


def test_training_warns_of_the_data_that_it_is_scored_on(train, tmp_path):
    scored = tmp_path / "scored.jsonl"
    rows = [ROWS[1] | {"id": "n"}, ROWS[0] | {"prompt": "How many?", "response": "two\nlines"}]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    said = train("--eval_data", scored)
    assert f"warning: {scored}: 1 question has no reference that a guess can match" in said


def test_guesses_from_the_context_are_warned_of_too(run, model, data, tmp_path):
    rows = [ROWS[0] | {"response": "sixty"}, ROWS[2]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    said = evaluate(run, model, data, tmp_path / "r.jsonl", "--constrain_to_context")
    assert f"warning: {data}: 1 question has no reference that a guess can match: 'sixty'" in said
    assert "after 3 tokens, or it is not in its context" in said


# Flags


@pytest.mark.parametrize("value", ["false", "true", 0, 1, "", [], {}], ids=str)
def test_a_flag_that_is_no_boolean_is_refused(value, fail, model, tmp_path):
    row = ROWS[0] | {"is_impossible": value}
    squad = {"question": "Q?", "id": "1", "answers": [{"text": "62"}], "is_impossible": value}
    document = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [squad]}]}]}
    for content in (row, document):
        path = tmp_path / "flag.json"
        path.write_text(json.dumps(content))
        complaint = fail(EVAL, model, path, tmp_path / "r.jsonl")
        assert f"'is_impossible' is {value!r}; it must be true or false" in complaint


def test_a_false_flag_without_an_answer_is_refused(fail, model, tmp_path):
    squad = {"question": "Q?", "id": "1", "answers": [], "is_impossible": False}
    document = {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [squad]}]}]}
    path = tmp_path / "flag.json"
    path.write_text(json.dumps(document))
    assert "false, but there is no answer" in fail(EVAL, model, path, tmp_path / "r.jsonl")
    assert not summary_path(tmp_path / "r.jsonl").exists()
