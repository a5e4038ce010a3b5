"""Optimiser steps on questions with contexts, shared and unshared, beside mambapy.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.bench_train --data rajpurkar/squad:train \\
        --tokenizer EleutherAI/gpt-neox-20b
    python -m benchmarks.bench_train --quick                  # embedded data, one layer

mamba-130m's width and vocabulary, fewer layers. Every question comes once more on a random context,
where "I don't know." is right; a step is forward, backward and AdamW. All contenders learn from the
same batch; a slow one from the first examples of it. `seconds` is an example's; `ratio` is to ours,
shared; tokens count what is read, padding left out.
"""

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
from context_qa.dataset import GroupedBatches, continuation
from errors import positive_int, run_script
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.model import MambaConfig, MambaLM, right_pad
from mamba_lm.training import Continuation, PrefixSuffixLM, collate
from squad_utils import PROMPT_ORDERS, read_examples

EMBEDDED = "data/demo/train.jsonl"
VOCABULARY, WIDTH = 50277, 768
SHARED, UNSHARED, MAMBAPY = "ours, shared", "ours, unshared", "mambapy, batches"


def parse_args():
    parser = parse_benchmark_args(__doc__, EMBEDDED)
    parser.add_argument("--n_layer", type=positive_int, default=12, help="default: 12")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="default: 32")
    parser.add_argument("--rounds", type=positive_int, default=5, help="default: 5")
    return parser.parse_args()


def main(args) -> None:
    if args.quick:
        args.n_layer, args.rounds = 1, 2
    names = [SHARED, UNSHARED]
    if installed("mambapy"):
        names += [f"{MAMBAPY} of {size}" for size in ((8,) if args.quick else (1, 2, 8))]
    examples, contexts = batch(args.data, args.tokenizer, args.batch_size)
    workers = {name: Worker(prepare, name, examples, args.n_layer) for name in names}
    report(
        f"{len(examples)} examples on {contexts} contexts, d_model {WIDTH}, {args.n_layer} layers, "
        "float32",
        rows_per_item(workers, SHARED, args.rounds, patience=20),
        args.json,
    )


def batch(data: str, tokenizer: str, batch_size: int) -> tuple[list[Continuation], int]:
    """The first batch of training on the data, and how many contexts are in it."""
    tokenizer = load_tokenizer("", tokenizer)
    pairings = next(iter(GroupedBatches(read_examples(data), batch_size, "random")))
    examples = [continuation(pairing, tokenizer, PROMPT_ORDERS[0]) for pairing in pairings]
    return examples, len({pairing.context for pairing in pairings})


def prepare(name: str, examples: list[Continuation], n_layer: int) -> Contender:
    if name == SHARED:
        return ours(examples, n_layer)
    if name == UNSHARED:
        return ours([whole(example) for example in examples], n_layer)
    return mambapy_step(examples[: int(name.split()[-1])], n_layer)


def whole(example: Continuation) -> Continuation:
    """The same example with nothing to share: its context is part of its prompt."""
    return Continuation((), [*example.prefix, *example.prompt], example.target)


def ours(examples: list[Continuation], n_layer: int) -> Contender:
    torch.manual_seed(0)
    model = PrefixSuffixLM(MambaLM(MambaConfig(VOCABULARY, WIDTH, n_layer)))
    model(**collate(examples[:1]))["loss"].backward()  # loads the kernels
    batch = collate(examples)
    tokens = int(batch["prefix_lengths"].sum() + batch["suffix_lengths"].sum())
    return Contender(stepper(model, lambda: model(**batch)["loss"]), len(examples), tokens)


def mambapy_step(examples: list[Continuation], n_layer: int) -> Contender:
    """Whole sequences, padded; the head only where there is loss, as in ours."""
    from mambapy.mamba import Mamba, MambaConfig

    torch.manual_seed(0)
    embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
    model = torch.nn.Sequential(embedding, Mamba(MambaConfig(WIDTH, n_layer)))
    sequences = [[*e.prefix, *e.prompt, *e.target] for e in examples]
    ids, lengths = right_pad(sequences)
    rows = torch.tensor([row for row, e in enumerate(examples) for _ in e.target])
    at = torch.tensor(
        [len(sequences[row]) - len(e.target) + i for row, e in enumerate(examples)
         for i in range(len(e.target))]
    )  # fmt: skip

    def loss() -> torch.Tensor:
        hidden = model(ids[:, :-1])
        return F.cross_entropy(hidden[rows, at - 1] @ embedding.weight.T, ids[rows, at])

    return Contender(stepper(model, loss), len(examples), int(lengths.sum()) - len(examples))


def stepper(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # the Trainer's default

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    run_script(main, parse_args)
