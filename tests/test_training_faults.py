"""What can go wrong around a training run, each once: nothing of the user's is lost, and nothing is
said that is not so."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import matplotlib.image
import pytest

import train_mamba_with_context
from common.atomic_files import atomic_folder
from common.errors import UserError
from context_qa.negatives import NegativeSampler
from context_qa.training import train as training
from context_qa.training.data_report import cut_to_length
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.training import progress, run_folder
from mamba_lm.training.checkpoints import find_damage, list_checkpoints
from mamba_lm.training.trainer import PrefixSuffixTrainer
from squad_utils import Example

ROOT = Path(__file__).parents[1]
TINY = {"d_model": 32, "n_layer": 1, "vocab_size": 2156, "ssm_cfg": {"d_state": 4}}
SCORED = ("--eval_data", "data/demo/handwritten.jsonl")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs the script on thirty questions; its output folder."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))

    def run(*more: str, output: Path = tmp_path / "run", steps: int = 8, **settings) -> Path:
        defaults = {"disable_tqdm": "true", "save_steps": 2, "logging_steps": 1}
        if "--eval_data" in more:
            defaults |= {"eval_strategy": "steps", "eval_steps": 2}
        command = [
            *("train", "--model", str(tmp_path / "tiny.json"), "--batch_size", "8"),
            *("--tokenizer", "data/demo/tokenizer", "--learning_rate", "1e-2"),
            *("--data_path", "data/demo/handwritten.jsonl", "--max_steps", str(steps)),
            *("--output", str(output), *more),
        ]
        for key, value in {**defaults, **settings}.items():
            command += ["--trainer", f"{key}={value}"]
        monkeypatch.setattr(sys, "argv", command)
        train_mamba_with_context.main(train_mamba_with_context.parse_args())
        return output

    return run


def cut_off(output: Path, step: int) -> None:
    """As a kill after this step would have left it."""
    record = json.loads((output / "training_args.json").read_text())
    (output / "training_args.json").write_text(json.dumps(record | {"complete": False}))
    (output / "model.safetensors").unlink()
    for checkpoint in list_checkpoints(output):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)


def scored_as(monkeypatch, *scores: float) -> None:
    """Evaluations that give these figures, one after the other."""
    found = iter(scores)
    monkeypatch.setattr(
        training, "make_scorer",
        lambda *args, **kwargs: lambda model, poll: {"exact_match": next(found), "f1": 1.0},
    )  # fmt: skip


def record(output: Path) -> dict:
    return json.loads((output / "training_args.json").read_text())


# The best model


@pytest.mark.parametrize("settings", [{"save_steps": 8}, {"eval_steps": 3, "save_steps": 6}])
def test_a_best_model_between_two_checkpoints_is_kept(settings, train, monkeypatch):
    scored_as(monkeypatch, 10.0, 50.0, 20.0, 30.0)
    output = train(*SCORED, **settings)
    step = 2 * settings.get("eval_steps", 2)
    assert record(output)["step_of_model"] == step
    assert record(output)["scores"]["exact_match"] == 50.0
    weights = (output / f"checkpoint-{step}/model.safetensors").read_bytes()
    assert (output / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_without_its_best_checkpoint_a_run_keeps_the_last_and_warns(
    damage, train, monkeypatch, capsys
):
    scored_as(monkeypatch, 10.0, 50.0, 20.0, 30.0, 30.0)
    output = train(*SCORED)
    cut_off(output, step=8)
    best = output / "checkpoint-4"
    if damage == "gone":
        shutil.rmtree(best)
    else:
        data = bytearray((best / "model.safetensors").read_bytes())
        data[-9] ^= 1
        (best / "model.safetensors").write_bytes(data)
    train(*SCORED)
    assert "checkpoint-4 was best, but" in capsys.readouterr().err
    assert record(output)["step_of_model"] == 8
    assert record(output)["scores"]["exact_match"] == 30.0
    last = (output / "checkpoint-8/model.safetensors").read_bytes()
    assert (output / "model.safetensors").read_bytes() == last


def test_scores_are_those_of_the_model_that_is_kept(train, monkeypatch):
    scored_as(monkeypatch, 10.0, 50.0, 20.0, 30.0)
    output = train(*SCORED, load_best_model_at_end="false")
    assert record(output)["scores"]["exact_match"] == 30.0
    assert "| exact match | 30.0 |" in (output / "README.md").read_text()


def test_no_evaluation_comes_before_its_delay(train, monkeypatch):
    scored_as(monkeypatch, 10.0, 20.0)
    output = train(*SCORED, eval_delay=5)
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "eval_f1" in row] == [6, 8]


@pytest.mark.parametrize("later", [[8.0, 7.0], [8.0, 99.0]])
def test_a_checkpoint_that_is_reported_as_saved_is_resumed_from(
    later, train, tmp_path, monkeypatch, capsys
):
    """A signal after the best evaluation, with a limit of one checkpoint; the run ends as one that
    nothing disturbed."""
    scores = [99.0, 9.0, *later]
    scored_as(monkeypatch, *scores)
    undisturbed = train(*SCORED, output=tmp_path / "undisturbed", save_total_limit=1)
    scored_as(monkeypatch, *scores)
    step = PrefixSuffixTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PrefixSuffixTrainer, "training_step", interrupted)
        train(*SCORED, save_total_limit=1)
    output = tmp_path / "run"
    assert "checkpoint-5 is saved" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-5", "checkpoint-2"]
    scored_as(monkeypatch, *later)
    train(*SCORED, save_total_limit=1)
    assert f"resuming from {output / 'checkpoint-5'}" in capsys.readouterr().out
    for name in ("model.safetensors", "checkpoint-8/model.safetensors"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()
    assert (output / "README.md").read_text() == (undisturbed / "README.md").read_text().replace(
        "undisturbed", "run"
    )


# Resuming


@pytest.mark.parametrize("cut_in", ["plot", "write_atomically", "make_model_card"])
def test_files_missing_after_a_kill_at_the_end_are_written_again(
    cut_in, train, tmp_path, monkeypatch
):
    """Between the last checkpoint and the record: the plot, the log, the card."""
    modules = {"plot": progress, "write_atomically": run_folder, "make_model_card": training}
    module = modules[cut_in]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, cut_in, stopped_at_the_end(getattr(module, cut_in)))
        train(*SCORED)
    output = tmp_path / "run"
    for name in ("training_log.jsonl", "training_log.png", "README.md"):
        (output / name).unlink(missing_ok=True)
    monkeypatch.setattr(PrefixSuffixTrainer, "training_step", None)
    train(*SCORED)
    whole = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in whole if "loss" in row] == [*range(1, 9)]
    assert matplotlib.image.imread(output / "training_log.png").std() > 0.05
    assert "training_log.png" in (output / "README.md").read_text()
    assert record(output)["complete"]


def stopped_at_the_end(function):
    """Raises a KeyboardInterrupt where a function would write what belongs to a finished run."""

    def stopped(*args, **kwargs):
        if function.__name__ == "write_atomically" and not str(args[0]).endswith("README.md"):
            return function(*args, **kwargs)
        raise KeyboardInterrupt

    return stopped


@pytest.mark.parametrize("name", ["training_log.jsonl", "training_log.png", "README.md"])
def test_missing_files_of_a_complete_run_are_written_again(name, train, monkeypatch, capsys):
    output = train(*SCORED)
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    (output / name).unlink()
    monkeypatch.setattr(PrefixSuffixTrainer, "training_step", None)
    train(*SCORED)
    assert f"{name} is missing" in capsys.readouterr().err
    after = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert after.keys() == before.keys()
    for kept in ("model.safetensors", name):
        assert after[kept] == before[kept]
    (output / name).unlink()
    for checkpoint in list_checkpoints(output):
        shutil.rmtree(checkpoint)
    train(*SCORED)
    said = capsys.readouterr()
    assert f"{name} is missing, and no checkpoint is left" in said.err
    assert "this run is complete" in said.out


def test_log_plot_and_card_are_the_same_after_a_resume(train, tmp_path):
    """The order of their figures too."""
    wanted = train(*SCORED, output=tmp_path / "whole/run", save_total_limit=9)
    output = train(*SCORED, save_total_limit=9)
    cut_off(output, step=4)
    train(*SCORED, save_total_limit=9)

    def names(folder: Path) -> list[list[str]]:
        lines = (folder / "training_log.jsonl").read_text().splitlines()
        return [list(json.loads(line)) for line in lines]

    assert names(output) == names(wanted)
    card = (wanted / "README.md").read_text().replace(str(wanted), str(output))
    assert (output / "README.md").read_text() == card
    assert "| exact match |" in card and list(record(output)["scores"]) == list(
        record(wanted)["scores"]
    )


@pytest.mark.parametrize("text", [
    "", "[]", "null", "[" * 100_000, '{"settings": 7}', '{"settings": {}}', '{"complete": true}',
])  # fmt: skip
def test_an_unreadable_record_is_another_run(text, train):
    output = train()
    (output / "training_args.json").write_text(text)
    with pytest.raises(UserError, match="give another folder or set overwrite") as caught:
        train()
    assert "\n" not in str(caught.value)
    train("--overwrite")
    assert record(output)["complete"]


@pytest.mark.parametrize("change", [
    {"files": 7}, {"files": [1]}, {"files": {"config.json": 7}}, {"files": {"../x": {"bytes": 1}}},
    {"files": {"config.json": {"bytes": "x"}}}, {"files": {"config.json": {}}}, {"complete": "yes"},
    {"complete": False, "begun_with": 7}, {"complete": False, "packages": [1]},
    {"complete": False, "begun_with": [], "packages": None}, {"warnings": 7, "scores": "x"},
], ids=str)  # fmt: skip
def test_a_record_edited_by_hand_is_mended(change, train):
    output = train()
    (output / "training_args.json").write_text(json.dumps(record(output) | change))
    train()
    assert record(output)["complete"] is True


@pytest.mark.parametrize("settings", [{"logging_steps": 4}, {"logging_strategy": "epoch"}])
def test_the_log_too_is_that_of_one_run(settings, train, tmp_path):
    """From a checkpoint between two of its lines."""

    def losses(output):
        lines = (output / "training_log.jsonl").read_text().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]

    wanted = losses(train(output=tmp_path / "whole", save_total_limit=9, **settings))
    output = train(save_total_limit=9, **settings)
    cut_off(output, step=2)
    assert losses(train(save_total_limit=9, **settings)) == wanted and len(wanted) > 2


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch_fused"])
def test_runs_with_other_optimizers_resume_too(optim, train, tmp_path):
    wanted = train("--optim", optim, output=tmp_path / "whole")
    output = train("--optim", optim)
    cut_off(output, step=6)
    train("--optim", optim)
    for name in ("model.safetensors", "checkpoint-8/optimizer.pt"):
        assert (output / name).read_bytes() == (wanted / name).read_bytes(), name


def test_damaged_checkpoints_do_not_crowd_out_new_ones(train):
    output = train(save_total_limit=9)
    cut_off(output, step=8)
    for step in (6, 8):
        os.truncate(output / f"checkpoint-{step}/optimizer.pt", 9)
    shutil.copytree(output / "checkpoint-2", output / "checkpoint-2-mine")
    train(save_total_limit=1, disable_tqdm="true")  # not another run by that
    assert [find_damage(checkpoint) for checkpoint in list_checkpoints(output)] == [None]
    assert (output / "checkpoint-2-mine").is_dir()


def test_a_finished_run_can_be_continued_in_another_folder(train, tmp_path):
    first = train(steps=4)
    last = first / "checkpoint-4"
    output = train(output=tmp_path / "more", steps=8, resume_from_checkpoint=last)
    assert record(output)["steps"] == 8
    assert (output / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()
    scored = train(*SCORED, output=tmp_path / "scored", steps=6, resume_from_checkpoint=last)
    assert "exact_match" in record(scored)["scores"]


def test_a_complete_run_whose_weights_are_gone_writes_them_again(train):
    output = train()
    before = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").unlink()
    assert (train() / "model.safetensors").read_bytes() == before


def test_a_complete_run_whose_weights_are_cut_short_writes_them_again(train):
    output = train()
    before = (output / "model.safetensors").read_bytes()
    os.truncate(output / "model.safetensors", len(before) - 1)
    assert (train() / "model.safetensors").read_bytes() == before


def test_other_code_that_started_a_run_is_reported_and_recorded(train, capsys):
    output = train()
    for step in (6, 4):
        cut_off(output, step)
        if step == 6:
            changed = record(output) | {"git_commit": "deadbeef"}
            (output / "training_args.json").write_text(json.dumps(changed))
        train()
        assert "was started with other code (git commit: deadbeef there" in capsys.readouterr().err
        assert record(output)["begun_with"]["git_commit"] == "deadbeef"
        assert record(output)["git_commit"] != "deadbeef"


def test_a_folder_that_not_all_processes_see_is_refused(train, tmp_path, monkeypatch):
    """As if another one's disk were its own."""
    monkeypatch.setattr(run_folder, "is_true_on_all_ranks", lambda value: value and False)
    with pytest.raises(UserError, match="not all processes see it; give a folder they share"):
        train()
    assert not (tmp_path / "run").exists()


