"""Questions on one passage, as the console asks them: the first, the later ones, ten together.

    pip install -r requirements-benchmarks.txt
    python -m benchmarks.bench_console          # mamba-130m's shape, a passage of 2,000 tokens
    python -m benchmarks.bench_console --quick

Random weights, stops ignored. The time of the first question includes reading the passage; later
questions are asked one after the other. Ours also scores "I don't know." with every answer, which
the peers do not. llama.cpp can save the passage's state; transformers cannot and reads everything
again.
"""

from common.script import run_script

import contextlib
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
from benchmarks.workloads import VALIDATION, VOCABULARY, WIDTH
from common.command_line import positive_int
from common.errors import UserError
from context_qa.answering import Answerer
from context_qa.console.console import READ_AT_ONCE
from context_qa.console.streamed_answer import stream_answer
from mamba_lm.checkpoint import load_tokenizer, save_model
from mamba_lm.generate import decode, read
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.models.state import MambaState
from mamba_lm.tokenizer import token_ids
from squad_utils import prompt_parts, read_examples

FIRST, LATER = "first token of the first question", "first token of a later one"
ONE, ALL, REREAD = "one question", "all questions", "all questions, the context read for each"


def parse_args():
    parser = parse_benchmark_args(__doc__, VALIDATION)
    parser.add_argument("--n_layer", type=positive_int, default=24, help="default: 24")
    parser.add_argument("--tokens", type=positive_int, default=2000, help="default: 2000")
    parser.add_argument("--questions", type=positive_int, default=10, help="default: 10")
    parser.add_argument("--max_new_tokens", type=positive_int, default=4, help="default: 4")
    parser.add_argument("--rounds", type=positive_int, default=5, help="default: 5")
    return parser.parse_args()


def main(args) -> None:
    if args.quick:
        args.n_layer, args.tokens, args.rounds = 2, 500, 2
    passage, questions = passage_and_questions(args)
    settings = (passage, questions, args.tokenizer, args.n_layer, args.max_new_tokens)
    names = [f"ours: {task}" for task in (FIRST, LATER, ONE, ALL, REREAD)]
    if installed("gguf", "llama_cpp"):
        names += [f"llama.cpp: {task}" for task in (FIRST, LATER, ONE, ALL)]
    names.append(f"transformers: {ONE}")
    workers = {name: Worker(prepare, *name.split(": "), *settings) for name in names}
    report(
        f"{args.questions} questions of {args.max_new_tokens} new tokens on {args.tokens} tokens, "
        f"d_model {WIDTH}, {args.n_layer} layers, float32",
        rows_per_item(workers, f"ours: {ONE}", args.rounds, patience=40),
        args.json,
    )
    compare(*settings)


def passage_and_questions(args) -> tuple[str, list[str]]:
    """A passage of args.tokens tokens, joined from the data's contexts, and questions."""
    examples = read_examples(args.data)
    tokenizer = load_tokenizer("", args.tokenizer)
    text = "\n".join(dict.fromkeys(example.context for example in examples[:2000]))
    ids = token_ids(tokenizer, text)
    if len(ids) < args.tokens or len(examples) < args.questions:
        raise UserError(f"{args.data}: too little for --tokens and --questions")
    passage = tokenizer.decode(ids[: args.tokens]).strip()
    return passage, [example.question for example in examples[: args.questions]]


def load_tokenizer_and_model(tokenizer_name: str, n_layer: int) -> tuple:
    """The model has the same random weights in every process."""
    torch.manual_seed(0)
    return load_tokenizer("", tokenizer_name), MambaLM(
        MambaConfig(VOCABULARY, WIDTH, n_layer)
    ).eval()


def prepare(
    name: str, task: str, passage: str, questions: list[str], tokenizer: str, n_layer: int, new: int
) -> Contender:
    tokenizer, model = load_tokenizer_and_model(tokenizer, n_layer)
    questions = {ALL: questions, REREAD: questions, LATER: questions[1:]}.get(task, questions[:1])
    makers = {"ours": ours, "llama.cpp": llama_cpp, "transformers": transformers}
    return makers[name](task, model, tokenizer, passage, questions, new)


