"""The demo data keeps its promises: training shows nothing of validation, answers are there."""

import json
import random
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from common.errors import UserError
from squad_utils import NO_ANSWER
from studies.demo_model import domains, make_demo
from studies.demo_model.domains import DOMAINS, FIGURES, PHRASES, Frame

DEMO = Path(__file__).parents[2] / "data/demo"
TEXT_KEYS = ("context", "prompt", "response")


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return read_rows("train.jsonl")


@pytest.fixture(scope="module")
def validation() -> list[dict]:
    return read_rows("validation.jsonl")


@pytest.fixture(scope="module")
def stream() -> list[dict]:
    passages = make_demo.training_passages(99, 3000, min_entities=1, max_entities=6)
    return list(chain.from_iterable(passages))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "tokenizer")


def texts(rows: list[dict]) -> set[str]:
    return {row[key] for row in rows for key in TEXT_KEYS}


def words(rows: list[dict]) -> set[str]:
    return {word for text in texts(rows) for word in re.findall(r"[^\W\d_]+(?:'\w+)?", text)}


def phrases(rows: list[dict]) -> set[str]:
    """Every run of up to three words; what has no more words occurs in here or nowhere."""
    found = set()
    for text in texts(rows):
        tokens = [token.strip(".,?") for token in text.split()]
        for size in (1, 2, 3):
            found |= {" ".join(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    return found


def test_files_are_what_the_generator_writes(tmp_path, train, validation):
    make_demo.write_rows(
        tmp_path / "train.jsonl",
        make_demo.training_passages(make_demo.TRAIN_SEED, 600, num_questions=6),
    )
    rows = (rows for _, rows in make_demo.validation_passages(300))
    make_demo.write_rows(tmp_path / "validation.jsonl", rows)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
    assert (DEMO / "train.jsonl").stat().st_size < 3_000_000
    for rows, num_passages, num_questions in ((train, 600, 6), (validation, 300, 4)):
        assert len(rows) == num_passages * num_questions
        for start in range(0, len(rows), num_questions):
            assert len({row["context"] for row in rows[start : start + num_questions]}) == 1


def names_and_phrases(split: str) -> set[str]:
    return set(chain.from_iterable(make_demo.POOLS[split][type_] for type_ in PHRASES))


def test_names_and_phrases_of_one_split_do_not_occur_in_the_other(train, stream, validation):
    answers = {row["response"] for row in validation} - {NO_ANSWER}
    figures = set(chain.from_iterable(FIGURES.values()))
    only_in_validation = names_and_phrases("validation")
    assert answers <= only_in_validation | figures
    assert len(answers & only_in_validation) > 200
    for rows in (train, stream):
        assert not only_in_validation & phrases(rows)
    assert not names_and_phrases("train") & phrases(validation)


def as_pattern(template: str) -> re.Pattern:
    """What the template matches, whatever entity or value fills it and however it begins."""
    literal = re.escape(template).replace(r"\{e\}", ".+").replace(r"\{v\}", ".+")
    return re.compile(literal, re.IGNORECASE)


def test_question_phrasings_are_disjoint(train, stream, validation):
    prompts = {row["domain"]: set() for row in train}
    for row in train + stream[:6000]:
        prompts[row["domain"]].add(row["prompt"])
    for domain in DOMAINS:
        for attribute in domain.attributes:
            frame = attribute.frame
            assert len(frame.statements) >= 4
            assert all(text.index("{e}") < text.index("{v}") for text in frame.statements)
            assert len(frame.questions["train"]) >= 6
            assert len(frame.questions["validation"]) >= 3
            for pattern in map(as_pattern, frame.questions["validation"]):
                assert not any(map(pattern.fullmatch, frame.questions["train"])), pattern
                assert not any(map(pattern.fullmatch, prompts[domain.kind])), pattern
    assert not {row["prompt"] for row in validation} & {row["prompt"] for row in train + stream}


def skeleton(question: str) -> str:
    """The question with "_" for whatever is asked for and E for the entity."""
    asked_for = r"number of {things}|{noun}|{unit}|{things}|price|job|year|town|person"
    text = question.replace("{thing}", "{e}").replace("{e}", "E").replace("{prep}", "of")
    return re.sub(asked_for, "_", text)


def test_no_frame_asks_in_training_as_another_does_in_validation():
    frames = [value for value in vars(domains).values() if isinstance(value, Frame)]
    train, validation = (
        {skeleton(question) for frame in frames for question in frame.questions[split]}
        for split in ("train", "validation")
    )
    assert not train & validation


def test_validation_words_and_tokens_are_known(train, stream, validation, tokenizer):
    def token_ids(rows):
        parts = {f" {row['response']}" for row in rows} | {row["context"] for row in rows}
        parts |= {f"\n\nQ: {row['prompt']}\nA:" for row in rows}
        return set(chain.from_iterable(tokenizer(sorted(parts)).input_ids))

    assert words(validation) <= words(train + stream)
    assert token_ids(validation) <= token_ids(stream)


def test_an_output_that_is_not_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        make_demo.main(SimpleNamespace(output=file))


def test_a_third_is_unanswerable(train, validation, stream):
    for rows in (train, validation, stream):
        assert sum(row["response"] == NO_ANSWER for row in rows) * 3 == len(rows)


def test_answers_stand_in_their_context(train, validation, stream):
    for row in train + validation + stream:
        if row["response"] != NO_ANSWER:
            # With the space before: answers are tokenised with it.
            assert re.search(rf" {re.escape(row['response'])}(?!\w)", row["context"]), row


def test_validation_is_hard_enough(validation, tokenizer):
    lengths = [len(tokenizer(context).input_ids) for context in {r["context"] for r in validation}]
    assert median(lengths) >= 60
    for row in validation:
        assert row["num_distractors"] >= 2 or row["response"] == NO_ANSWER


def parse(prompt: str, split: str, domain) -> tuple[int, str]:
    """Which attribute is asked for, and of which entity."""
    for index, attribute in enumerate(domain.attributes):
        for template in attribute.frame.questions[split]:
            literal = re.escape(template.replace("{e}", domain.mention.format("{e}")))
            pattern = literal.replace(r"\{e\}", "(.+)")
            if match := re.fullmatch(pattern, prompt, re.IGNORECASE):
                return index, match[1]
    raise AssertionError(prompt)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_questions_agree_with_the_facts(split):
    rng = random.Random(7)
    seen = Counter()
    for _ in range(300):
        passage = make_demo.make_passage(rng, split, rng.randint(2, 6), rng.randint(1, 4))
        attributes = passage.domain.attributes
        stated = {(attributes.index(f.attribute), f.entity): f.value for f in passage.facts}
        by_type = Counter((fact.attribute.type, fact.value) for fact in passage.facts)
        assert max(by_type.values()) == 1
        assert not any(passage.context.startswith(entity) for entity in passage.entities)
        for row in passage.questions(rng, 4, 4):
            index, entity = parse(row["prompt"], split, passage.domain)
            assert stated.get((index, entity), NO_ANSWER) == row["response"], row
            type_ = attributes[index].type
            same_type = sum(fact.attribute.type == type_ for fact in passage.facts)
            assert row["num_distractors"] == same_type - (row["response"] != NO_ANSWER)
            is_gap = row["response"] == NO_ANSWER and entity in passage.entities
            seen[row["response"] == NO_ANSWER, is_gap] += 1
            if is_gap:
                asked = [other for stated_index, other in stated if stated_index == index]
                assert len(asked) >= min(2, len(passage.entities) - 1)
    assert len(seen) == 3, "answerable, absent, and gaps all occur"


def test_pools_are_large_enough():
    for type_, values in (PHRASES | FIGURES).items():
        assert len(set(values)) == len(values)
        same_type = [
            sum(attribute.type == type_ for attribute in domain.attributes) for domain in DOMAINS
        ]
        needed = 6 * max(*same_type, 1)
        assert len(make_demo.POOLS["validation"][type_]) > needed, type_


def test_stream_is_controlled_and_repeatable():
    def stream(seed):
        return list(make_demo.training_passages(seed, 50, 3, 3, 2, 2, num_questions=9))

    passages = stream(4)
    assert passages == stream(4) != stream(5)
    for rows in passages:
        assert len(rows) == len({row["prompt"] for row in rows}) == 9
        assert {row["num_facts"] for row in rows} == {6}


def test_tokenizer_reads_any_text(tokenizer):
    odd = "  Ünïcødé\t漢字 🐍\r\n\n 007 12345 $9.99 ½ \x00 don't  "
    assert tokenizer.decode(tokenizer(odd).input_ids) == odd
    assert tokenizer("").input_ids == []


def test_tokenizer_specials(tokenizer):
    special_ids = (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id)
    assert special_ids == (0, 0, 0)
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert 0 not in tokenizer("The Amber Heron Hotel").input_ids


def test_words_and_figures_are_single_tokens(tokenizer, validation):
    vocabulary = words(validation)
    single = sum(len(tokenizer(f" {word}").input_ids) == 1 for word in vocabulary)
    assert single >= 0.98 * len(vocabulary)
    for figure in chain.from_iterable(FIGURES.values()):
        number = figure.split()[0]
        assert len(tokenizer(f" {number}").input_ids) == 1, figure
    assert len(tokenizer(" 7:35 12345").input_ids) > 2, "others in pieces"