# What is there already


def test_a_folder_with_a_config_of_something_else_is_no_model(train, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.json").write_text('{"port": 80}')
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"contains other things \(config.json\)"):
            train(*more)
    assert (output / "config.json").read_text() == '{"port": 80}'


@pytest.mark.parametrize("record", [None, "{}", '{"settings": {"colour": "red"}}', "mine"])
def test_files_of_no_run_are_never_overwritten(record, train, tmp_path):
    """Such as a model that was downloaded, or that another script has written."""
    output = tmp_path / "run"
    shutil.copytree(ROOT / "models/demo", output)
    (output / "training_args.json").unlink()
    (output / "README.md").write_text("# About this model")
    if record is not None:
        (output / "training_args.json").write_text(record)
    before = {path: path.read_bytes() for path in output.rglob("*")}
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match=r"other things \(NOTE\.txt\)|README\.md: contains"):
            train(*more)
    assert {path: path.read_bytes() for path in output.rglob("*")} == before


def test_a_readme_of_the_users_own_is_never_overwritten(train):
    output = train(steps=2)
    (output / "README.md").write_text("mine")
    for more in ([], ["--overwrite"]):
        with pytest.raises(
            UserError, match=r"README\.md: contains something other than the card of a"
        ):
            train(*more, steps=2)
    assert (output / "README.md").read_text() == "mine"


