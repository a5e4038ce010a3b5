"""The demo's table of scores: a model beside what needs no model, on data/demo/validation.jsonl.

    python -m studies.demo_model.score_demo models/demo

Exact match on answerable and on unanswerable questions: first on passages of ten fresh seeds, which
no choice was made by; then on the file, the model's also by facts per passage. At the end, how many
negatives (--negatives) their contexts answer, by what the generator knows of them.
"""

from common.script import run_script

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.command_line import Parser, positive_int
from context_qa.answering import Answerer
from context_qa.negatives import NegativeSampler, make_negatives
from context_qa.results.metrics import mean_intervals
from mamba_lm.checkpoint import load_model, load_tokenizer
from squad_utils import NO_ANSWER, Example, exact_match, prompt_parts, read_examples
from studies.demo_model.domains import DOMAINS
from studies.demo_model.make_demo import NUM_VALIDATION_PASSAGES as NUM_PASSAGES
from studies.demo_model.make_demo import POOLS, validation_passages

DATA = "data/demo/validation.jsonl"
FIRST_FRESH_SEED = 101
HANDWRITTEN = "data/demo/handwritten.jsonl"  # passages of another kind, not by the generator


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a model trained on the demo data")
    about = f"passages of N other seeds, from {FIRST_FRESH_SEED} on (default: 10)"
    parser.add_argument("--seeds", type=positive_int, default=10, metavar="N", help=about)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    examples = read_examples(DATA)
    rows = [json.loads(line) for line in Path(DATA).read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer(args.model)
    answerer = Answerer(load_model(args.model), tokenizer, max_new_tokens=16)
    print_fresh_seeds(answerer, range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + args.seeds))
    guesses = answers(answerer, [(e.context, e.question) for e in examples])
    blind = answers(answerer, [("", e.question) for e in examples])

    nearest = [nearest_phrase(e, row["domain"]) for e, row in zip(examples, rows, strict=True)]

    print(f"{len(examples):4d} questions            answerable  unanswerable")
    print_row("model", examples, guesses)
    print_row("always I don't know.", examples, [NO_ANSWER] * len(examples))
    print_row("question without context", examples, blind)
    print_row("nearest same-type phrase", examples, nearest)

    answerable = [e for e in examples if e.is_answerable]
    contexts = NegativeSampler(examples).draw_contexts(epoch=0)
    swapped = [c for c, e in zip(contexts, examples, strict=True) if e.is_answerable]
    pairs = list(zip(swapped, (e.question for e in answerable), strict=True))
    print(f"contexts swapped: {score([()] * len(pairs), answers(answerer, pairs)):.1f} % abstain")

    handwritten = read_examples(HANDWRITTEN)
    said = answers(answerer, [(e.context, e.question) for e in handwritten])
    print_row(f"{len(handwritten)} handwritten questions", handwritten, said)

    print("\nfacts in passage  answerable  unanswerable  questions")
    by_facts = defaultdict(list)
    for example, guess, row in zip(examples, guesses, rows, strict=True):
        by_facts[row["num_facts"]].append((example, guess))
    for number in sorted(by_facts):
        group, said = zip(*by_facts[number], strict=True)
        print_row(f"{number:16d}", group, said, suffix=f"{len(group):9d}", width=16)

    passages = {passage.context: passage for passage, _ in validation_passages(NUM_PASSAGES)}
    print()
    for kind in ("random", "hard"):
        negatives = make_negatives(examples, kind)
        answered = [passages[c.context].answer_to(c.question) is not None for c in negatives]
        print(f"{kind} negatives that their context answers: {sum(answered)} of {len(negatives)}")


def print_fresh_seeds(answerer: Answerer, seeds: Sequence[int]) -> None:
    """The mean over all questions with its 95 % interval, a bootstrap over passages, and the scores
    of the best and the worst seed."""
    of_seed, of_passage = [], []
    for seed in seeds:
        for passage, rows in validation_passages(NUM_PASSAGES, seed):
            examples = [example_of(row) for row in rows]
            of_seed += [(seed, example) for example in examples]
            of_passage += [passage.context] * len(examples)
    guesses = answers(answerer, [(e.context, e.question) for _, e in of_seed])
    right = [exact_match(g, e.answers) for g, (_, e) in zip(guesses, of_seed, strict=True)]
    print(f"{len(of_seed):,} questions of {len(seeds)} fresh seeds, {seeds[0]} to {seeds[-1]}")
    for is_answerable in (True, False):
        kept = [n for n, (_, e) in enumerate(of_seed) if e.is_answerable == is_answerable]
        values = np.array([[100 * right[n] for n in kept]])
        [(low, high)] = mean_intervals(values, [of_passage[n] for n in kept])
        by_seed = [np.mean([100 * right[n] for n in kept if of_seed[n][0] == s]) for s in seeds]
        print(
            f"{'answerable' if is_answerable else 'unanswerable':24}{values.mean():12.1f} "
            f"(95 % interval {low:.1f}-{high:.1f}; seeds from {min(by_seed):.1f} to "
            f"{max(by_seed):.1f})"
        )
    print()


def example_of(row: dict) -> Example:
    answers = () if row["response"] == NO_ANSWER else (row["response"],)
    return Example("", row["context"], row["prompt"], answers)


def answers(answerer: Answerer, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The model's guess for each (context, question)."""
    found: dict[int, str] = {}
    for batch in answerer.answer([prompt_parts(*pair) for pair in pairs]):
        found |= {place: answer.text for place, answer in batch.items()}
    return [found[place] for place in range(len(pairs))]


def score(references: Sequence[Sequence[str]], guesses: Sequence[str]) -> float:
    pairs = zip(guesses, references, strict=True)
    matches = [exact_match(guess, reference) for guess, reference in pairs]
    return 100 * sum(matches) / max(len(matches), 1)


def print_row(
    name: str,
    examples: Sequence[Example],
    guesses: Sequence[str],
    suffix: str = "",
    width: int = 24,
) -> None:
    shares = []
    for is_answerable in (True, False):
        kept = [
            (example.answers, guess)
            for example, guess in zip(examples, guesses, strict=True)
            if example.is_answerable == is_answerable
        ]
        shares.append(score(*zip(*kept, strict=True)) if kept else float("nan"))
    print(f"{name:{width}}{shares[0]:12.1f}{shares[1]:14.1f}{suffix}")


def nearest_phrase(example: Example, kind: str) -> str:
    """The phrase of the asked-for type that is nearest to the name in the question.

    The type is taken from the reference, where there is one: an upper bound on this heuristic.
    """
    domain = next(domain for domain in DOMAINS if domain.kind == kind)
    types = list(dict.fromkeys(attribute.type for attribute in domain.attributes))
    names = phrases(example.question, domain.name_type)
    places = [example.context.find(name) for name in names if name in example.context]
    wanted = [type_ for answer in example.answers for type_ in types if phrases(answer, type_)]
    candidates = [phrase for type_ in wanted or types for phrase in phrases(example.context, type_)]
    if not places or not candidates:
        return NO_ANSWER
    return min(candidates, key=lambda phrase: abs(example.context.find(phrase) - places[0]))


def phrases(text: str, type_: str) -> list[str]:
    """The validation values of a type that stand in the text."""
    pool = POOLS["validation"][type_]
    return [value for value in pool if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)]


if __name__ == "__main__":
    run_script(main, parse_args)
