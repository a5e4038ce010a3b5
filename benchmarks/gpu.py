"""Everything of a GPU in one run: correctness first, then speed and memory beside the peers.

    python -m benchmarks.gpu --data rajpurkar/squad:train --tokenizer EleutherAI/gpt-neox-20b \\
        --json gpu.json
    python -m benchmarks.gpu --dry_run          # without a GPU: the same code on tiny shapes

Peers are mamba-ssm's MambaLMHeadModel and transformers' Mamba on the same kernels, where they are
installed. Training is bfloat16 autocast over float32 weights, forward, backward and AdamW; all else
is bfloat16. `of_limit` is the share of what this GPU reached in the same run: in training and
prefill of the speed of an 8192-wide bfloat16 product, counting real tokens' products only; in
decoding of the bandwidth of a copy, counting the weights and the states. Exit code 1 if a value in
the table of errors (parts of what is tolerated) is more than 1.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.bench_eval import sample
from benchmarks.bench_train import batch, num_tokens, whole
from benchmarks.gpu_models import MAMBA_SSM, TRANSFORMERS, Model
from benchmarks.gpu_parity import model_parity, parity
from benchmarks.timing import parse_benchmark_args, report, write_json
from context_qa.answering import Answerer
from errors import UserError, positive_int, run_script
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.selective_scan import has_mamba_ssm, load_backend
from squad_utils import prompt_parts, read_examples

EMBEDDED = "data/demo/train.jsonl"
N = 16  # Mamba's d_state
PATIENCE = 3.0  # seconds of a contender, warming up left out


@dataclass(frozen=True)
class Sizes:
    models: dict[str, tuple[int, int, int]]  # d_model, layers, examples of a training step
    scans: tuple[tuple[int, int, int], ...]  # rows, length, d
    parity: tuple[tuple[int, ...], int]  # lengths, d
    prefills: tuple[tuple[int, int], ...]  # rows, length
    decodes: tuple[int, ...]  # rows
    prompt: int
    new_tokens: int
    passages: int
    product: int


FULL = Sizes(
    models={"130m": (768, 24, 128), "790m": (1536, 48, 64)},
    scans=((8, 160, 1536), (64, 25, 1536), (4, 2048, 1536)),
    parity=((1, 3, 63, 130), 136),
    prefills=((1, 2048), (16, 512)),
    decodes=(1, 64),
    prompt=160,
    new_tokens=128,
    passages=400,
    product=8192,
)
DRY = Sizes(
    models={"tiny": (16, 2, 4)},
    scans=((2, 9, 16),),
    parity=((1, 9), 8),
    prefills=((2, 5),),
    decodes=(2,),
    prompt=3,
    new_tokens=5,
    passages=1,
    product=64,
)


@dataclass(frozen=True)
class Work:
    """A call: how many items it handles, the products' FLOP and the bytes that it must move."""

    call: Callable[[], object]
    items: int = 1
    flop: float = 0.0
    bytes: float = 0.0


def parse_args():
    parser = parse_benchmark_args(__doc__, EMBEDDED, quick=False)
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--rounds", type=positive_int, default=7, help="at most (default: 7)")
    return parser.parse_args()


def main(args) -> None:
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton has been imported, and looks then whether its kernels are to be interpreted.
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU here; --dry_run needs none")
    gpu = GPU(args.dry_run, args.rounds)
    print(f"GPU: {gpu.name}")
    errors = [
        *parity(gpu.ways, gpu.device, *gpu.sizes.parity),
        *model_parity(gpu.backends, gpu.device, chosen),
    ]
    report("errors, as parts of what is tolerated", errors, None)
    rows = [*scans(gpu), *prefills(gpu), *generations(gpu)]
    rows += [*training(gpu, args.data, args.tokenizer), *answering(gpu, args.data, args.tokenizer)]
    report("speed", rows, None)
    if args.json is not None:
        write_json(args.json, {"device": gpu.name, "errors": errors, "speed": rows})
    if not all(row["ok"] for row in errors):
        print("\nNOT CORRECT: see the first table", file=sys.stderr)
        sys.exit(1)


