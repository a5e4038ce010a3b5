"""Train the demo checkpoint from random weights: a curriculum from one fact a passage to fifteen.

    python -m data.demo.train_demo_model models/demo_new
    python -m data.demo.train_demo_model models/demo_new --scale 0.01      # a quick look

Passages are written on the way by data/demo/make_demo.py, all with training names, values and
question phrasings; no passage is seen twice. A small Mamba finds recall in steps: first that the
answer stands in the passage, then which of two entities it belongs to, then many facts.
"""

import argparse
import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from context_qa.dataset import Pairing, continuation
from data.demo.make_demo import make_passage
from errors import run_script
from mamba_lm.checkpoint import load_model, load_tokenizer
from mamba_lm.training import PrefixSuffixTrainer, training_arguments
from squad_utils import NO_ANSWER, PROMPT_ORDERS, Example

TOKENIZER = "data/demo/tokenizer"


class Stage(NamedTuple):
    """A stretch of the curriculum; passages have up to this many entities and facts for each."""

    passages: int
    entities: int
    facts: int
    unanswerable: float  # share of the questions


CURRICULUM = [
    Stage(passages=20_000, entities=1, facts=1, unanswerable=0.1),
]


class Curriculum(Sampler[Pairing]):
    """Questions on generated passages, those of a passage in a row.

    Every passage is at the stage's own size with probability 0.7, else at an earlier stage's.
    """

    def __init__(self, stages: list[Stage], questions: int, seed: int):
        self.stages, self.questions, self.seed = stages, questions, seed
        self.length = sum(1 for _ in self)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Pairing]:
        rng = random.Random(self.seed)
        for number, stage in enumerate(self.stages):
            for _ in range(stage.passages):
                at = number if rng.random() < 0.7 else rng.randint(0, number)
                yield from self._passage(rng, self.stages[at], stage.unanswerable)

    def _passage(self, rng: random.Random, size: Stage, unanswerable: float) -> Iterator[Pairing]:
        passage = make_passage(rng, "train", size.entities, size.facts)
        questions = min(self.questions, 4 * len(passage.facts))
        without = sum(rng.random() < unanswerable for _ in range(questions))
        for row in passage.questions(rng, questions - without, without):
            answers = () if row["response"] == NO_ANSWER else (row["response"],)
            example = Example("", row["context"], row["prompt"], answers)
            yield Pairing(example, example.context)
