"""All GPU measurements in one run: correctness first, then speed and memory beside the peers.

    python -m benchmarks.gpu --data rajpurkar/squad:train --tokenizer EleutherAI/gpt-neox-20b \\
        --json gpu.json
    python -m benchmarks.gpu --dry_run          # without a GPU: the same code on tiny shapes

Peers are mamba-ssm's MambaLMHeadModel and transformers' Mamba with the same kernels, if installed.
Training is bfloat16 autocast over float32 weights, forward, backward and AdamW; all else is
bfloat16. `of_limit` is the share of this GPU's limit, measured in the same run. For training and
prefill the limit is the speed of an 8192-wide bfloat16 product; only the products of real tokens
count. For decoding it is both that speed, for the prompt's products, and the memory bandwidth, for
the weights and states of each new token. Answering includes tokenising. `peak_GB` is the memory
that torch's allocator holds. Rows are printed and written one by one; nothing starts after
--minutes. Exit code 1 if an error exceeds its tolerance.
"""

from common.script import run_script

import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from benchmarks.gpu_models import MAMBA_SSM, TRANSFORMERS, Model
from benchmarks.gpu_parity import first_line, model_parity, parity
from benchmarks.timing import Contender, parse_benchmark_args, repeat, report
from benchmarks.workloads import TRAIN, num_tokens, sample_passages, training_batch, without_prefix
from common.atomic_files import write_atomically
from common.command_line import positive_float, positive_int
from common.errors import UserError
from common.json_text import json_text
from context_qa.answering import Answerer
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.selective_scan import load_backend
from mamba_lm.training.prefix_suffix import Item
from squad_utils import Example, prompt_parts, read_examples

N = 16  # Mamba's d_state
PATIENCE, SHORT = 3.0, 0.05  # seconds: of all rounds of a contender; of a round, at least


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
    models={"130m": (768, 24, 128), "790m": (1536, 48, 32)},
    scans=((8, 160, 1536), (64, 25, 1536), (4, 2048, 1536)),
    parity=((1, 3, 63, 130), 136),
    prefills=((1, 2048), (16, 512)),
    decodes=(1, 64),
    prompt=160,
    new_tokens=128,
    passages=150,
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


def parse_args():
    parser = parse_benchmark_args(__doc__, TRAIN, quick=False)
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--rounds", type=positive_int, default=7, help="at most (default: 7)")
    parser.add_argument(
        "--minutes", type=positive_float, default=7.5, help="nothing starts later (default: 7.5)"
    )
    return parser.parse_args()


def main(args) -> None:
    os.environ.pop("MAMBA_SCAN_BACKEND", None)  # each contender has its own
    if args.dry_run and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton has been imported, and looks then whether its kernels are to be interpreted.
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU here; --dry_run needs none")
    gpu = GPU(args.dry_run, args.rounds, args.minutes)
    batches = {  # before anything is measured: the data may not be there
        name: training_batch(args.data, args.tokenizer, size)
        for name, (_, _, size) in gpu.sizes.models.items()
    }
    passages = sample_passages(read_examples(args.data), gpu.sizes.passages)
    tokenizer = load_tokenizer("", args.tokenizer)
    print(f"GPU: {gpu.name}")
    found = {"device": gpu.name, "torch": torch.__version__, "errors": [], "speed": []}

    def keep(part: str, rows: Iterable[dict]) -> None:
        for row in rows:
            found[part].append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if args.json is not None:
                write_atomically(args.json, json_text(found, indent=2) + "\n")

    keep("errors", parity(gpu.scan_backends, gpu.device, *gpu.sizes.parity))
    keep("errors", model_parity(gpu.backends, gpu.device, chosen))
    keep("speed", scans(gpu))
    keep("speed", training(gpu, batches))
    keep("speed", generations(gpu))
    keep("speed", prefills(gpu))
    keep("speed", answering(gpu, passages, tokenizer))
    report("errors, as fractions of their tolerance", found["errors"], None)
    report("speed", found["speed"], None)
    if not all(row["ok"] for row in found["errors"]):
        print("\nNOT CORRECT: see the first table", file=sys.stderr)
        sys.exit(1)


