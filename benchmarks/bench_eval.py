"""Answering questions, several on each passage, beside peers on the same weights.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.bench_eval --data rajpurkar/squad:validation     # mamba-130m's shape
    python -m benchmarks.bench_eval --quick                               # embedded data, 2 layers

Random weights, greedy decoding, --max_new_tokens each, stops ignored. Passages are a seeded sample
with all their questions, as many on average as in the data. `seconds` is per question; `ratio` is
to ours, shared. Ours also scores "I don't know." after every question, which the peers do not. A
slow peer answers only some questions of the sample, of its middle lengths.
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
from benchmarks.workloads import VALIDATION, VOCABULARY, WIDTH, sample_passages
from common.command_line import positive_int
from context_qa.answering import Answerer
from mamba_lm.checkpoint import load_tokenizer, save_model
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.tokenizer import token_ids
from squad_utils import Example, prompt_parts, read_examples

SHARED, UNSHARED, TRANSFORMERS = "ours, shared", "ours, unshared", "transformers, batches"
LLAMA, LLAMA_SHARED = "llama.cpp", "llama.cpp, saved prefix state"


def parse_args():
    parser = parse_benchmark_args(__doc__, VALIDATION)
    parser.add_argument("--n_layer", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--passages", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--max_new_tokens", type=positive_int, default=16, help="default: 16")
    parser.add_argument("--rounds", type=positive_int, default=3, help="default: 3")
    return parser.parse_args()


def main(args) -> None:
    if args.quick:
        args.n_layer, args.passages, args.rounds = 2, 4, 1
    passages = sample_passages(read_examples(args.data), args.passages)
    sizes = (8,) if args.quick else (1, 8, 32)
    names = [SHARED, UNSHARED, *(f"{TRANSFORMERS} of {size}" for size in sizes)]
    if installed("gguf", "llama_cpp"):
        names += [LLAMA_SHARED] if args.quick else [LLAMA, LLAMA_SHARED]
    workers = {
        name: Worker(prepare, name, passages, args.tokenizer, args.n_layer, args.max_new_tokens)
        for name in names
    }
    questions = sum(map(len, passages))
    report(
        f"{len(passages)} passages with {questions / len(passages):.1f} questions each, "
        f"d_model {WIDTH}, {args.n_layer} layers, {args.max_new_tokens} new tokens, float32",
        rows_per_item(workers, SHARED, args.rounds, patience=90),
        args.json,
    )


def prepare(
    name: str, passages: list[list[Example]], tokenizer: str, n_layer: int, max_new_tokens: int
) -> Contender:
    """A contender with the same random weights as all others."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("", tokenizer)
    model = MambaLM(MambaConfig(VOCABULARY, WIDTH, n_layer)).eval()
    if name in (SHARED, UNSHARED):
        return ours(model, tokenizer, passages, max_new_tokens, name == SHARED)
    if name.startswith(TRANSFORMERS):
        return transformers(model, tokenizer, passages, max_new_tokens, int(name.split()[-1]))
    return llama_cpp(model, tokenizer, passages, max_new_tokens, name == LLAMA_SHARED)


def tokens_of(tokenizer, passages) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Token ids of each passage, and of each of its questions as it follows in the prompt."""
    prefixes = [token_ids(tokenizer, passage[0].context) for passage in passages]
    suffixes = [
        [token_ids(tokenizer, prompt_parts("", e.question)[1]) for e in passage]
        for passage in passages
    ]
    return prefixes, suffixes


def num_tokens(prefixes, suffixes, new: int, shared: bool) -> int:
    """Read or generated; a shared prefix is read once."""
    return sum(
        len(prefix) * (1 if shared else len(of_prefix)) + sum(len(s) + new for s in of_prefix)
        for prefix, of_prefix in zip(prefixes, suffixes, strict=True)
    )


def ours(model: MambaLM, tokenizer, passages, new: int, shared: bool) -> Contender:
    prompts = [prompt_parts(e.context, e.question) for passage in passages for e in passage]
    if not shared:
        prompts = [("", prefix + suffix) for prefix, suffix in prompts]
    answerer = Answerer(model, tokenizer, new)
    answerer.stop_ids = set()
    list(answerer.answer(prompts[:1]))  # loads the kernels
    tokens = num_tokens(*tokens_of(tokenizer, passages), new, shared)
    return Contender(lambda: list(answerer.answer(prompts)), len(prompts), tokens)


def transformers(model: MambaLM, tokenizer, passages, new: int, batch_size: int) -> Contender:
    """`generate` on a batch of prompts with left padding and a mask. Their lengths are near the
    sample's median, so that there is little padding."""
    from transformers import AutoModelForCausalLM

    prefixes, suffixes = tokens_of(tokenizer, passages)
    prompts = [p + s for p, of in zip(prefixes, suffixes, strict=True) for s in of]
    first = max((len(prompts) - batch_size) // 2, 0)
    prompts = sorted(prompts, key=len)[first : first + batch_size]
    longest = max(map(len, prompts))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in prompts]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/model", tokenizer)
        peer = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def generate() -> None:
        peer.generate(**inputs, **settings)

    return Contender(generate, len(prompts), sum(map(len, prompts)) + new * len(prompts))


def llama_cpp(model: MambaLM, tokenizer, passages, new: int, shared: bool) -> Contender:
    """Six passages, whose lengths are evenly spread over the sample's. llama.cpp can save the state
    of a prefix."""
    from benchmarks.llama_cpp_peer import LlamaCpp, write_gguf

    passages = sorted(passages, key=lambda passage: len(passage[0].context))
    count = min(6, len(passages))
    passages = [passages[(2 * i + 1) * len(passages) // (2 * count)] for i in range(count)]
    prefixes, suffixes = tokens_of(tokenizer, passages)
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(model, Path(folder) / "model.gguf")
        peer = LlamaCpp(Path(folder) / "model.gguf")

    def answer() -> None:
        for prefix, of_prefix in zip(prefixes, suffixes, strict=True):
            if shared:
                peer.answer(prefix, of_prefix, new)
                continue
            for suffix in of_prefix:
                peer.read(prefix + suffix)
                peer.decode(new)

    tokens = num_tokens(prefixes, suffixes, new, shared)
    return Contender(answer, sum(map(len, suffixes)), tokens)


if __name__ == "__main__":
    run_script(main, parse_args)
