"""The demo's own training: where its weights start, what its curriculum asks, when it goes on."""

import random
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from context_qa.answering import Answer
from mamba_lm.checkpoint import load_model, load_tokenizer
from mamba_lm.training.prefix_suffix import IGNORED, Item
from squad_utils import NO_ANSWER
from studies.demo_model import train_demo_model as demo
from studies.demo_model.domains import DOMAINS

CONFIG = "models/configs/mamba-demo.json"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("data/demo/tokenizer")


@pytest.fixture
def curriculum(tokenizer):
    return demo.Curriculum(tokenizer, steps=2, seed=0)


def mean_rank_of_recalled_token(model) -> float:
    """In random sequences (..., a, b, ..., a): b's rank by logit among the sequence's tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.rand(64, 1000, generator=generator).argsort(1)[:, :12]  # distinct in a row
    at = torch.randint(2, 9, (64,), generator=generator)
    rows = torch.arange(64)
    asked = torch.cat([tokens, tokens[rows, at].unsqueeze(1)], dim=1)
    with torch.no_grad():
        logits = model(asked)[0][:, -1].gather(1, tokens)
    logits[rows, at] = -torch.inf  # the present token itself stands in the residual stream
    return (logits > logits[rows, at + 1].unsqueeze(1)).sum(1).float().mean().item()


def test_weights_start_as_a_memory():
    torch.manual_seed(0)
    model = load_model(CONFIG)
    before = mean_rank_of_recalled_token(model)
    demo.start_as_memory(model)
    assert before > 4.0, "by chance: the middle of 11"
    assert mean_rank_of_recalled_token(model) < before / 2
    first, *others = (block.mixer.A_log.exp() for block in model.backbone.layers)
    assert all(first.max() > 100 * A.max() for A in others), "the first layer can forget"


def test_stages_grow():
    for easy, hard in zip(demo.STAGES, demo.STAGES[1:], strict=False):
        assert all(one <= other for one, other in zip(easy, hard, strict=True)) and easy != hard
    last = demo.STAGES[-1]
    frames = [attribute.frame for domain in DOMAINS for attribute in domain.attributes]
    assert max(len(frame.statements) for frame in frames) <= last.statements
    assert max(len(frame.questions["train"]) for frame in frames) <= last.questions


def test_plain_domains_keep_all_but_the_phrasings():
    for plain, domain in zip(demo.plain_domains(1, 2), DOMAINS, strict=True):
        assert plain.kind == domain.kind
        for attribute, full in zip(plain.attributes, domain.attributes, strict=True):
            (statement,) = attribute.frame.statements
            assert statement in full.frame.statements
            assert statement.index("{e}") < statement.index("{v}")
            assert set(attribute.frame.questions["train"]) < set(full.frame.questions["train"])


@pytest.mark.parametrize("stage", range(len(demo.STAGES)))
def test_questions_of_each_stage(curriculum, stage):
    rng = random.Random(stage)
    answerable = total = 0
    sizes = set()
    for _ in range(60):
        passage = curriculum.passage(rng, demo.STAGES[stage])
        sizes.add((len(passage.entities), len(passage.facts) // len(passage.entities)))
        pairings = curriculum.questions(rng, passage, demo.STAGES[stage])
        assert 1 <= len(pairings) <= demo.QUESTIONS
        for pairing in pairings:
            assert pairing.context == passage.context
            assert pairing.target == NO_ANSWER or pairing.target in passage.context
        answerable += sum(pairing.example.is_answerable for pairing in pairings)
        total += len(pairings)
    assert 0.5 < answerable / total < 1
    most_entities, most_facts, *_ = demo.STAGES[stage]
    assert sizes == {
        (entities, facts)
        for entities in range(3, most_entities + 1)
        for facts in range(min(2, most_facts), most_facts + 1)
    }


def target(item: Item) -> list[int]:
    return [label for label in item.labels if label != IGNORED]


def unlabelled(item: Item) -> list[int]:
    pairs = zip(item.suffix, item.labels, strict=True)
    return [token for token, label in pairs if label == IGNORED]


def test_examples_are_facts_and_questions_of_their_passage(curriculum, tokenizer):
    curriculum.stage = len(demo.STAGES) - 1
    examples = [example for example, _ in zip(curriculum.examples(), range(200), strict=False)]
    facts = [example for example in examples if tokenizer.decode(unlabelled(example)) == "\n\n"]
    assert 50 < len(facts) < 150
    for example in facts:
        fact = tokenizer.decode(target(example))
        assert fact.endswith(".") and "Q:" not in fact
    questions = [example for example in examples if example not in facts]
    assert all(tokenizer.decode(example.suffix).startswith("\n\nQ:") for example in questions)
    assert all(example.labels[-1] == tokenizer.eos_token_id for example in questions)
    loud = sum(len(unlabelled(example)) == 1 for example in questions)
    assert 0.3 < loud / len(questions) < 0.7


def test_batches_are_the_examples_in_their_order(curriculum):
    batches = [batch for batch, _ in zip(curriculum, range(3), strict=False)]
    assert {len(batch) for batch in batches} == {demo.BATCH}
    examples = curriculum.examples()
    assert [e for batch in batches for e in batch] == [
        next(examples) for _ in range(3 * demo.BATCH)
    ]


@pytest.mark.parametrize("is_right", [True, False])
def test_the_next_stage_begins_when_answers_are_right(curriculum, capsys, is_right):
    rng, easy = random.Random("promotion"), demo.STAGES[0]

    class Oracle:
        def answer(self, prompts):
            asked = [
                pairing
                for _ in range(demo.PROMOTION_PASSAGES)
                for pairing in curriculum.questions(rng, curriculum.passage(rng, easy), easy)
            ]
            texts = [pairing.target if is_right else "Mara Quill" for pairing in asked]
            assert len(texts) == len(prompts)
            yield {place: Answer(text, 1.0, 0.0, 0.1, 9, 1) for place, text in enumerate(texts)}

    saved = []
    promotion = demo.Promotion(
        Oracle(), curriculum, interval=10, save=lambda: saved.append(curriculum.stage)
    )
    promotion.on_step_end(None, SimpleNamespace(global_step=9), None)
    assert curriculum.stage == 0 and not capsys.readouterr().out
    promotion.on_step_end(None, SimpleNamespace(global_step=10), None)
    assert curriculum.stage == int(is_right)
    assert saved == [0]
    assert f"answerable {float(is_right):.2f}" in capsys.readouterr().out


def test_a_short_training_leaves_a_whole_model(tmp_path):
    arguments = SimpleNamespace(
        output=str(tmp_path / "model"),
        model=None,
        first_stage=0,
        unanswerable=0.5,
        steps=3,
        learning_rate=1e-3,
        seed=0,
    )
    demo.main(arguments)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "training_args.json", "NOTE.txt", "training_log.jsonl", "training_log.png",
    }  # fmt: skip
    assert load_model(str(tmp_path / "model")).config == load_model(CONFIG).config
    with pytest.raises(UserError, match="contains other files"):
        demo.main(arguments)
    arguments.unanswerable = 1.0
    with pytest.raises(UserError, match="give a share below 1"):
        demo.main(arguments)


def test_the_last_stage_has_the_share_of_unanswerable_questions_given(tokenizer):
    few, many = (
        demo.Curriculum(tokenizer, 0, 0, [demo.STAGES[-1]._replace(unanswerable=share)])
        for share in (0.2, 0.8)
    )

    def share_of_unanswerable(curriculum):
        examples = [example for example, _ in zip(curriculum.examples(), range(600), strict=False)]
        targets = [tokenizer.decode(target(example)) for example in examples]
        return sum(NO_ANSWER in target for target in targets) / len(targets)

    assert 2 * share_of_unanswerable(few) < share_of_unanswerable(many)
