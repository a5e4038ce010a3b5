"""Make the demo data: short passages, questions about them, and a small tokenizer for both.

    python -m studies.demo_model.make_demo       # rewrites data/demo/, the same bytes each time
    python -m studies.demo_model.make_demo --output DIR

Every name and every other value of two words belongs to either training or validation, by a hash
of its text, and so does every question phrasing, by the lists in domains.py: what validation asks
about, and how, never occurs in training. Single words, figures and the statements are shared.
`training_passages` streams as many training passages as one likes.
"""

from common.script import run_script

import argparse
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path

from common.atomic_files import report_write_errors
from common.command_line import Parser
from common.output_files import write_output
from squad_utils import NO_ANSWER
from studies.demo_model.domains import (
    DOMAINS,
    FIGURES,
    FILLERS,
    OPENERS,
    PHRASES,
    Attribute,
    Domain,
)

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2560  # at most: training ends earlier once every word is one token
TRAIN_SEED, VALIDATION_SEED, TOKENIZER_SEED = 1, 2, 3
NUM_VALIDATION_PASSAGES = 300


def split_of(phrase: str) -> str:
    """The split that owns this name or other phrase."""
    digest = hashlib.sha256(f"2:{phrase}".encode()).digest()  # the salt leaves enough of each pool
    return "validation" if digest[0] % 5 == 0 else "train"


POOLS: dict[str, dict[str, list[str]]] = {
    split: FIGURES
    | {
        type_: [phrase for phrase in phrases if split_of(phrase) == split]
        for type_, phrases in PHRASES.items()
    }
    for split in ("train", "validation")
}
POOL_MEMBERS = {
    split: {type_: frozenset(values) for type_, values in pools.items()}
    for split, pools in POOLS.items()
}


@dataclass(frozen=True)
class Fact:
    """One stated fact; `entity` is the full name."""

    entity: str
    attribute: Attribute
    value: str


@dataclass(frozen=True)
class Passage:
    """A context, the facts that it states, and the questions that can be asked about it."""

    split: str
    domain: Domain
    entities: list[str]
    attributes: list[Attribute]
    facts: list[Fact]
    context: str

    def questions(
        self, rng: random.Random, n_answerable: int, n_unanswerable: int, min_distractors: int = 0
    ) -> list[dict]:
        """Rows with different prompts, shuffled; the answerable ones ask for `askable` facts."""
        askable = self.askable(min_distractors)
        rng.shuffle(askable)
        facts_to_ask = cycle(askable)
        rows: dict[str, dict] = {}
        while len(rows) < n_answerable:
            row = self._answerable(rng, next(facts_to_ask))
            rows[row["prompt"]] = row
        while len(rows) < n_answerable + n_unanswerable:
            row = self._unanswerable(rng)
            rows[row["prompt"]] = row
        shuffled = list(rows.values())
        rng.shuffle(shuffled)
        return shuffled

    def askable(self, min_distractors: int) -> list[Fact]:
        """The facts with so many other values of the same type in the passage."""
        return [fact for fact in self.facts if self._num_others(fact) >= min_distractors]

    def is_stated(self, entity: str, attribute: Attribute) -> bool:
        """Whether the passage gives this attribute of this entity."""
        return any(fact.entity == entity and fact.attribute is attribute for fact in self.facts)

    def answer_to(self, prompt: str) -> str | None:
        """The value that the passage gives to a question of its split, for whatever passage that
        was made; None where it does not state it."""
        for fact in self.facts:
            mention = self.domain.mention.format(fact.entity)
            templates = fact.attribute.frame.questions[self.split]
            if any(sentence(template, e=mention) == prompt for template in templates):
                return fact.value
        return None

    def _values(self, type_: str) -> list[str]:
        return [fact.value for fact in self.facts if fact.attribute.type == type_]

    def _num_others(self, fact: Fact) -> int:
        return len(self._values(fact.attribute.type)) - 1

    def _answerable(self, rng: random.Random, fact: Fact) -> dict:
        prompt = self._question(rng, fact.attribute, fact.entity)
        return self._row(prompt, fact.value, self._num_others(fact))

    def _unanswerable(self, rng: random.Random) -> dict:
        """A gap of the passage (half of the time) or an absent name."""
        if rng.random() < 0.5 and (gaps := self._gaps()):
            entity, attribute = rng.choice(gaps)
        else:
            entity, attribute = self._absent_entity(rng), rng.choice(self.facts).attribute
        prompt = self._question(rng, attribute, entity)
        return self._row(prompt, NO_ANSWER, len(self._values(attribute.type)))

    def _gaps(self) -> list[tuple[str, Attribute]]:
        """What is not said of one entity, but of two others (of all others if there are fewer)."""
        enough = min(2, len(self.entities) - 1)
        return [
            (entity, attribute)
            for attribute in self.attributes
            if sum(fact.attribute is attribute for fact in self.facts) >= enough
            for entity in self.entities
            if not self.is_stated(entity, attribute)
        ]

    def _absent_entity(self, rng: random.Random) -> str:
        suffix = self.domain.name.removeprefix("{}")
        names = [entity.removesuffix(suffix) for entity in self.entities]
        return self.domain.name.format(absent_value(rng, self.split, self.domain.name_type, names))

    def _question(self, rng: random.Random, attribute: Attribute, entity: str) -> str:
        template = rng.choice(attribute.frame.questions[self.split])
        return sentence(template, e=self.domain.mention.format(entity))

    def _row(self, prompt: str, response: str, num_distractors: int) -> dict:
        # Only for training: with titles, evaluation would resample ten articles, which are too few.
        title = {"title": self.domain.kind} if self.split == "train" else {}
        return title | {
            "context": self.context,
            "prompt": prompt,
            "response": response,
            "domain": self.domain.kind,
            "num_facts": len(self.facts),
            "num_distractors": num_distractors,
        }


