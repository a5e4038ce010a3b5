"""Runs that an older version wrote resume, are recognized as complete, and load.

tests/older/README.md has the commands that wrote them.
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_mamba_with_context
from mamba_lm.checkpoint import load_model
from mamba_lm.training.checkpoints import list_checkpoints

OLDER = Path(__file__).parent / "older"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fx(tmp_path, monkeypatch) -> Path:
    """A copy of the older files, where their commands name them."""
    shutil.copytree(OLDER, tmp_path / "fx")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "fx"


def train(monkeypatch, output: str, *more: str) -> None:
    """The command that wrote the run."""
    settings = ("use_cpu=true", "disable_tqdm=true", "save_total_limit=1")
    command = [
        *("train_mamba_with_context.py", "--model", "fx/config.json", "--tokenizer"),
        *("fx/tokenizer", "--data_path", "fx/train.jsonl", "--num_epochs", "2"),
        *("--batch_size", "16", "--output", output, *more),
        *(word for setting in settings for word in ("--trainer", setting)),
    ]
    monkeypatch.setattr(sys, "argv", command)
    train_mamba_with_context.main(train_mamba_with_context.parse_args())


def test_a_stopped_run_resumes(fx, monkeypatch, capsys):
    train(monkeypatch, "fx/stopped")
    assert "resuming from fx/stopped/checkpoint-5" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(fx / "stopped")] == ["checkpoint-8"]
    wanted, start = (load_file(fx / name / "model.safetensors")
                     for name in ("uninterrupted", "stopped/checkpoint-8"))  # fmt: skip
    before = load_file(OLDER / "stopped/checkpoint-5/model.safetensors")
    found = load_file(fx / "stopped/model.safetensors")
    assert found.keys() == wanted.keys() == start.keys()
    for name, weight in found.items():
        assert (weight - wanted[name]).abs().max() < 1e-4, name
    assert any(not torch.equal(weight, before[name]) for name, weight in found.items())


def test_a_finished_run_is_complete(fx, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in (fx / "finished").rglob("*")}
    train(monkeypatch, "fx/finished", "--eval_data", "fx/eval.jsonl")
    assert "fx/finished: this run is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (fx / "finished").rglob("*")} == before


def test_a_finished_model_loads(fx):
    model = load_model(str(fx / "finished"))
    weights = load_file(fx / "finished/model.safetensors")
    assert model.config.n_layer > 0 and len(dict(model.named_parameters())) <= len(weights)
