"""Two processes train as one does: with a copy of the weights each, and with each its part of them.

torchrun --nproc_per_node 2 --module tests.test_distributed_training FOLDER
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import train_mamba_with_context
from context_qa.training import train as training
from mamba_lm.checkpoint import load_model
from mamba_lm.training.checkpoints import find_damage
from mamba_lm.training.trainer import PrefixSuffixTrainer

ROOT = Path(__file__).parents[1]
STEPS = 10
# As many layers as it takes to see that each is sharded by itself; a width that two do not divide.
TINY = {"d_model": 33, "n_layer": 3, "vocab_size": 2156, "ssm_cfg": {"d_state": 4}}
ALONE = ("--gradient_accumulation_steps", "4")
OF_TWO = ("--gradient_accumulation_steps", "2")
SHARDED = (*OF_TWO, "--fully_shard")
RUNS = {  # of two processes
    "copies": OF_TWO,
    "sharded": SHARDED,
    "recomputed": (*SHARDED, "--trainer", "activation_checkpointing=true"),
    "scored": (*SHARDED, "--eval_data", "data/demo/handwritten.jsonl"),
}


def train(folder: Path, output: str, *more: str) -> None:
    settings = (
        "save_strategy=steps",
        f"save_steps={STEPS // 2}",
        "use_cpu=true",
        "disable_tqdm=true",
    )
    if "--eval_data" in more:
        settings += ("eval_strategy=steps", f"eval_steps={STEPS // 2}")
        settings += ("load_best_model_at_end=false",)
    sys.argv = [
        *("train_mamba_with_context.py", "--model", str(folder / "tiny.json")),
        *("--data_path", str(folder / "data.jsonl"), "--tokenizer", "data/demo/tokenizer"),
        *("--output", str(folder / output), "--max_steps", str(STEPS), "--batch_size", "8"),
        *("--learning_rate", "1e-3", *more),
        *(word for setting in settings for word in ("--trainer", setting)),
    ]
    train_mamba_with_context.main(train_mamba_with_context.parse_args())


def noting_shards(folder: Path):
    """The Trainer, which writes down how much of the weights this process holds once trained."""

    class Noting(PrefixSuffixTrainer):
        def train(self, *args):
            super().train(*args)
            own, whole, moments = 0, 0, 0
            for parameter in self.language_model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                moment = self.optimizer.state[parameter]["exp_avg"]
                moment = moment.to_local() if isinstance(moment, DTensor) else moment
                own, whole = own + local.numel(), whole + parameter.numel()
                moments += moment.numel()
            name = f"{Path(self.args.output_dir).name}.{self.args.process_index}.json"
            (folder / name).write_text(json.dumps([own, whole, moments]))

    return Noting


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All runs of two processes, and that of one."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    lines = (ROOT / "data/demo/train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "data.jsonl").write_text("".join(lines[:203]), "utf-8")  # no batch divides them
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "--module", "tests.test_distributed_training", str(folder)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert run.returncode == 0, run.stderr[-4000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        train(folder, "alone", *ALONE)
        torch.set_num_threads(threads)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_where_one_does(name, folder):
    """The same steps of some 31 questions, in four batches; over two epochs."""
    alone, start = weights(folder / "alone"), load_weights_at_start(folder)
    for key, got in weights(folder / name).items():
        assert (got - alone[key]).abs().max() < 1e-5, key
        assert (alone[key] - start[key]).abs().max() > 1e-3, key


def load_weights_at_start(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return load_model(str(folder / "tiny.json")).state_dict()


@pytest.mark.parametrize("name", RUNS)
def test_each_process_has_its_shard_alone(name, folder):
    shares = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]
    whole = shares[0][1]
    assert shares[1][1] == whole > 10_000
    for own, _, moments in shares:
        assert own == moments
        assert (own == whole) if name == "copies" else (own < 0.6 * whole)
    if name != "copies":
        assert sum(own for own, *_ in shares) == whole


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_two_processes_is_that_of_one(name, folder):
    """So a single process resumes from it, and its model loads."""
    one, two = (folder / each / f"checkpoint-{STEPS}" for each in ("alone", name))
    assert find_damage(two) is None
    load_model(str(two))
    states = [torch.load(path / "optimizer.pt", weights_only=True) for path in (one, two)]
    groups = [state["param_groups"] for state in states]
    assert groups[0] == groups[1]
    for index, moments in states[0]["state"].items():
        for key, wanted in moments.items():
            got = states[1]["state"][index][key]
            assert got.shape == wanted.shape and type(got) is torch.Tensor
            assert torch.allclose(got, wanted, rtol=1e-2, atol=1e-6), (index, key)


def test_a_sharded_run_is_scored(folder):
    log = (folder / "scored/training_log.jsonl").read_text().splitlines()
    scores = [row for row in map(json.loads, log) if "eval_exact_match" in row]
    assert [row["step"] for row in scores] == [STEPS // 2, STEPS]
    assert "abstention f1" in (folder / "scored/README.md").read_text()


def test_runs_resume_sharded_or_not(folder):
    """From half the steps of a run of one kind to the end of the other."""
    alone = weights(folder / "alone")
    for name in ("resumed sharded", "resumed in copies"):
        for key, got in weights(folder / name).items():
            assert (got - alone[key]).abs().max() < 1e-5, (name, key)


def resume(folder: Path, name: str, of: str, *more: str) -> None:
    """A run of its own that resumes from another one's checkpoint."""
    train(
        folder,
        name,
        *more,
        "--trainer",
        f"resume_from_checkpoint={folder / of}/checkpoint-{STEPS // 2}",
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    training.PrefixSuffixTrainer = noting_shards(folder)
    with mock.patch("torch.distributed.destroy_process_group") as disconnecting:
        # Each run ends with it, but here they share one group.
        for name, more in RUNS.items():
            train(folder, name, *more)
        resume(folder, "resumed sharded", "copies", *SHARDED)
        resume(folder, "resumed in copies", "sharded", *OF_TWO)
    assert disconnecting.call_count == len(RUNS) + 2
    torch.distributed.destroy_process_group()
