"""Train the demo checkpoint from random weights, on passages that are written on the way.

    make demo_model
    python -m studies.demo_model.train_demo_model models/demo_look --steps 200   # a look

`make demo_model` runs this script twice: from random weights (67 minutes on one core beside another
such run), then on the last stage with more unanswerable questions (18 minutes on two cores). The
model is saved every 250 steps.

A small Mamba left to itself answers "I don't know." for a hundred thousand questions, then copies
any value of the right kind for as many. Three things shorten that (docs/LOG.md has the figures).
The weights start as a rough memory behind a layer that forgets (`start_as_memory`). Beside the
questions, the model says the passage's facts again, where every word is a lesson in finding what it
has read. And passages grow along STAGES each time the model answers THRESHOLD of fresh questions:
first with one plain phrasing for each fact, so that a name and its value stand close together. All
names, values and phrasings are those of training; no passage is seen twice.
"""

from common.script import run_script

import argparse
import functools
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, set_seed

from common.command_line import Parser, positive_float, positive_int
from common.errors import UserError
from common.output_files import new_folder
from common.provenance import describe_run
from context_qa.answering import Answerer
from context_qa.batches import Pairing, continuation
from mamba_lm.checkpoint import NOTE, load_model, load_tokenizer, model_hashes
from mamba_lm.device import choose_device
from mamba_lm.models.mamba import MambaLM, initialize, initialize_delta
from mamba_lm.tokenizer import token_ids
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.prefix_suffix import Item
from mamba_lm.training.trainer import PrefixSuffixTrainer
from squad_utils import NO_ANSWER, PROMPT_ORDERS, Example, exact_match, prompt_parts
from studies.demo_model.domains import DOMAINS, Domain
from studies.demo_model.make_demo import Passage, make_passage, sentence


class Stage(NamedTuple):
    """What the passages of a stage hold, at most; `unanswerable` is a share of the questions."""

    entities: int
    facts: int  # of each entity
    statements: int  # phrasings of each fact
    questions: int  # phrasings of each question
    unanswerable: float


CONFIG = "models/configs/mamba-demo.json"
KNOWS_ONLY_THE_DEMO = (
    "This small demo checkpoint knows passages of the kind in data/demo, no others.\n"
)
ALL = 99
STAGES = [
    Stage(3, 1, 1, 1, 0.1),
    Stage(4, 2, 1, 1, 0.15),
    Stage(4, 2, 2, 2, 0.2),
    Stage(5, 3, ALL, ALL, 0.4),
]
THRESHOLD = 0.75  # share of answerable questions right: the next stage begins
BATCH = 56  # questions and facts a step, of about four passages
QUESTIONS = 8  # of a passage, and facts to say again, at most
PROMOTION_PASSAGES = 48
LOUD = 0.5  # share of the questions with loss on their own words


def start_as_memory(model: MambaLM) -> None:
    """Begin with weights by which all layers but the first recall, roughly, what followed before.

    The channels of such a layer are halved. Both halves see the same features, the second one token
    late. B reads the late half, C the present one by the same weights: a state is read most where
    the token before the written one equals the present token. out_proj is the transpose of in_proj,
    so that what is read points to the token that was written. Decay is slow, steps are long.

    The first layer keeps the paper's weights, whose states forget at many speeds. It has to carry a
    name to its value over the words between them; a layer that forgets nothing cannot do that.
    """
    initialize(model)
    present, late = torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    with torch.no_grad():
        for block in model.backbone.layers[1:]:
            mixer = block.mixer
            initialize_delta(mixer.dt_proj, 0.01, 0.3)
            half = mixer.out_proj.in_features // 2
            r, n, _ = mixer.split
            features = mixer.in_proj.weight[:half].clone()
            mixer.in_proj.weight[half : 2 * half] = features
            mixer.conv1d.weight[:half, 0] = present
            mixer.conv1d.weight[half:, 0] = late
            mixer.conv1d.bias.zero_()
            keys = mixer.x_proj.weight[r : r + n, :half].clone()
            mixer.x_proj.weight[r:] = 0
            mixer.x_proj.weight[r : r + n, half:] = keys  # B
            mixer.x_proj.weight[r + n :, :half] = keys  # C
            mixer.out_proj.weight[:, :half] = 2 * features.T
            mixer.out_proj.weight[:, half:] *= 0.3
            mixer.A_log.fill_(math.log(0.1))


@functools.cache
def plain_domains(statements: int, questions: int) -> list[Domain]:
    """The domains with so many phrasings at most, the plainest first."""
    return [
        replace(
            domain,
            attributes=[
                replace(attribute, frame=attribute.frame.plainest(statements, questions))
                for attribute in domain.attributes
            ],
        )
        for domain in DOMAINS
    ]


