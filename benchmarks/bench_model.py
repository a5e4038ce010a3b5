"""The backbone, forward and forward + backward, beside its peers and its matrix products alone.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.bench_model            # mamba-130m's width, batch 4, length 256
    python -m benchmarks.bench_model --quick

Ratios are to torch's matrix products alone, below which no implementation on the same products can
come; the products alone by what our layers take are a row as well. Each contender runs in a process
of its own; memory is what its first pass adds at the peak. transformers' default path runs on one
layer and its time is multiplied, its memory is not.
"""

from common.script import run_script

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.timing import (
    Contender,
    Worker,
    alternate,
    installed,
    parse_benchmark_args,
    ratio,
    report,
)
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.selective_scan import linear

VOCABULARY = 1000
FLOOR, OUR_FLOOR = "torch's products", "our products"
OURS, MAMBAPY, TRANSFORMERS = "ours", "mambapy", "transformers"
PASSES = ("forward", "forward + backward")


def parse_args():
    parser = parse_benchmark_args(__doc__)
    parser.add_argument("--d_model", type=int, default=768, help="default: 768, mamba-130m's")
    parser.add_argument("--batch", type=int, default=4, help="rows (default: 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default: 256)")
    parser.add_argument("--n_layer", type=int, default=2, help="default: 2")
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    return parser.parse_args()


def main(args) -> None:
    if args.quick:
        args.batch, args.length, args.n_layer, args.rounds = 2, 64, 1, 5
    shape = (args.d_model, args.batch, args.length)
    layers = {FLOOR: args.n_layer, OUR_FLOOR: args.n_layer, OURS: args.n_layer, TRANSFORMERS: 1}
    if installed("mambapy"):
        layers[MAMBAPY] = args.n_layer
    rows = []
    for backward in (False, True):
        workers = {name: Worker(prepare, name, layers[name], *shape, backward) for name in layers}
        memory = {name: worker.peak_growth() for name, worker in workers.items()}  # first calls
        measured = alternate(workers, args.rounds)
        seconds = {
            name: [value * args.n_layer / layers[name] for value in values]
            for name, values in measured.items()
        }
        rows += [
            {
                "name": f"{name}, {PASSES[backward]}",
                "seconds": statistics.median(values),
                "ratio": ratio(values, seconds[FLOOR]),
                "memory_MB": memory[name] / 1e6,
                "layers": layers[name],
            }
            for name, values in seconds.items()
        ]
    title = "d_model {}, batch {}, length {}".format(*shape)
    report(f"{title}, {args.n_layer} layers, float32", rows, args.json)


def prepare(
    name: str, n_layer: int, d_model: int, batch: int, length: int, backward: bool
) -> Contender:
    """A call of one pass, its weights and inputs made."""
    torch.manual_seed(0)
    config = MambaConfig(VOCABULARY, d_model, n_layer)
    if name in (FLOOR, OUR_FLOOR):
        matrices = products(config, batch * length)
        product = F.linear if name == FLOOR else linear
        product(torch.ones(1, 1), torch.ones(1, 1))  # loads the kernels
        return Contender(lambda: matrix_products(product, n_layer * matrices, backward))
    input_ids = torch.randint(VOCABULARY, (batch, length))
    if name == OURS:
        model = MambaLM(config)
        model.encode(input_ids[:1, :1])[0].sum().backward()  # loads the kernels
        return Contender(lambda: run(model, lambda: model.encode(input_ids)[0], backward))
    if name == MAMBAPY:
        import mambapy.mamba

        layers = mambapy.mamba.Mamba(mambapy.mamba.MambaConfig(d_model, n_layer))
        model = torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, d_model), layers)
        return Contender(lambda: run(model, lambda: model(input_ids), backward))
    import transformers

    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=d_model, num_hidden_layers=n_layer, use_cache=False
    )
    model = transformers.MambaModel(config)
    return Contender(lambda: run(model, lambda: model(input_ids).last_hidden_state, backward))


def run(model: torch.nn.Module, forward, backward: bool) -> None:
    model.zero_grad()  # else gradients would be added up, which a training step does not do
    with torch.set_grad_enabled(backward):
        output = forward()
    if backward:
        output.sum().backward()


def products(config: MambaConfig, tokens: int) -> list[tuple[torch.Tensor, ...]]:
    """Input, weight and output gradient of the four projections of a layer."""
    m, d, n, r = config.d_model, config.d_inner, config.d_state, config.dt_rank
    sizes = [(m, 2 * d), (d, r + 2 * n), (r, d), (d, m)]
    return [
        (torch.randn(tokens, k), torch.randn(out, k), torch.randn(tokens, out)) for k, out in sizes
    ]


def matrix_products(product: Callable, matrices: list, backward: bool) -> None:
    for x, weight, gradient in matrices:
        product(x, weight)
        if backward:
            product(gradient, weight.T)
            gradient.T @ x


if __name__ == "__main__":
    run_script(main, parse_args)
