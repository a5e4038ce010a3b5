"""Optimiser steps on questions with contexts, shared and unshared, beside mambapy.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.bench_train --data rajpurkar/squad:train \\
        --tokenizer EleutherAI/gpt-neox-20b
    python -m benchmarks.bench_train --quick                  # embedded data, one layer

mamba-130m's width and vocabulary, fewer layers. Every question comes once more on a random context,
where "I don't know." is right; a step is forward, backward and AdamW. The batch is one in which
sharing saves as many tokens as in an epoch's batches on average; mambapy reads it in smaller
batches of similar lengths and adds their gradients. `seconds` and `tokens` are per example, without
padding; `ratio` is to ours, shared.
"""

from common.script import run_script

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.timing import (
    Contender,
    Worker,
    installed,
    parse_benchmark_args,
    report,
    rows_per_item,
)
from benchmarks.workloads import (
    TRAIN,
    VOCABULARY,
    WIDTH,
    num_tokens,
    training_batch,
    without_prefix,
)
from common.command_line import positive_int
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.training.prefix_suffix import IGNORED, Item, PrefixSuffixLM, collate

SHARED, UNSHARED, MAMBAPY = "ours, shared", "ours, unshared", "mambapy, batches"


def parse_args():
    parser = parse_benchmark_args(__doc__, TRAIN)
    parser.add_argument("--n_layer", type=positive_int, default=12, help="default: 12")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="default: 32")
    parser.add_argument("--rounds", type=positive_int, default=2, help="default: 2")
    return parser.parse_args()


def main(args) -> None:
    if args.quick:
        args.n_layer, args.batch_size, args.rounds = 1, 16, 1
    names = [SHARED, UNSHARED]
    if installed("mambapy"):
        names += [f"{MAMBAPY} of {size}" for size in ((2,) if args.quick else (1, 2, 4))]
    examples, contexts = training_batch(args.data, args.tokenizer, args.batch_size)
    workers = {name: Worker(prepare, name, examples, args.n_layer) for name in names}
    report(
        f"{len(examples)} examples on {contexts} contexts, d_model {WIDTH}, {args.n_layer} layers, "
        "float32",
        rows_per_item(workers, SHARED, args.rounds, patience=150),
        args.json,
    )


def prepare(name: str, examples: list[Item], n_layer: int) -> Contender:
    if name == SHARED:
        return ours(examples, n_layer)
    if name == UNSHARED:
        return ours([without_prefix(example) for example in examples], n_layer)
    return mambapy(
        [without_prefix(example) for example in examples], n_layer, int(name.split()[-1])
    )


def ours(examples: list[Item], n_layer: int) -> Contender:
    torch.manual_seed(0)
    model = PrefixSuffixLM(MambaLM(MambaConfig(VOCABULARY, WIDTH, n_layer)))
    model(**collate(examples[:1]))["loss"].backward()  # loads the kernels
    step = stepper(model, lambda batch: model(**batch)["loss"], [collate(examples)])
    return Contender(step, len(examples), num_tokens(examples))


def mambapy(examples: list[Item], n_layer: int, batch_size: int) -> Contender:
    """Whole sequences, padded; the head only where there is loss, as in ours."""
    from mambapy.mamba import Mamba, MambaConfig

    torch.manual_seed(0)
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
    model = torch.nn.Sequential(embedding, Mamba(MambaConfig(WIDTH, n_layer)))
    examples = sorted(examples, key=lambda example: len(example.suffix))
    num_labels = sum(example.num_labels for example in examples)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden, labels = model(batch["suffixes"]), batch["labels"][:, 1:]
        at = labels != IGNORED
        logits = hidden[at] @ embedding.weight.T
        return F.cross_entropy(logits, labels[at], reduction="sum") / num_labels

    batches = [collate(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
    return Contender(stepper(model, loss, batches), len(examples), num_tokens(examples))


def stepper(model: torch.nn.Module, loss: Callable, batches: list[dict]) -> Callable[[], None]:
    """An optimiser step on the sum of `loss(batch)`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # the Trainer's default

    def step() -> None:
        optimizer.zero_grad()
        for batch in batches:
            loss(batch).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    run_script(main, parse_args)