class Curriculum(Sampler[list[Item]]):
    """Batches of questions on generated passages and of facts to say again, by passage.

    A passage is of the present stage with probability 0.85, else of one up to it.
    """

    def __init__(self, tokenizer, steps: int, seed: int, stages: Sequence[Stage] = STAGES):
        self.tokenizer, self.steps, self.seed, self.stages = tokenizer, steps, seed, stages
        self.stage = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Item]]:
        examples = self.examples()
        while True:
            yield list(itertools.islice(examples, BATCH))

    def examples(self) -> Iterator[Item]:
        rng = random.Random(self.seed)
        while True:
            at = self.stage if rng.random() < 0.85 else rng.randint(0, self.stage)
            stage = self.stages[at]
            passage = self.passage(rng, stage)
            yield from self.facts(rng, passage)
            for pairing in self.questions(rng, passage, stage):
                example = continuation(pairing, self.tokenizer, PROMPT_ORDERS[0])
                if rng.random() < LOUD:
                    start, words = example.suffix[:1], example.suffix[1:]
                    example = Item.with_target(example.prefix, start, words)
                yield example

    def passage(self, rng: random.Random, stage: Stage) -> Passage:
        domains = plain_domains(stage.statements, stage.questions)
        entities = rng.randint(min(3, stage.entities), stage.entities)
        facts = rng.randint(min(2, stage.facts), stage.facts)
        return make_passage(rng, "train", entities, facts, domains)

    def questions(self, rng: random.Random, passage: Passage, stage: Stage) -> list[Pairing]:
        without = sum(rng.random() < stage.unanswerable for _ in range(QUESTIONS))
        different = sum(len(fact.attribute.frame.questions["train"]) for fact in passage.facts)
        rows = passage.questions(rng, min(QUESTIONS - without, different), without)
        examples = [Example("", row["context"], row["prompt"], _answers(row)) for row in rows]
        return [Pairing(example, example.context) for example in examples]

    def facts(self, rng: random.Random, passage: Passage) -> Iterator[Item]:
        """Facts of the passage, each by one of its statements."""
        prefix = token_ids(self.tokenizer, passage.context)
        for fact in rng.sample(passage.facts, min(len(passage.facts), QUESTIONS)):
            template = rng.choice(fact.attribute.frame.statements)
            entity = passage.domain.mention.format(fact.entity)
            text = sentence(template, e=entity, v=fact.value)
            yield Item.with_target(
                prefix, token_ids(self.tokenizer, "\n\n"), token_ids(self.tokenizer, text)
            )


def _answers(row: dict) -> tuple[str, ...]:
    return () if row["response"] == NO_ANSWER else (row["response"],)


class Promotion(TrainerCallback):
    """Every `interval` steps: save, ask fresh questions; if passed, take the next stage."""

    def __init__(
        self, answerer: Answerer, curriculum: Curriculum, interval: int, save: Callable[[], None]
    ):
        self.answerer, self.curriculum = answerer, curriculum
        self.interval, self.save = interval, save
        self.rng = random.Random("promotion")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.interval:
            return
        self.save()
        curriculum, stage = self.curriculum, self.curriculum.stages[self.curriculum.stage]
        asked = [
            pairing
            for _ in range(PROMOTION_PASSAGES)
            for pairing in curriculum.questions(
                self.rng, curriculum.passage(self.rng, stage), stage
            )
        ]
        prompts = [prompt_parts(p.context, p.example.question) for p in asked]
        right: dict[bool, list[float]] = {True: [], False: []}
        for batch in self.answerer.answer(prompts):
            for place, answer in batch.items():
                example = asked[place].example
                right[example.is_answerable].append(exact_match(answer.text, example.answers))
        shares = {key: sum(values) / max(len(values), 1) for key, values in right.items()}
        print(
            f"step {state.global_step}: stage {curriculum.stage} of {len(curriculum.stages) - 1}, "
            f"answerable {shares[True]:.2f}, unanswerable {shares[False]:.2f}",
            flush=True,
        )
        if shares[True] >= THRESHOLD and stage is not curriculum.stages[-1]:
            curriculum.stage += 1


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("output", metavar="DIR", help="folder of the new model")
    parser.add_argument("--model", help="folder to continue from (default: random weights)")
    parser.add_argument(
        "--first_stage", type=int, choices=range(len(STAGES)), default=0, help="default: 0"
    )
    parser.add_argument(
        "--unanswerable",
        metavar="SHARE",
        type=positive_float,
        default=STAGES[-1].unanswerable,
        help="of the questions of the last stage (default: %(default)s)",
    )
    parser.add_argument("--steps", type=positive_int, default=12_000, help="default: 12000")
    parser.add_argument("--learning_rate", type=positive_float, default=4e-3, help="default: 4e-3")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.unanswerable >= 1:
        raise UserError(f"--unanswerable {args.unanswerable}: give a share below 1")
    stages = [*STAGES[:-1], STAGES[-1]._replace(unanswerable=args.unanswerable)]
    set_seed(args.seed)  # before the random weights
    tokenizer = load_tokenizer("data/demo/tokenizer")
    model = load_model(args.model or CONFIG)
    if not args.model:
        start_as_memory(model)
    output = new_folder(args.output)
    curriculum = Curriculum(tokenizer, args.steps, args.seed, stages)
    curriculum.stage = args.first_stage
    arguments = training_arguments(
        args.output,
        choose_device("cpu"),
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=args.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": args.steps // 2},
        warmup_steps=100,
        weight_decay=0.05,
        logging_steps=250,
        save_strategy="no",  # a curriculum cannot be resumed
        seed=args.seed,
    )
    training = PrefixSuffixTrainer(model, arguments, curriculum, lambda example: example, tokenizer)
    answerer = Answerer(model, tokenizer, max_new_tokens=16)
    training.add_callback(Promotion(answerer, curriculum, 250, training.save_model))
    hashes = model_hashes(args.model or CONFIG, "data/demo/tokenizer")
    record = describe_run(vars(args)) | hashes
    (output / "training_args.json").write_text(json.dumps(record, indent=2) + "\n")
    (output / NOTE).write_text(KNOWS_ONLY_THE_DEMO)
    training.train()
    training.save_model()


if __name__ == "__main__":
    run_script(main, parse_args)