def suffixes_of(questions: list[str]) -> list[str]:
    return [prompt_parts("", question)[1] for question in questions]


class _FirstTextShown(Exception):
    pass


def stop_at_first_text(text: str) -> None:
    raise _FirstTextShown


def answerer_of(model: MambaLM, tokenizer, new: int) -> Answerer:
    answerer = Answerer(model, tokenizer, new, READ_AT_ONCE)
    answerer.stop_ids = set()
    return answerer


def ours(task: str, model: MambaLM, tokenizer, passage: str, questions, new: int) -> Contender:
    answerer = answerer_of(model, tokenizer, new)
    suffixes = suffixes_of(questions)

    def read_passage() -> tuple[MambaState, int]:
        ids = answerer.tokens.encode([passage])
        return answerer.read_prefixes(ids), len(ids[0])

    first_reading = read_passage()

    def ask(suffix: str, reading: tuple[MambaState, int], **show) -> None:
        state, length = reading
        [ids] = answerer.tokens.encode([suffix])
        with contextlib.suppress(_FirstTextShown):
            stream_answer(answerer, state, ids, length, **show)

    def call() -> None:
        show = {"show": stop_at_first_text} if task in (FIRST, LATER) else {}
        reading = first_reading if task == LATER else read_passage()
        for place, suffix in enumerate(suffixes):
            if place > 0 and task == REREAD:
                reading = read_passage()
            ask(suffix, reading, **show)

    return Contender(call, len(suffixes) if task == LATER else 1)


def llama_cpp(task: str, model: MambaLM, tokenizer, passage: str, questions, new: int) -> Contender:
    from benchmarks.llama_cpp_peer import LlamaCpp, write_gguf

    with tempfile.TemporaryDirectory() as folder:
        write_gguf(model, Path(folder) / "model.gguf")
        peer = LlamaCpp(Path(folder) / "model.gguf")
    prefix = token_ids(tokenizer, passage)
    suffixes = [token_ids(tokenizer, suffix) for suffix in suffixes_of(questions)]
    peer.read(prefix)
    state = peer.llm.save_state()

    def call() -> None:
        if task == LATER:
            for suffix in suffixes:
                peer.llm.load_state(state)
                peer.llm.eval(suffix)
                peer.logits().argmax()
        elif task == ALL:
            peer.answer(prefix, suffixes, new)
        else:
            peer.read(prefix + suffixes[0])
            peer.logits().argmax() if task == FIRST else peer.decode(new)

    return Contender(call, len(suffixes) if task == LATER else 1)


def transformers(
    task: str, model: MambaLM, tokenizer, passage: str, questions, new: int
) -> Contender:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/model", tokenizer)
        peer = AutoModelForCausalLM.from_pretrained(f"{folder}/model").eval()
    ids = token_ids(tokenizer, passage) + token_ids(tokenizer, suffixes_of(questions)[0])
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    @torch.inference_mode()
    def generate() -> None:
        peer.generate(torch.tensor([ids]), **settings)

    return Contender(generate)


@torch.inference_mode()
def compare(passage: str, questions: list[str], tokenizer: str, n_layer: int, new: int) -> None:
    """Print how many answers from the saved state equal those of whole prompts."""
    tokenizer, model = load_tokenizer_and_model(tokenizer, n_layer)
    prefix, equal, distance = token_ids(tokenizer, passage), 0, 0.0
    state = answerer_of(model, tokenizer, new).read_prefixes([prefix])
    for suffix in suffixes_of(questions):
        ids = token_ids(tokenizer, suffix)
        [forked] = decode(model, read(model, [ids], state), (), new)
        [whole] = decode(model, read(model, [prefix + ids]), (), new)
        equal += forked.token_ids == whole.token_ids
        distance = max(distance, abs(forked.log_prob - whole.log_prob))
    print(
        f"\n{equal} of {len(questions)} answers from the saved state equal those of whole prompts; "
        f"log-probabilities differ by {distance:.1e} at most"
    )


if __name__ == "__main__":
    run_script(main, parse_args)
