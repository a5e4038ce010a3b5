"""Train the demo checkpoint from random weights, on passages that are written on the way.

    python -m data.demo.train_demo_model models/demo_new
    python -m data.demo.train_demo_model models/demo_new --steps 200 --recital_steps 200   # a look

A small Mamba finds recall in steps. First it learns to say a passage again, word for word: every
token is a lesson in finding what followed the last one. Then it retells passages, the same facts in
another order and other words: what belongs to whom. Then come questions, on passages that grow from
one fact to fifteen each time the model answers THRESHOLD of fresh ones at its level. Some questions
carry loss on their own words too, since the name in a question recurs from the passage. All names,
values and phrasings are those of training; no passage is seen twice.
"""

import argparse
import random
from collections.abc import Iterator

from torch.utils.data import Sampler
from transformers import TrainerCallback, set_seed

from context_qa.answering import Answerer
from context_qa.dataset import Pairing, continuation, token_ids
from data.demo.make_demo import make_passage
from errors import run_script
from mamba_lm.checkpoint import load_model, load_tokenizer
from mamba_lm.device import choose_device
from mamba_lm.training import Continuation, PrefixSuffixTrainer, training_arguments
from squad_utils import NO_ANSWER, PROMPT_ORDERS, Example, exact_match, prompt_parts

# Entities in a passage, facts of each.
LEVELS = [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (5, 3)]
THRESHOLD = 0.8  # share of answerable questions right: the next level begins
RECITALS = 12  # passages a step, said again or retold
RETOLD = [(4, 1), (8, 1), (10, 1), (6, 2)]  # their entities, and facts of each
BATCH = 32  # questions a step
QUESTIONS = 12  # of a passage, at most
UNANSWERABLE = (0.1, 1 / 3)  # share of the questions: at the first level, at the last
LOUD = 0.5  # share of the questions with loss on their own words


class Curriculum(Sampler[Pairing]):
    """Questions on generated passages, those of a passage in a row.

    A passage is of the present level with probability 0.8, else of an easier one.
    """

    def __init__(self, length: int, questions: int, seed: int):
        self.length, self.questions, self.seed, self.level = length, questions, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Pairing]:
        rng = random.Random(self.seed)
        while True:
            at = self.level if rng.random() < 0.8 else rng.randint(0, self.level)
            yield from self.passage(rng, at)

    def passage(self, rng: random.Random, level: int) -> list[Pairing]:
        passage = make_passage(rng, "train", *LEVELS[level])
        total = min(self.questions, 4 * len(passage.facts))
        first, last = UNANSWERABLE
        share = first + (last - first) * level / (len(LEVELS) - 1)
        without = sum(rng.random() < share for _ in range(total))
        pairings = []
        for row in passage.questions(rng, total - without, without):
            answers = () if row["response"] == NO_ANSWER else (row["response"],)
            example = Example("", row["context"], row["prompt"], answers)
            pairings.append(Pairing(example, example.context))
        return pairings


class Retelling(Sampler[tuple[str, str]]):
    """Generated passages, each with the text to say after it: itself, or the same facts retold."""

    def __init__(self, length: int, verbatim: bool, seed: int):
        self.length, self.verbatim, self.seed = length, verbatim, seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[str, str]]:
        rng = random.Random(self.seed)
        while True:
            passage = make_passage(rng, "train", *rng.choice(RETOLD))
            yield passage.context, passage.context if self.verbatim else passage.retold(rng)


class Promotion(TrainerCallback):
    """Every `interval` steps, fresh questions at the present level; the next one if passed."""

    def __init__(self, answerer: Answerer, curriculum: Curriculum, interval: int):
        self.answerer, self.curriculum, self.interval = answerer, curriculum, interval
        self.rng = random.Random("promotion")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.interval:
            return
        level = self.curriculum.level
        asked = [p for _ in range(24) for p in self.curriculum.passage(self.rng, level)]
        prompts = [prompt_parts(p.context, p.example.question) for p in asked]
        right: dict[bool, list[float]] = {True: [], False: []}
        for batch in self.answerer.answer(prompts):
            for place, answer in batch.items():
                example = asked[place].example
                right[example.is_answerable].append(exact_match(answer.text, example.answers))
        shares = {key: sum(values) / max(len(values), 1) for key, values in right.items()}
        print(
            f"step {state.global_step}: level {level} {LEVELS[level]}, "
            f"answerable {shares[True]:.2f}, unanswerable {shares[False]:.2f}",
            flush=True,
        )
        if shares[True] >= THRESHOLD and level < len(LEVELS) - 1:
            self.curriculum.level += 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="DIR", help="folder of the new model")
    parser.add_argument(
        "--model", default="models/configs/mamba-demo.json", help="config or folder"
    )
    parser.add_argument("--recital_steps", type=int, default=3000, help="default: 3000")
    parser.add_argument("--retelling_steps", type=int, default=3000, help="default: 3000")
    parser.add_argument("--steps", type=int, default=40_000, help="of questions (default: 40000)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="default: 3e-3")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    set_seed(args.seed)  # before the random weights
    tokenizer = load_tokenizer("data/demo/tokenizer")
    model = load_model(args.model)
    rng = random.Random(args.seed)

    def say(passage_and_text: tuple[str, str]) -> Continuation:
        passage, text = (token_ids(tokenizer, part) for part in passage_and_text)
        return Continuation(passage, token_ids(tokenizer, "\n\n"), text)

    def ask(pairing: Pairing) -> Continuation:
        example = continuation(pairing, tokenizer, PROMPT_ORDERS[0])
        if rng.random() >= LOUD:
            return example
        start, words = example.prompt[:3], example.prompt[3:]
        return Continuation(example.prefix, start, [*words, *example.target])

    for phase, steps in enumerate((args.recital_steps, args.retelling_steps)):
        if steps:
            texts = Retelling(RECITALS * steps, verbatim=phase == 0, seed=args.seed + phase)
            trainer(args, model, tokenizer, texts, say, RECITALS, steps, decay=0.1).train()

    questions = Curriculum(BATCH * args.steps, QUESTIONS, seed=args.seed)
    training = trainer(args, model, tokenizer, questions, ask, BATCH, args.steps, decay=0.3)
    answerer = Answerer(model, tokenizer, max_new_tokens=16, batch_size=96)
    training.add_callback(Promotion(answerer, questions, interval=250))
    training.train()
    training.save_model()


def trainer(
    args,
    model,
    tokenizer,
    curriculum: Curriculum,
    tokenize,
    batch_size: int,
    steps: int,
    decay: float,
) -> PrefixSuffixTrainer:
    """A trainer at a constant learning rate that falls over the last share `decay` of the steps."""
    arguments = training_arguments(
        args.output,
        choose_device("cpu"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(decay * steps)},
        warmup_steps=100,
        weight_decay=0.05,
        logging_steps=250,
        save_strategy="steps",
        save_steps=2000,
        save_total_limit=2,
        seed=args.seed,
    )
    return PrefixSuffixTrainer(model, arguments, curriculum, tokenize, tokenizer)


if __name__ == "__main__":
    run_script(main, parse_args)
