"""Memory of training, on paper for every size and measured where it is small.

    python -m benchmarks.bench_memory                       # the shapes in models/configs

On paper: weights, gradients and AdamW's two moments are 16 bytes a parameter in float32, whatever
runs. A layer keeps, of each token that it reads, for its gradients:

    its input and what is normed (2 m), both halves of in_proj (2 d), what leaves the convolution, Δ
    and what goes into out_proj (3 d), x_proj's output (r + 2 n), a state in 32 tokens (n d / 32)

and of each row, context or question, a state before and one after (2 n d). With activation
checkpointing it keeps its input alone (m, and n d of a row), and one layer at a time the rest. m,
d, n, r are d_model, d_inner, d_state, dt_rank; numbers are float32.

Measured: what autograd keeps of a batch of eight contexts of 160 tokens with five questions of 25
tokens each, as SQuAD has them, by hooks on saved tensors, without the vocabulary's logits.
"""

from common.script import run_script

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.timing import parse_benchmark_args, report
from mamba_lm.checkpoint import read_config
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.training.prefix_suffix import Item, PrefixSuffixLM, collate

CONFIGS = Path("models/configs")
CONTEXTS, CONTEXT, QUESTIONS, QUESTION, ANSWER = 8, 160, 5, 20, 5
TOKENS = CONTEXTS * (CONTEXT + QUESTIONS * (QUESTION + ANSWER - 1))
ROWS = CONTEXTS * (1 + QUESTIONS)
WIDEST = 1024  # that is measured
FLOAT = 4  # bytes
STATE_EVERY = 32  # tokens


def parse_args():
    return parse_benchmark_args(__doc__, quick=False).parse_args()


def main(args) -> None:
    configs = {path.stem: read_config(path) for path in CONFIGS.glob("*.json")}
    configs = dict(sorted(configs.items(), key=lambda item: num_parameters(item[1])))
    report(
        "on paper: gradients and AdamW's moments; activations",
        [on_paper(*c) for c in configs.items()],
        None,
    )
    rows = [
        row
        for name, config in configs.items()
        if config.d_model <= WIDEST
        for row in measured(name, config)
    ]
    report(f"kept for gradients by a layer, of {TOKENS:,} tokens in {ROWS} rows", rows, args.json)


def on_paper(name: str, config: MambaConfig) -> dict:
    parameters = num_parameters(config)
    per_token = [kept(config, 1, 0, again) * config.n_layer / 1e6 for again in (False, True)]
    batch = [kept(config, TOKENS, ROWS, again) * config.n_layer / 1e9 for again in (False, True)]
    return {
        "shape": name,
        "M parameters": parameters / 1e6,
        "GB weights": FLOAT * parameters / 1e9,
        "GB + AdamW": 4 * FLOAT * parameters / 1e9,
        "MB a token": per_token[0],
        "checkpointed": per_token[1],
        "GB a batch": batch[0],
        "checkpointed ": batch[1] + kept(config, TOKENS, ROWS) / 1e9,
    }


def kept(config: MambaConfig, tokens: int, rows: int, recomputed: bool = False) -> float:
    """Bytes that a layer keeps for its gradients, by the formula."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    if recomputed:
        return FLOAT * (tokens * m + rows * n * d)
    of_token = 2 * m + 2 * d + 3 * d + (r + 2 * n) + n * d / STATE_EVERY
    return FLOAT * (tokens * of_token + rows * 2 * n * d)


def num_parameters(config: MambaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MambaLM(config).parameters())


def measured(name: str, config: MambaConfig) -> Iterator[dict]:
    """The difference that a layer makes: of two, since the first keeps no state before it."""
    for recomputed in (False, True):
        one, two = (saved_bytes(config, layers, recomputed) for layers in (1, 2))
        paper = kept(config, TOKENS, ROWS, recomputed)
        yield {
            "shape": f"{name}{', checkpointed' if recomputed else ''}",
            "MB measured": (two - one) / 1e6,
            "MB on paper": paper / 1e6,
            "ratio": (two - one) / paper,
        }


def saved_bytes(config: MambaConfig, n_layer: int, recomputed: bool) -> int:
    """What autograd keeps of the batch, but for weights, with so many of the layers."""
    torch.manual_seed(0)
    shape = vars(config) | {"n_layer": n_layer, "vocab_size": 64}
    model = PrefixSuffixLM(MambaLM(MambaConfig(**shape)))
    if recomputed:
        model.activation_checkpointing_enable()
    sizes: dict[int, int] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch())["loss"]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert loss.requires_grad  # alive until here, and with it all that was kept
    return sum(size for place, size in sizes.items() if place not in weights)


def batch() -> dict[str, torch.Tensor]:
    examples = [
        Item.with_target([1 + context % 9, *[3] * (CONTEXT - 1)], [4] * QUESTION, [5] * ANSWER)
        for context in range(CONTEXTS)
        for _ in range(QUESTIONS)
    ]
    return collate(examples)


if __name__ == "__main__":
    run_script(main, parse_args)