class GPU:
    """The device, what is to be measured on it, and how."""

    def __init__(self, dry_run: bool, rounds: int):
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.name = "none, a dry run" if dry_run else torch.cuda.get_device_name()
        self.sizes, self.rounds = (DRY, 2) if dry_run else (FULL, rounds)
        self.peers = [TRANSFORMERS]
        # Ways through a scan: a backend, and what to set in it.
        self.ways = {"triton": ("triton", {})}
        if not has_mamba_ssm():
            print("mamba-ssm: not installed, left out; see requirements-cuda.txt", file=sys.stderr)
        else:
            self.peers.insert(0, MAMBA_SSM)
            by_steps, linear = ("cuda", {"WAY_IN": "steps"}), ("cuda", {"WAY_IN": "linear"})
            self.ways = {"cuda": by_steps, "cuda, in by linear": linear} | self.ways
        self.scan_backends = list(dict.fromkeys(backend for backend, _ in self.ways.values()))
        # Triton's interpreter is too slow for whole models.
        self.backends = ["cpu"] if dry_run else self.scan_backends

    def rows(self, title: str, contenders: dict[str, Callable[[], Work]]) -> Iterator[dict]:
        """One after the other, each made, timed and thrown away; ratios are to the first."""
        base = None
        for name, prepare in contenders.items():
            row = {"name": f"{title}: {name}", "seconds": None, "ratio": None, "items/s": None,
                   "of_limit": None, "peak_GB": None}  # fmt: skip
            try:
                work = prepare()
                seconds, peak = self.measure(work.call)
            except torch.OutOfMemoryError:
                row["name"] += " (out of memory)"
            else:
                base = seconds if base is None else base
                least = work.flop / self.flop_rate + work.bytes / self.byte_rate
                row |= {"seconds": seconds, "ratio": seconds / base, "peak_GB": peak / 1e9}
                row |= {"items/s": work.items / seconds, "of_limit": least / seconds or None}
            work = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            yield row

    def measure(self, call: Callable[[], object]) -> tuple[float, int]:
        """Median seconds of a call and the bytes on the GPU at its peak."""
        is_gpu = self.device.type == "cuda"
        wait = torch.cuda.synchronize if is_gpu else lambda: None
        for _ in range(2):
            call()
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        while len(seconds) < 2 or (len(seconds) < self.rounds and sum(seconds) < PATIENCE):
            wait()
            started = time.perf_counter()
            call()
            wait()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), torch.cuda.max_memory_allocated() if is_gpu else 0

    @functools.cached_property
    def flop_rate(self) -> float:
        """Of a bfloat16 product, FLOP a second."""
        size = self.sizes.product
        a, b = torch.randn(2, size, size, device=self.device).to(torch.bfloat16)
        return 2 * size**3 / self.measure(lambda: a @ b)[0]

    @functools.cached_property
    def byte_rate(self) -> float:
        """Of a copy, bytes read and written a second."""
        a = torch.zeros(16 * self.sizes.product**2, device=self.device, dtype=torch.uint8)
        b = torch.empty_like(a)
        return 2 * len(a) / self.measure(lambda: b.copy_(a))[0]

    def on(self, backend: str, prepare: Callable[[], Work]) -> Callable[[], Work]:
        """The same work with the scan of a backend."""

        def prepared() -> Work:
            with chosen(backend):
                work = prepare()

            def call() -> None:
                with chosen(backend):
                    work.call()

            return Work(call, work.items, work.flop, work.bytes)

        return prepared


@contextmanager
def chosen(backend: str):
    os.environ["MAMBA_SCAN_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["MAMBA_SCAN_BACKEND"]


def scans(gpu: GPU) -> Iterator[dict]:
    """The scan alone, forward and backward; items are tokens."""
    for shape in gpu.sizes.scans:
        alone = {
            backend: functools.partial(scan, gpu, backend, {}, *shape, state=False)
            for backend in gpu.scan_backends
        }
        yield from gpu.rows(f"scan of {shape}, no state", alone)
        with_states = {
            name: functools.partial(scan, gpu, *way, *shape, state=True)
            for name, way in gpu.ways.items()
        }
        yield from gpu.rows(f"scan of {shape}, states in and out", with_states)


def scan(gpu: GPU, backend: str, settings: dict, b: int, l: int, d: int, state: bool) -> Work:
    module = load_backend(backend)

    def random(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=gpu.device).to(dtype)

    x, z = random(b, l, 2 * d).chunk(2, dim=2)
    B, C = random(b, l, 2 * N).chunk(2, dim=2)
    delta, A = F.softplus(random(b, l, d) - 2), -torch.exp(random(d, N, dtype=torch.float32))
    D, h0 = random(d, dtype=torch.float32), random(b, N, d, dtype=torch.float32)
    inputs = [v.requires_grad_() for v in (x, delta, A, B, C, D, z)]
    inputs.append(h0.requires_grad_() if state else None)

    def call() -> None:
        vars(module).update(settings)
        results = module.selective_scan(*inputs, return_state=state)
        results = [result for result in results if result is not None]
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])

    return Work(call, b * l)