def test_a_readme_that_comes_during_training_is_kept(train, tmp_path, monkeypatch):
    train_whole = PrefixSuffixTrainer.train

    def meanwhile(self, *args):
        train_whole(self, *args)
        (tmp_path / "run/README.md").write_text("mine")

    monkeypatch.setattr(PrefixSuffixTrainer, "train", meanwhile)
    with pytest.raises(UserError, match=r"README\.md: contains something other than the card of a"):
        train(steps=2)
    assert (tmp_path / "run/README.md").read_text() == "mine"


def test_overwrite_keeps_files_that_only_look_like_a_runs(train):
    output = train()
    theirs = ["checkpoint-notes.md", "tokenizer_mine.json", "model_backup.safetensors"]
    theirs += ["film.partial", ".film.partial", ".a.partial-2.txt"]
    for name in theirs:
        (output / name).write_text("mine")
    (output / "checkpoint-keep").mkdir()
    (output / "checkpoint-1").symlink_to(output / "checkpoint-keep")
    train("--overwrite", steps=2)
    assert all((output / name).read_text() == "mine" for name in theirs)
    assert (output / "checkpoint-keep").is_dir() and not (output / "checkpoint-1").exists()


def test_saving_a_model_leaves_other_weights_alone(tmp_path):
    for name in ("model-before.safetensors", "pytorch_model_old.bin", "pytorch_model.bin"):
        (tmp_path / name).write_text("x")
    with atomic_folder(tmp_path) as partial:
        (partial / "config.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model-before.safetensors", "pytorch_model_old.bin"
    }  # fmt: skip


