"""Memory of training: expected by a formula for all shapes, measured for the small ones.

    python -m benchmarks.bench_memory                       # the shapes in models/configs

Expected: weights, gradients and AdamW's two moments take 16 bytes a parameter in float32. For its
gradients, a layer saves of each token that it reads:

    its input and the norm's output (2 m), both halves of in_proj's output (2 d), the convolution's
    output, Δ and out_proj's input (3 d), x_proj's output (r + 2 n), a state every 32 tokens
    (n d / 32)

and of each row, context or question, a state before and one after (2 n d). With activation
checkpointing it saves only its input (m, and n d of a row), and the rest for one layer at a time.
m, d, n, r are d_model, d_inner, d_state, dt_rank; numbers are float32.

Measured: what autograd saves for a batch of eight contexts of 160 tokens with five questions of 25
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
        "expected: gradients and AdamW's moments; activations",
        [expected_memory(*c) for c in configs.items()],
        None,
    )
    rows = [
        row
        for name, config in configs.items()
        if config.d_model <= WIDEST
        for row in measured_memory(name, config)
    ]
    report(f"saved for gradients by a layer, of {TOKENS:,} tokens in {ROWS} rows", rows, args.json)


def expected_memory(name: str, config: MambaConfig) -> dict:
    parameters = num_parameters(config)
    per_token = [
        expected_bytes(config, 1, 0, again) * config.n_layer / 1e6 for again in (False, True)
    ]
    batch = [
        expected_bytes(config, TOKENS, ROWS, again) * config.n_layer / 1e9
        for again in (False, True)
    ]
    return {
        "shape": name,
        "M parameters": parameters / 1e6,
        "GB weights": FLOAT * parameters / 1e9,
        "GB + AdamW": 4 * FLOAT * parameters / 1e9,
        "MB a token": per_token[0],
        "checkpointed": per_token[1],
        "GB a batch": batch[0],
        "checkpointed ": batch[1] + expected_bytes(config, TOKENS, ROWS) / 1e9,
    }


def expected_bytes(config: MambaConfig, tokens: int, rows: int, recomputed: bool = False) -> float:
    """Bytes that a layer saves for its gradients, by the formula."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    if recomputed:
        return FLOAT * (tokens * m + rows * n * d)
    of_token = 2 * m + 2 * d + 3 * d + (r + 2 * n) + n * d / STATE_EVERY
    return FLOAT * (tokens * of_token + rows * 2 * n * d)


def num_parameters(config: MambaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MambaLM(config).parameters())


def measured_memory(name: str, config: MambaConfig) -> Iterator[dict]:
    """What the second of two layers adds: the first saves no state before it."""
    for recomputed in (False, True):
        one, two = (saved_bytes(config, layers, recomputed) for layers in (1, 2))
        expected = expected_bytes(config, TOKENS, ROWS, recomputed)
        yield {
            "shape": f"{name}{', checkpointed' if recomputed else ''}",
            "MB measured": (two - one) / 1e6,
            "MB expected": expected / 1e6,
            "ratio": (two - one) / expected,
        }


def saved_bytes(config: MambaConfig, n_layer: int, recomputed: bool) -> int:
    """Bytes that autograd saves for the batch, without weights, by a model of n_layer layers."""
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
    assert loss.requires_grad  # alive until here, and with it all saved tensors
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