def sentence(template: str, **slots: str) -> str:
    """The template filled in, with a capital first letter."""
    text = template.format(**slots)
    return text[0].upper() + text[1:]


def absent_value(rng: random.Random, split: str, type_: str, present: list[str]) -> str:
    """A value of this type that is not present, half of the time with words of present ones."""
    if rng.random() < 0.5:
        crossed = [
            f"{one.split()[0]} {other.split()[-1]}"
            for one in present
            for other in chain(present, rng.sample(POOLS[split][type_], 5))
        ]
        members = POOL_MEMBERS[split][type_]
        near = [value for value in crossed if value in members and value not in present]
        if near:
            return rng.choice(near)
    while (value := rng.choice(POOLS[split][type_])) in present:
        pass
    return value


def make_passage(
    rng: random.Random,
    split: str,
    num_entities: int,
    facts_per_entity: int,
    domains: Sequence[Domain] = DOMAINS,
) -> Passage:
    """A passage about entities of one kind; each lacks one attribute that others may have."""
    domain = rng.choice(domains)
    pools = POOLS[split]
    names = rng.sample(pools[domain.name_type], num_entities)
    entities = [domain.name.format(name) for name in names]
    num_attributes = min(facts_per_entity + 1, len(domain.attributes))
    attributes = rng.sample(domain.attributes, num_attributes)

    # One draw per type without replacement: equal values would make two answers right.
    type_counts = Counter(attribute.type for attribute in attributes)
    unused = {
        type_: iter(rng.sample(pools[type_], count * num_entities))
        for type_, count in type_counts.items()
    }
    by_entity = [
        [Fact(entity, attribute, next(unused[attribute.type])) for attribute in stated]
        for entity in entities
        for stated in [rng.sample(attributes, num_attributes - 1)]
    ]
    facts = list(chain.from_iterable(by_entity))
    order = rng.choice(["by entity", "by attribute", "mixed"])
    if order == "by attribute":
        facts.sort(key=lambda fact: attributes.index(fact.attribute))
    elif order == "mixed":
        rng.shuffle(facts)
    return Passage(split, domain, entities, attributes, facts, _context(rng, domain, facts))


def _context(rng: random.Random, domain: Domain, facts: list[Fact]) -> str:
    sentences = [
        sentence(
            rng.choice(fact.attribute.frame.statements),
            e=domain.mention.format(fact.entity),
            v=fact.value,
        )
        for fact in facts
    ]
    if rng.random() < 0.4:
        sentences.insert(rng.randrange(1, len(sentences) + 1), rng.choice(FILLERS))
    return " ".join([rng.choice(OPENERS).format(kinds=domain.kinds), *sentences])


def training_passages(
    seed: int,
    num_passages: int | None = None,
    min_entities: int = 2,
    max_entities: int = 5,
    min_facts: int = 2,
    max_facts: int = 3,
    num_questions: int = 12,
) -> Iterator[list[dict]]:
    """Stream training passages (endlessly if `num_passages` is None), each as its rows.

    Two thirds of the questions are answerable; `min_facts` to `max_facts` are stated per entity.
    """
    rng = random.Random(seed)
    n_unanswerable = num_questions // 3
    for _ in islice(cycle([None]), num_passages):
        num_entities = rng.randint(min_entities, max_entities)
        passage = make_passage(rng, "train", num_entities, rng.randint(min_facts, max_facts))
        yield passage.questions(rng, num_questions - n_unanswerable, n_unanswerable)


def validation_passages(
    num_passages: int, seed: int = VALIDATION_SEED
) -> Iterator[tuple[Passage, list[dict]]]:
    """Passages of 3 to 5 entities, each with 4 questions as rows, of which every third one is
    unanswerable on average.

    Every answerable question has at least two distractors of the type of its answer.
    """
    rng = random.Random(seed)
    for index in range(num_passages):
        n_unanswerable = 2 if index % 3 == 0 else 1
        while True:
            passage = make_passage(rng, "validation", rng.randint(3, 5), rng.randint(2, 3))
            if passage.askable(min_distractors=2):
                break
        rows = passage.questions(rng, 4 - n_unanswerable, n_unanswerable, min_distractors=2)
        yield passage, rows


def train_tokenizer():
    """A byte-level BPE tokenizer in which each word of the demo data is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # The words around a question are one token each: a short way from a name to the answer. So is a
    # figure: of pieces, each would have to be found in its own right.
    words = r"\n\nQ:|[?.]\nA:| ?\$?\d+(?::\d\d)?| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return tokenizer


def _tokenizer_texts() -> Iterator[str]:
    for rows in training_passages(TOKENIZER_SEED, 2000, num_questions=6):
        yield rows[0]["context"]
        for row in rows:
            yield f"\n\nQ: {row['prompt']}\nA:"
            yield f" {row['response']}"


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as `AutoTokenizer` reads them."""
    write_output(folder / "tokenizer.json", train_tokenizer().to_str(pretty=True))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    write_output(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def write_rows(path: Path, passages: Iterable[list[dict]]) -> None:
    """Write the passages' rows as JSON lines; rows of one passage stay together."""
    rows = chain.from_iterable(passages)
    write_output(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {path.stat().st_size:,} bytes")


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("data/demo"), help="folder (default: data/demo)"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    with report_write_errors(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    write_rows(args.output / "train.jsonl", training_passages(TRAIN_SEED, 600, num_questions=6))
    rows = (rows for _, rows in validation_passages(NUM_VALIDATION_PASSAGES))
    write_rows(args.output / "validation.jsonl", rows)
    write_tokenizer(args.output / "tokenizer")


if __name__ == "__main__":
    run_script(main, parse_args)
