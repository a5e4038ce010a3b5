"""Answering questions, several on each passage, beside peers on the same weights.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.bench_eval --data rajpurkar/squad:validation     # mamba-130m's shape
    python -m benchmarks.bench_eval --quick                               # embedded data, 4 layers

Random weights, greedy decoding, --max_new_tokens each, stops ignored. Passages are a seeded sample
with all their questions. `seconds` is a question's; `ratio` is to ours, shared. Ours also scores
"I don't know." after every question, which the peers do not. A peer that is slow answers only the
first questions of the sample.
"""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.timing import Contender, installed, parse_benchmark_args, report, rows_per_item
from context_qa.answering import Answerer
from context_qa.dataset import token_ids
from errors import positive_int, run_script
from mamba_lm.checkpoint import load_tokenizer, save_model
from mamba_lm.model import MambaConfig, MambaLM
from squad_utils import Example, prompt_parts, read_examples

EMBEDDED = "data/demo/validation.jsonl"
VOCABULARY, WIDTH = 50277, 768
SHARED = "ours, shared"


def parse_args():
    parser = parse_benchmark_args(__doc__)
    parser.add_argument("--data", default=EMBEDDED, help=f"default: {EMBEDDED}")
    parser.add_argument("--tokenizer", default="data/demo/tokenizer", help="default: the demo's")
    parser.add_argument("--n_layer", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--passages", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--max_new_tokens", type=positive_int, default=16, help="default: 16")
    parser.add_argument("--rounds", type=positive_int, default=3, help="default: 3")
    return parser.parse_args()


def main(args) -> None:
    if args.quick:
        args.n_layer, args.passages, args.rounds = 2, 4, 1
    torch.manual_seed(0)
    tokenizer = load_tokenizer("", args.tokenizer)
    model = MambaLM(MambaConfig(VOCABULARY, WIDTH, args.n_layer)).eval()
    passages = sample(read_examples(args.data), args.passages)
    with tempfile.TemporaryDirectory() as folder:
        contenders = ours(model, tokenizer, passages, args.max_new_tokens)
        contenders |= theirs(model, tokenizer, passages, args, Path(folder))
        rows = rows_per_item(contenders, SHARED, args.rounds, patience=45)
    questions = sum(map(len, passages))
    report(
        f"{len(passages)} passages with {questions / len(passages):.1f} questions each, "
        f"d_model {WIDTH}, {args.n_layer} layers, {args.max_new_tokens} new tokens, float32",
        rows,
        args.json,
    )


def sample(examples: Sequence[Example], count: int) -> list[list[Example]]:
    """All questions of `count` passages, drawn by a fixed seed."""
    passages: dict[str, list[Example]] = {}
    for example in examples:
        passages.setdefault(example.context, []).append(example)
    return random.Random(0).sample(list(passages.values()), min(count, len(passages)))


def ours(model: MambaLM, tokenizer, passages, max_new_tokens: int) -> dict[str, Contender]:
    prompts = [prompt_parts(e.context, e.question) for passage in passages for e in passage]
    answerer = Answerer(model, tokenizer, max_new_tokens)
    answerer.stop_ids = set()

    def answer(prompts: list[tuple[str, str]]) -> None:
        for _ in answerer.answer(prompts):
            pass

    whole = [("", prefix + suffix) for prefix, suffix in prompts]
    suffixes = sum(len(token_ids(tokenizer, suffix)) for _, suffix in prompts)
    once = sum(len(token_ids(tokenizer, passage[0].context)) for passage in passages)
    each = sum(len(token_ids(tokenizer, prefix)) for prefix, _ in prompts)
    new = len(prompts) * max_new_tokens
    return {
        SHARED: Contender(lambda: answer(prompts), len(prompts), once + suffixes + new),
        "ours, unshared": Contender(lambda: answer(whole), len(prompts), each + suffixes + new),
    }


def theirs(model: MambaLM, tokenizer, passages, args, folder: Path) -> dict[str, Contender]:
    """Peers, each with as many whole passages, or batches, as it can do in minutes."""
    from transformers import AutoModelForCausalLM

    count = args.max_new_tokens
    prefixes = [token_ids(tokenizer, passage[0].context) for passage in passages]
    suffixes = [
        [token_ids(tokenizer, prompt_parts("", e.question)[1]) for e in passage]
        for passage in passages
    ]
    prompts = [
        prefix + suffix
        for prefix, of_passage in zip(prefixes, suffixes, strict=True)
        for suffix in of_passage
    ]

    save_model(model, folder / "transformers", tokenizer)
    peer = AutoModelForCausalLM.from_pretrained(folder / "transformers").eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        peer.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **settings)

    contenders = {}
    for size in (1, 8, 32):
        batch = sorted(prompts[:size], key=len)
        tokens = sum(map(len, batch)) + count * len(batch)
        name = f"transformers, batches of {size}"
        contenders[name] = Contender(lambda batch=batch: generate(batch), len(batch), tokens)

    if not installed("gguf", "llama_cpp"):
        return contenders
    from benchmarks.llama_cpp_peer import LlamaCpp, write_gguf

    write_gguf(model, folder / "model.gguf")
    llama = LlamaCpp(folder / "model.gguf")
    few = range(min(len(passages), 6))
    questions = sum(len(suffixes[place]) for place in few)

    def plain() -> None:
        for prompt in prompts[:questions]:
            llama.read(prompt)
            llama.decode(count)

    def shared() -> None:
        for place in few:
            llama.answer(prefixes[place], suffixes[place], count)

    new_and_asked = questions * count + sum(len(ids) for place in few for ids in suffixes[place])
    once = sum(len(prefixes[place]) for place in few)
    contenders["llama.cpp"] = Contender(
        plain, questions, sum(map(len, prompts[:questions])) + questions * count
    )
    contenders["llama.cpp, prefix state kept"] = Contender(shared, questions, once + new_and_asked)
    return contenders


if __name__ == "__main__":
    run_script(main, parse_args)