def prefills(gpu: GPU) -> Iterator[dict]:
    """The backbone without gradients; items are tokens."""
    for name, (d_model, n_layer, _) in gpu.sizes.models.items():
        for rows, length in gpu.sizes.prefills:

            def prefill(model_name: str, shape=(d_model, n_layer), size=(rows, length)) -> Work:
                model = Model(model_name, *shape, gpu.device)
                tokens = size[0] * size[1]
                return Work(model.prefill(*size), tokens, tokens * model.product_flop())

            yield from gpu.rows(f"prefill {name}, {rows} x {length}", contenders(gpu, prefill))


def contenders(gpu: GPU, work: Callable[[str], Work]) -> dict[str, Callable[[], Work]]:
    """Of the peers, and of ours with each backend; `work` takes a model's name."""
    found = {peer: functools.partial(work, peer) for peer in gpu.peers}
    ours = functools.partial(work, "ours")
    return found | {f"ours, {backend}": gpu.on(backend, ours) for backend in gpu.backends}


def generations(gpu: GPU) -> Iterator[dict]:
    """A prompt is read and continued; items are new tokens."""
    new = gpu.sizes.new_tokens
    for name, (d_model, n_layer, _) in gpu.sizes.models.items():
        for rows in gpu.sizes.decodes:

            def work(model_name: str, shape=(d_model, n_layer), rows=rows) -> Work:
                model = Model(model_name, *shape, gpu.device)
                call = model.generation(rows, gpu.sizes.prompt, new)
                d, n_layer = 2 * shape[0], shape[1]
                states = 2 * rows * n_layer * d * (4 * N + 2 * 3)  # read and written
                return Work(call, rows * new, bytes=new * (model.weight_bytes() + states))

            yield from gpu.rows(f"decode {name}, {rows} rows", contenders(gpu, work))


def training(gpu: GPU, data: str, tokenizer: str) -> Iterator[dict]:
    """Optimiser steps on questions with contexts; items are examples."""
    for name, (d_model, n_layer, batch_size) in gpu.sizes.models.items():
        examples, contexts = batch(data, tokenizer, batch_size)

        def work(
            model_name: str, forked=False, shape=(d_model, n_layer), examples=examples
        ) -> Work:
            model = Model(model_name, *shape, gpu.device)
            tokens = num_tokens(examples if forked else map(whole, examples))
            step = model.training_step(examples, forked)
            return Work(step, len(examples), 3 * tokens * model.product_flop())

        forked = {
            f"ours, {backend}, forked": gpu.on(backend, functools.partial(work, "ours", True))
            for backend in gpu.backends
        }
        title = f"train {name}, {len(examples)} examples on {contexts} contexts"
        yield from gpu.rows(title, contenders(gpu, work) | forked)


def answering(gpu: GPU, data: str, tokenizer_name: str) -> Iterator[dict]:
    """Questions answered as the evaluation does, each with its score of "I don't know."; items are
    questions."""
    tokenizer = load_tokenizer("", tokenizer_name)
    passages = sample(read_examples(data), gpu.sizes.passages)
    prompts = [prompt_parts(e.context, e.question) for passage in passages for e in passage]
    whole_prompts = [("", prefix + suffix) for prefix, suffix in prompts]
    new = min(gpu.sizes.new_tokens, 16)
    for name, (d_model, n_layer, _) in gpu.sizes.models.items():

        def work(prompts: list, shape=(d_model, n_layer)) -> Work:
            model = Model("ours", *shape, gpu.device)
            answerer = Answerer(model.for_inference(), tokenizer, new, 1 << 16)
            answerer.stop_ids = set()
            return Work(lambda: list(answerer.answer(prompts)), len(prompts))

        ways = {"unforked": whole_prompts, "forked": prompts}
        yield from gpu.rows(
            f"answer {name}, {len(prompts)} questions on {len(passages)} contexts",
            {
                f"ours, {backend}, {way}": gpu.on(backend, functools.partial(work, given))
                for backend in gpu.backends
                for way, given in ways.items()
            },
        )


if __name__ == "__main__":
    run_script(main, parse_args)