@pytest.mark.parametrize(
    "more, settings",
    [
        (["--optim", "adamw_bnb_8bit"], {}),
        ([], {"adam_beta2": 2}),
        ([], {"resume_from_checkpoint": "/nowhere"}),
        ([], {"dataloader_num_workers": -1}),
        (["--model", "RUN"], {}),
        (["--model", "RUN/checkpoint-8"], {}),
        ([], {"resume_from_checkpoint": "RUN/checkpoint-8"}),
        ([], {"lr_scheduler_kwargs": '{"a":1}'}),
    ],
    ids=str,
)
def test_a_run_that_cannot_start_overwrites_nothing(more, settings, train):
    output = train()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    more = [word.replace("RUN", str(output)) for word in more]
    settings = {k: str(v).replace("RUN", str(output)) for k, v in settings.items()}
    with pytest.raises(UserError) as caught:
        train("--overwrite", *more, **settings)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize(
    "key, value",
    [
        ("fp16", "true"), ("save_only_model", "true"), ("push_to_hub", "true"),
        ("neftune_noise_alpha", "5"), ("label_smoothing_factor", "0.1"),
        ("auto_find_batch_size", "true"), ("save_total_limit", '"abc"'), ("max_grad_norm", "null"),
        ("eval_on_start", "true"), ("resume_from_checkpoint", "true"), ("torch_compile", "true"),
        ("ignore_data_skip", "true"), ("warmup_steps", '"many"'), ("neftune_noise_alpha", "0"),
        ("eval_steps", "many"), ("eval_steps", '""'), ("metric_for_best_model", "5"),
        ("greater_is_better", "[]"), ("save_steps", "null"), ("run_name", "[7]"),
        ("torch_compile_mode", "default"), ("torch_compile_backend", "inductor"),
    ],
)  # fmt: skip
def test_settings_without_effect_or_with_a_wrong_one_are_refused(key, value, train, tmp_path):
    with pytest.raises(UserError, match="training arguments: ") as caught:
        train(**{key: value})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, said",
    [
        ("learning_rate=1", "set learning_rate instead"),
        ("per_device_train_batch_size=4", "set batch_size instead"),
        ("output_dir=x", "set output instead"),
        ("sav_steps=3", r"\(save_steps\?\)"),
    ],
)
def test_a_field_with_a_flag_is_given_by_the_flag(override, said, train, tmp_path):
    with pytest.raises(UserError, match=f"training arguments: {override}: .*{said}"):
        train("--trainer", override)
    assert not (tmp_path / "run").exists()


def test_an_unknown_metric_is_reported_with_the_known_ones(train, tmp_path, capsys):
    """Before anything is trained, or written."""
    with pytest.raises(UserError, match="choose from exact_match, f1, answerable_exact_match, "):
        train(*SCORED, metric_for_best_model="nonsense")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="metric_for_best_model needs eval_data"):
        train(metric_for_best_model="f1")
    assert not (tmp_path / "run").exists()


# Data


def test_a_context_without_the_answer_is_dropped_however_short(tmp_path):
    tokenizer = load_tokenizer(str(ROOT / "data/demo/tokenizer"))
    blanks = Example("1", "alpha beta gamma" + " " * 600, "Which one?", ("zeta",))
    words = " ".join(["word"] * 200)
    paris = Example("2", f"{words} Paris {words}", "Where?", ("Paris",))
    found = cut_to_length([blanks, paris], tokenizer, "context_first", 60)
    assert [example.id for example in found.examples] == ["2"] and found.num_dropped == 1


def test_hard_negatives_of_contexts_without_a_word():
    examples = [Example("1", "b", "Which?", ("b",)), Example("2", "c", "Who?", ("c",))]
    assert NegativeSampler(examples, "hard").draw_contexts(0) == ["c", "b"]