class GPU:
    """The device, the contenders that run on it, and how they are timed."""

    def __init__(self, dry_run: bool, rounds: int, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.name = "none, a dry run" if dry_run else torch.cuda.get_device_name()
        self.sizes, self.rounds = (DRY, 2) if dry_run else (FULL, rounds)
        self.peers = [TRANSFORMERS]
        self.scan_backends = ["triton"]
        if _mamba_ssm_works():
            self.peers.insert(0, MAMBA_SSM)
            self.scan_backends.insert(0, "cuda")
        # Triton's interpreter is too slow for whole models.
        self.backends = ["cpu"] if dry_run else self.scan_backends

    def rows(self, title: str, contenders: dict[str, Callable[[], Contender]]) -> Iterator[dict]:
        """A row per contender. They are made, timed and deleted one after the other, since their
        weights do not fit into memory together. Ratios are to the first one that ran; one that
        fails is a row that says so."""
        base = None
        for name, prepare in contenders.items():
            row = {"name": f"{title}: {name}", "seconds": None, "ratio": None, "items/s": None,
                   "of_limit": None, "peak_GB": None}  # fmt: skip
            try:
                if time.monotonic() > self.deadline:
                    raise TimeoutError("no time left")
                work = prepare()
                seconds, peak = self.measure(work)
                base = seconds if base is None else base
                least = work.flop / self.flop_rate + work.num_bytes / self.byte_rate
                row |= {"seconds": seconds, "ratio": seconds / base, "peak_GB": peak / 1e9}
                row |= {"items/s": work.items / seconds, "of_limit": least / seconds or None}
            except Exception as error:
                row["name"] += f" ({first_line(error)})"
            yield row
            work = None
            gc.collect()  # the peers hold themselves in cycles
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

    def measure(self, contender: Contender) -> tuple[float, int]:
        """Median seconds of a call, and the bytes that torch's allocator holds at the peak."""
        seconds = repeat(contender, self.rounds, PATIENCE, SHORT)
        peak = torch.cuda.max_memory_reserved() if self.device.type == "cuda" else 0
        return statistics.median(seconds), peak

    @functools.cached_property
    def flop_rate(self) -> float:
        """Of a bfloat16 product, FLOP a second."""
        size = self.sizes.product
        a, b = torch.randn(2, size, size, device=self.device).to(torch.bfloat16)
        return 2 * size**3 / self.measure(Contender(lambda: a @ b))[0]

    @functools.cached_property
    def byte_rate(self) -> float:
        """Of a copy, bytes read and written a second."""
        a = torch.zeros(16 * self.sizes.product**2, device=self.device, dtype=torch.uint8)
        b = torch.empty_like(a)
        return 2 * len(a) / self.measure(Contender(lambda: b.copy_(a)))[0]

    def on(self, backend: str, prepare: Callable[[], Contender]) -> Callable[[], Contender]:
        """The same work with the scan of a backend."""

        def prepared() -> Contender:
            with chosen(backend):
                work = prepare()

            def call() -> None:
                with chosen(backend):
                    work.call()

            return replace(work, call=call)

        return prepared


def _mamba_ssm_works() -> bool:
    try:
        load_backend("cuda")
    except UserError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return False
    return True


@contextmanager
def chosen(backend: str) -> Iterator[None]:
    os.environ["MAMBA_SCAN_BACKEND"] = backend
    try:
        yield
    finally:
        del os.environ["MAMBA_SCAN_BACKEND"]


def scans(gpu: GPU) -> Iterator[dict]:
    """The scan alone, forward and backward; items are tokens."""
    for shape in gpu.sizes.scans:
        for title, state in (("no state", False), ("states in and out", True)):
            contenders = {
                backend: functools.partial(scan, gpu, backend, *shape, state=state)
                for backend in gpu.scan_backends
            }
            yield from gpu.rows(f"scan of {shape}, {title}", contenders)


def scan(gpu: GPU, backend: str, b: int, l: int, d: int, state: bool) -> Contender:
    def random(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, device=gpu.device).to(dtype)

    x, z = random(b, l, 2 * d).chunk(2, dim=2)
    B, C = random(b, l, 2 * N).chunk(2, dim=2)
    delta, A = F.softplus(random(b, l, d) - 2), -torch.exp(random(d, N, dtype=torch.float32))
    D, h0 = random(d, dtype=torch.float32), random(b, N, d, dtype=torch.float32)
    inputs = [v.requires_grad_() for v in (x, delta, A, B, C, D, z)]
    if state:
        inputs.append(h0.requires_grad_())
    gradients = [random(b, l, d), torch.ones_like(h0)][: 2 if state else 1]

    module = load_backend(backend)

    def call() -> None:
        results = module.selective_scan(*inputs, return_state=state)
        torch.autograd.grad(results[: len(gradients)], inputs, gradients)

    return Contender(call, b * l)


def prefills(gpu: GPU) -> Iterator[dict]:
    """The backbone without gradients; items are tokens."""
    for name, (d_model, n_layer, _) in gpu.sizes.models.items():
        for rows, length in gpu.sizes.prefills:

            def prefill(
                model_name: str, shape=(d_model, n_layer), size=(rows, length)
            ) -> Contender:
                model = Model(model_name, *shape, gpu.device)
                tokens = size[0] * size[1]
                flop = tokens * model.product_flop()
                return Contender(model.prefill(*size), tokens, flop=flop)

            yield from gpu.rows(f"prefill {name}, {rows} x {length}", contenders(gpu, prefill))


def contenders(gpu: GPU, work: Callable[[str], Contender]) -> dict[str, Callable[[], Contender]]:
    """Of the peers, and of ours with each backend; `work` takes a model's name."""
    found = {peer: functools.partial(work, peer) for peer in gpu.peers}
    ours = functools.partial(work, "ours")
    return found | {f"ours, {backend}": gpu.on(backend, ours) for backend in gpu.backends}


def generations(gpu: GPU) -> Iterator[dict]:
    """A prompt is read and continued; items are new tokens."""
    new = gpu.sizes.new_tokens
    for name, (d_model, n_layer, _) in gpu.sizes.models.items():
        for rows in gpu.sizes.decodes:

            def work(model_name: str, shape=(d_model, n_layer), rows=rows) -> Contender:
                model = Model(model_name, *shape, gpu.device)
                call = model.generation(rows, gpu.sizes.prompt, new)
                states = 2 * model.state_bytes(rows, 2 * shape[0], shape[1])  # read, written
                prompt = rows * gpu.sizes.prompt * model.product_flop()
                moved = new * (model.weight_bytes() + states)
                return Contender(call, rows * new, flop=prompt, num_bytes=moved)

            yield from gpu.rows(f"decode {name}, {rows} rows", contenders(gpu, work))


def training(gpu: GPU, batches: dict[str, tuple[list[Item], int]]) -> Iterator[dict]:
    """Optimiser steps on questions with contexts; items are examples."""
    for name, (d_model, n_layer, _) in gpu.sizes.models.items():
        examples, contexts = batches[name]

        def work(
            model_name: str, forked=False, shape=(d_model, n_layer), examples=examples
        ) -> Contender:
            model = Model(model_name, *shape, gpu.device)
            tokens = num_tokens(examples if forked else map(without_prefix, examples))
            step = model.training_step(examples, forked)
            flop = 3 * tokens * model.product_flop()
            return Contender(step, len(examples), flop=flop)

        forked = {
            f"ours, {backend}, forked": gpu.on(backend, functools.partial(work, "ours", True))
            for backend in gpu.backends
        }
        title = f"train {name}, {len(examples)} examples on {contexts} contexts"
        yield from gpu.rows(title, contenders(gpu, work) | forked)


def answering(gpu: GPU, passages: list[list[Example]], tokenizer) -> Iterator[dict]:
    """Questions answered as the evaluation does, each with its score of "I don't know."; items are
    questions."""
    prompts = [prompt_parts(e.context, e.question) for passage in passages for e in passage]
    whole_prompts = [("", prefix + suffix) for prefix, suffix in prompts]
    new = min(gpu.sizes.new_tokens, 16)
    for name, (d_model, n_layer, _) in gpu.sizes.models.items():

        def work(prompts: list, shape=(d_model, n_layer)) -> Contender:
            model = Model("ours", *shape, gpu.device)
            answerer = Answerer(model.for_inference(), tokenizer, new, 1 << 16)
            answerer.stop_ids = set()
            return Contender(lambda: list(answerer.answer(prompts)), len(prompts))

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
