"""One stream decoded token by token, beside llama.cpp and beside reading the weights alone.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.bench_decode           # mamba-130m's shape
    python -m benchmarks.bench_decode --quick

Every token needs every weight once, so that the memory's bandwidth is the limit: ratios are to
torch's sum over as many bytes, in the same round. Random weights, in float32 and in bfloat16.
"""

from common.script import run_script

import tempfile
from pathlib import Path

import torch

from benchmarks.timing import (
    Contender,
    Worker,
    installed,
    parse_benchmark_args,
    report,
    rows_per_item,
)
from benchmarks.workloads import VOCABULARY, WIDTH
from common.command_line import positive_int
from mamba_lm.device import DTYPES
from mamba_lm.generate import decode, read
from mamba_lm.models.mamba import MambaConfig, MambaLM

READING, OURS, LLAMA = "weights read once", "ours", "llama.cpp"
PROMPT = list(range(100, 260))


def parse_args():
    parser = parse_benchmark_args(__doc__)
    parser.add_argument("--n_layer", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--max_new_tokens", type=positive_int, default=32, help="default: 32")
    parser.add_argument("--rounds", type=positive_int, default=15, help="default: 15")
    return parser.parse_args()


def main(args) -> None:
    if args.quick:
        args.n_layer, args.max_new_tokens, args.rounds = 4, 16, 5
    names = [READING, OURS]
    if installed("gguf", "llama_cpp"):
        names.append(LLAMA)
    rows = []
    for dtype in DTYPES:
        workers = {
            f"{name}, {dtype}": Worker(prepare, name, dtype, args.n_layer, args.max_new_tokens)
            for name in names
        }
        rows += rows_per_item(workers, f"{READING}, {dtype}", args.rounds, patience=60)
    report(f"one stream, d_model {WIDTH}, {args.n_layer} layers", rows, args.json)


def prepare(name: str, dtype: str, n_layer: int, new: int) -> Contender:
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(VOCABULARY, WIDTH, n_layer)).eval().to(DTYPES[dtype])
    if name == READING:
        num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        weights = torch.ones(num_bytes // 4)
        return Contender(lambda: [weights.sum() for _ in range(new)], new, new)
    if name == OURS:
        with torch.inference_mode():
            reading = read(model, [PROMPT])
        return Contender(lambda: continue_reading(model, reading, new), new, new)
    from benchmarks.llama_cpp_peer import LlamaCpp, write_gguf

    with tempfile.TemporaryDirectory() as folder:
        write_gguf(model, Path(folder) / "model.gguf", DTYPES[dtype])
        peer = LlamaCpp(Path(folder) / "model.gguf")
    peer.read(PROMPT)
    return Contender(lambda: peer.decode(new), new, new)


@torch.inference_mode()
def continue_reading(model: MambaLM, reading, new: int):
    return decode(model, reading, set(), new)


if __name__ == "__main__":
    run_script(main, parse_args)
