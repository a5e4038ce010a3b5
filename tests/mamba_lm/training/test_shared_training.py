"""Training on shared prefixes is training on independent examples: the Trainer's whole step, with
gradient accumulation and on two processes, against each example read alone.

    torchrun --nproc_per_node 2 --module tests.mamba_lm.training.test_shared_training OUT
"""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import TrainerCallback

from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.prefix_suffix import IGNORED, Item
from mamba_lm.training.trainer import PrefixSuffixTrainer

ROOT = Path(__file__).parents[3]
ACCUMULATION = 2
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def micro_batches() -> list[list[Item]]:
    """Four: prefixes of 0 to 40 tokens, with one suffix and with many, some in several batches."""
    rng = random.Random(0)

    def ids(count: int) -> list[int]:
        return [rng.randrange(30) for _ in range(count)]

    prefixes = [ids(length) for length in (40, 1, 0, 17, 33, 5, 9, 2)]
    counts = [[5, 1, 0, 1, 0, 0, 0, 0], [2, 0, 3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 9, 1, 0, 0],
              [0, 0, 0, 0, 1, 0, 1, 1]]  # fmt: skip
    return [
        [
            Item.with_target(prefix, ids(rng.randint(1, 20)), [*ids(rng.randint(0, 6)), 30])
            for prefix, count in zip(prefixes, row, strict=True)
            for _ in range(count)
        ]
        for row in counts
    ]


def with_other_labels(batches: list[list[Item]]) -> list[list[Item]]:
    """The same tokens with labels at random: several spans in a suffix, its first token among them,
    and spans in every other prefix."""
    rng = random.Random(1)

    def labels(tokens: list[int], is_first: bool) -> list[int]:
        found = [token if rng.random() < 0.4 else IGNORED for token in tokens]
        return [*[IGNORED] * len(tokens[:1]), *found[1:]] if is_first else found

    found = []
    for batch in batches:
        found.append([])
        for place, item in enumerate(batch):
            own = labels(item.suffix[:-1], is_first=not item.prefix)
            before = labels(item.prefix, is_first=True) if place % 2 else ()
            found[-1].append(Item(item.prefix, item.suffix, [*own, item.suffix[-1]], before))
    return found


KINDS = {  # of labels
    "targets": micro_batches,
    "spans and prefixes": lambda: with_other_labels(micro_batches()),
}


class EveryOther(Sampler):
    """The micro-batches of one process of several."""

    def __init__(self, kind: str, rank: int, world_size: int):
        self.batches = KINDS[kind]()[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def model(dtype: torch.dtype) -> MambaLM:
    torch.manual_seed(0)
    return MambaLM(MambaConfig(vocab_size=31, d_model=24, n_layer=2, d_state=5)).to(dtype)


class Gradients(TrainerCallback):
    """The gradients that the optimiser is given."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        self.found = {
            name.rpartition("model.")[2]: p.grad.clone() for name, p in model.named_parameters()
        }


def step(kind: str, dtype: torch.dtype, output: str, accumulation: int) -> tuple[float, dict]:
    """Loss and gradients of one optimiser step by the Trainer."""
    arguments = training_arguments(
        output,
        torch.device("cpu"),
        max_steps=1,
        max_grad_norm=0.0,
        logging_steps=1,
        gradient_accumulation_steps=accumulation,
        disable_tqdm=True,
    )
    batches = EveryOther(kind, arguments.process_index, arguments.world_size)
    trainer = PrefixSuffixTrainer(model(dtype), arguments, batches, lambda example: example, None)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.found


def independent_step(kind: str) -> tuple[float, dict]:
    """The same of every example read alone, from its first token on, in float64."""
    exact = model(torch.float64)
    total, count = 0.0, 0
    for example in [example for batch in KINDS[kind]() for example in batch]:
        ids = torch.tensor([[*example.prefix, *example.suffix]])
        unlabelled = [IGNORED] * len(example.prefix)
        labels = torch.tensor([*(example.prefix_labels or unlabelled), *example.labels])
        logits, _ = exact(ids[:, :-1])
        total = total + F.cross_entropy(logits[0], labels[1:], reduction="sum")
        count += example.num_labels
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in exact.named_parameters()}


@pytest.fixture(scope="module")
def independent() -> dict[str, tuple[float, dict]]:
    return {kind: independent_step(kind) for kind in KINDS}


def check(found, wanted, dtype: torch.dtype) -> None:
    (loss, gradients), (exact_loss, exact_gradients) = found, wanted
    assert abs(loss - exact_loss) < max(TOLERANCES[dtype], 1e-6)  # the log rounds a float32
    assert gradients.keys() == exact_gradients.keys()
    for name, exact in exact_gradients.items():
        error = (gradients[name].double() - exact).abs().max() / exact.abs().max()
        assert error < TOLERANCES[dtype], (name, error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_accumulated_shared_batches_equal_independent_examples(kind, dtype, independent, tmp_path):
    check(step(kind, dtype, str(tmp_path), accumulation=4), independent[kind], dtype)


def test_two_processes_equal_independent_examples(independent, tmp_path):
    """Two processes of two micro-batches each: a step's loss is over the labels of all four."""
    module = "tests.mamba_lm.training.test_shared_training"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", "--module", module, str(tmp_path)]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind, dtype in itertools.product(KINDS, TOLERANCES):
        first, second = (result[kind, str(dtype)] for result in results)
        check(first, independent[kind], dtype)
        check(second, independent[kind], dtype)
        for name, gradient in first[1].items():
            assert torch.equal(gradient, second[1][name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {
        (kind, str(dtype)): step(kind, dtype, sys.argv[1], ACCUMULATION)
        for kind, dtype in itertools.product(KINDS, TOLERANCES)
    }
    torch.save(found, Path(sys.argv[1]) / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
