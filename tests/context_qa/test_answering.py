"""The answering loop: a guess depends only on its prompt, and its confidence is a probability."""

import copy
import dataclasses
import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from context_qa import answering
from context_qa.answering import Answerer
from context_qa.results.rows import Answer
from context_qa.shots import n_shot_prompt
from mamba_lm.checkpoint import load_tokenizer
from mamba_lm.models.mamba import MambaConfig, MambaLM
from squad_utils import NO_ANSWER, prompt_parts

ROOT = Path(__file__).parents[2]
LONG = "Ann lives in Oslo, and Ben lives in Rome with Cy. " * 20  # far more than 128 tokens
CONTEXTS = ("Bo is a cat.", LONG, "Cy lives in Bern, said Ann.", "Dee?")
QUESTIONS = ("Who is Bo?", "Where does Ann live?", "Why?")
PROMPTS = [prompt_parts(context, question) for question in QUESTIONS for context in CONTEXTS]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("", str(ROOT / "data/demo/tokenizer"))


@pytest.fixture(scope="module")
def attentive(tokenizer) -> MambaLM:
    """Random weights, large enough that every prompt gets a different guess."""
    torch.manual_seed(1)
    config = MambaConfig(len(tokenizer), d_model=16, n_layer=2, d_state=4, tie_embeddings=False)
    model = MambaLM(config).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_()
        model.lm_head.weight.normal_()
        for block in model.backbone.layers:
            block.mixer.in_proj.weight *= 1.5
            block.mixer.out_proj.weight *= 1.5
            block.mixer.x_proj.weight.normal_()
            block.mixer.dt_proj.bias.fill_(-1.0)
            block.mixer.A_log.fill_(-3.0)
            block.mixer.D.zero_()
    return model


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reciter(tokenizer, text: str, logit: float = 10.0) -> MambaLM:
    """A model that generates `text` and end-of-text after any prompt, with known probabilities.

    Its layers add nothing, so that only the last token counts: each token of the text has its own
    dimension, for which the head gives the next token `logit` and all others 0.
    """
    chain = [ids(tokenizer, "?\nA:")[-1], *ids(tokenizer, text), tokenizer.eos_token_id]
    assert len(set(chain)) == len(chain), "a token occurs twice: the next token is ambiguous"
    size = len(chain)
    config = MambaConfig(
        len(tokenizer), d_model=size, n_layer=1, d_state=4, tie_embeddings=False,
        pad_vocab_size_multiple=64,
    )  # fmt: skip
    model = MambaLM(config).eval()
    with torch.no_grad():
        model.backbone.layers[0].mixer.out_proj.weight.zero_()
        model.backbone.embeddings.weight.zero_()
        model.lm_head.weight.zero_()
        for dimension, (token, following) in enumerate(pairwise(chain)):
            model.backbone.embeddings.weight[token, dimension] = 1.0
            model.lm_head.weight[following, dimension] = logit / math.sqrt(size)  # the norm's scale
    return model


def answers_to(answerer: Answerer, prompts=PROMPTS) -> list[Answer]:
    by_place: dict[int, Answer] = {}
    for batch in answerer.answer(prompts):
        assert batch and not batch.keys() & by_place.keys()
        by_place |= batch
    return [by_place[place] for place in range(len(prompts))]


def one_by_one(answerer: Answerer, prompts=PROMPTS) -> list[Answer]:
    answers = []
    for prefix, suffix in prompts:
        prefixes, suffixes = ([ids] for ids in answerer.tokens.encode([prefix, suffix]))
        state = answerer.read_prefixes(prefixes)
        answers += answerer.ask(state, suffixes, [len(prefixes[0])])
    return answers


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.num_tokens, one.num_new_tokens) == (
            (other.text, other.num_tokens, other.num_new_tokens)
        )
        # Relative, since the confidences of random weights are small themselves.
        assert one.confidence == pytest.approx(other.confidence, rel=1e-4, abs=0)
        assert one.no_answer_probability == pytest.approx(
            other.no_answer_probability, rel=1e-4, abs=0
        )


def test_each_prompt_gets_a_different_guess(tokenizer, attentive):
    """The tests of equality below need this: they detect swapped rows."""
    answers = answers_to(Answerer(attentive, tokenizer, 6))
    assert len({answer.text for answer in answers}) == len(PROMPTS)
    assert len({answer.no_answer_probability for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize("window", [1, 2, 5, 512])
@pytest.mark.parametrize("max_batch_tokens", [1, 40, 150, 8192])
def test_answers_do_not_depend_on_batches(
    tokenizer, attentive, max_batch_tokens, window, monkeypatch
):
    monkeypatch.setattr(answering, "WINDOW", window)
    answers = answers_to(Answerer(attentive, tokenizer, 6, max_batch_tokens))
    assert_same(answers, one_by_one(Answerer(attentive, tokenizer, 6)))


@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_the_order_of_prompts(tokenizer, attentive, seed, monkeypatch):
    monkeypatch.setattr(answering, "WINDOW", 5)
    answerer = Answerer(attentive, tokenizer, 6, max_batch_tokens=100)
    order = random.Random(seed).sample(range(len(PROMPTS)), len(PROMPTS))
    shuffled = answers_to(answerer, [PROMPTS[place] for place in order])
    expected = answers_to(answerer)
    assert_same(shuffled, [expected[place] for place in order])


def test_answers_do_not_depend_on_which_prompts_share_a_context(tokenizer, attentive):
    answerer = Answerer(attentive, tokenizer, 6)
    expected = answers_to(answerer)
    for context in CONTEXTS:
        places = [place for place, (prefix, _) in enumerate(PROMPTS) if prefix == context]
        together = answers_to(answerer, [PROMPTS[place] for place in places])
        assert_same(together, [expected[place] for place in places])
    for place, prompt in enumerate(PROMPTS):  # the same prompt twice, beside another
        alone = answers_to(answerer, [prompt, PROMPTS[place - 1], prompt])
        assert_same(alone, [expected[place], expected[place - 1], expected[place]])


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int]]:
    """The (rows, length) of all that the model reads, in order."""
    shapes, encode = [], MambaLM.encode

    def recorded(self, input_ids, *args, **settings):
        shapes.append(tuple(input_ids.shape))
        return encode(self, input_ids, *args, **settings)

    monkeypatch.setattr(MambaLM, "encode", recorded)
    return shapes


def prefixes_read(answerer: Answerer, prompts, monkeypatch) -> list[str]:
    """The texts of the prefixes that are read, in order."""
    read, really_read = [], answerer.read_prefixes
    monkeypatch.setattr(answerer, "read_prefixes", lambda p: read.extend(p) or really_read(p))
    answers_to(answerer, prompts)
    texts = list({prefix for prefix, _ in prompts})
    by_ids = dict(zip(map(tuple, answerer.tokens.encode(texts)), texts, strict=True))
    return [by_ids[tuple(ids)] for ids in read]


@pytest.mark.parametrize("max_batch_tokens", [1, 100, 8192])
def test_a_context_is_read_once_for_all_its_questions(
    tokenizer, attentive, max_batch_tokens, monkeypatch
):
    answerer = Answerer(attentive, tokenizer, 6, max_batch_tokens)
    assert sorted(prefixes_read(answerer, PROMPTS, monkeypatch)) == sorted(CONTEXTS)


def test_a_prefix_of_all_prompts_is_read_only_once(tokenizer, attentive, monkeypatch):
    """The n-shot prompt, and a context with questions in two windows."""
    monkeypatch.setattr(answering, "WINDOW", 2)
    prompts = [prompt_parts(n_shot_prompt(), f"Who is number {number}?") for number in range(9)]
    answerer = Answerer(attentive, tokenizer, 2)
    assert prefixes_read(answerer, prompts, monkeypatch) == [prompts[0][0]]
    by_context = sorted(PROMPTS)  # three questions on each, windows of two prompts
    answerer = Answerer(attentive, tokenizer, 2)
    assert sorted(prefixes_read(answerer, by_context, monkeypatch)) == sorted(CONTEXTS)


@pytest.mark.parametrize("max_batch_tokens", [30, 64, 500])
def test_max_batch_tokens_bounds_what_is_read_together(
    tokenizer, attentive, max_batch_tokens, reads
):
    """A context of 300 tokens is read in pieces; only single rows may be longer."""
    answers_to(Answerer(attentive, tokenizer, 6, max_batch_tokens))
    assert all(rows == 1 or rows * length <= max_batch_tokens for rows, length in reads)
    contexts = [shape for shape in reads if shape[1] > 1]
    assert max(length for _, length in contexts) <= max_batch_tokens
    assert max(rows for rows, _ in reads) <= max(max_batch_tokens // 10, 1)


def test_questions_of_several_contexts_are_answered_together(tokenizer, attentive, reads):
    answers_to(Answerer(attentive, tokenizer, 6))
    assert max(rows for rows, _ in reads) == len(PROMPTS)


def test_windows_come_one_after_the_other(tokenizer, attentive, monkeypatch):
    """A crash loses at most one window."""
    monkeypatch.setattr(answering, "WINDOW", 4)
    places = [
        place for batch in Answerer(attentive, tokenizer, 1, 50).answer(PROMPTS) for place in batch
    ]
    assert [place // 4 for place in places] == sorted(place // 4 for place in places)
    assert places != sorted(places)


def test_without_prompts_there_are_no_answers(tokenizer, attentive):
    assert list(Answerer(attentive, tokenizer).answer([])) == []


def test_num_tokens_are_those_of_the_whole_prompt(tokenizer, attentive):
    for (prefix, suffix), answer in zip(
        PROMPTS, answers_to(Answerer(attentive, tokenizer, 2)), strict=True
    ):
        assert answer.num_tokens == len(ids(tokenizer, prefix)) + len(ids(tokenizer, suffix))
        assert answer.seconds > 0


@pytest.mark.parametrize("max_new_tokens", [0, 1, 4])
def test_max_new_tokens(tokenizer, attentive, max_new_tokens):
    whole = answers_to(Answerer(attentive, tokenizer, 6))
    for cut, full in zip(
        answers_to(Answerer(attentive, tokenizer, max_new_tokens)), whole, strict=True
    ):
        assert full.num_new_tokens == 6
        assert cut.num_new_tokens == max_new_tokens
        assert full.text.startswith(cut.text.rstrip("\ufffd"))  # a letter may be cut in two


@pytest.mark.parametrize("max_batch_tokens", [1, 8192])
def test_prompts_longer_than_128_tokens_get_their_whole_answer(tokenizer, max_batch_tokens):
    """The original confused the batch size with the length: one token from 128 on."""
    text = " Ann lives in Oslo and was born there."
    answerer = Answerer(reciter(tokenizer, text), tokenizer, 64, max_batch_tokens)
    prompts = [*PROMPTS, prompt_parts(n_shot_prompt(), "Who?")]
    answers = answers_to(answerer, prompts)
    assert sum(answer.num_tokens > 128 for answer in answers) == len(QUESTIONS) + 1
    assert {answer.text for answer in answers} == {text.strip()}
    assert {answer.num_new_tokens for answer in answers} == {len(ids(tokenizer, text))}
    assert len(ids(tokenizer, text)) > 5


def test_a_guess_ends_before_a_newline(tokenizer):
    answers = answers_to(Answerer(reciter(tokenizer, " Oslo\nBen is a dog"), tokenizer))
    assert {answer.text for answer in answers} == {"Oslo"}
    assert {answer.num_new_tokens for answer in answers} == {len(ids(tokenizer, " Oslo"))}


def test_a_model_that_stops_at_once_gives_the_empty_guess(tokenizer):
    [answer] = answers_to(Answerer(reciter(tokenizer, ""), tokenizer), PROMPTS[:1])
    assert (answer.text, answer.num_new_tokens) == ("", 0)
    others = len(tokenizer) - 1  # each with the logit 0
    assert answer.confidence == pytest.approx(math.exp(10) / (math.exp(10) + others), abs=0.005)


def test_confidence_is_no_answer_probability_where_that_is_the_guess(tokenizer):
    answers = answers_to(Answerer(reciter(tokenizer, f" {NO_ANSWER}"), tokenizer))
    sure = math.exp(10) / (math.exp(10) + len(tokenizer) - 1)
    tokens = len(ids(tokenizer, f" {NO_ANSWER}"))
    for answer in answers:
        assert (answer.text, answer.num_new_tokens) == (NO_ANSWER, tokens)
        assert answer.confidence == pytest.approx(answer.no_answer_probability, rel=1e-5)
        assert answer.confidence == pytest.approx(sure ** (tokens + 1), rel=1e-3)


def test_a_model_sure_of_something_else_gives_no_answer_little_probability(tokenizer):
    [answer] = answers_to(Answerer(reciter(tokenizer, " Oslo"), tokenizer), PROMPTS[:1])
    assert answer.confidence > 0.5 and answer.no_answer_probability < 1e-9


def total_log_prob(answerer: Answerer, prompt: tuple[str, str], guess: list[int]) -> float:
    """Of `guess` after the prompt, read in one pass; a last None means any stop."""
    tokens = [token for part in prompt for token in ids(answerer.tokenizer, part)]
    generated = [token for token in guess if token is not None]
    logits, _ = answerer.model(torch.tensor([tokens + generated]))
    log_probs = logits[0, len(tokens) - 1 :, : answerer.vocab_size].log_softmax(-1)
    stops = sorted(answerer.stop_ids)
    gained = [
        log_probs[at, stops].logsumexp(0) if token is None else log_probs[at, token]
        for at, token in enumerate(guess)
    ]
    return float(sum(gained))


@torch.no_grad()
def test_confidences_are_products_of_token_probabilities_the_stop_included(tokenizer, attentive):
    oslo = ids(tokenizer, " Oslo")
    for model, max_new_tokens, guess in (
        (reciter(tokenizer, " Oslo\nBen"), 64, [*oslo, None]),
        (reciter(tokenizer, " Oslo"), 2, oslo[:2]),  # cut: without the stop
        (attentive, 3, None),
    ):
        answerer = Answerer(model, tokenizer, max_new_tokens)
        for prompt, answer in zip(PROMPTS, answers_to(answerer), strict=True):
            expected = greedy(answerer, prompt, max_new_tokens) if guess is None else guess
            no_answer = [*ids(tokenizer, f" {NO_ANSWER}"), None]
            assert [math.log(answer.confidence), math.log(answer.no_answer_probability)] == (
                pytest.approx(
                    [total_log_prob(answerer, prompt, x) for x in (expected, no_answer)], 1e-4
                )
            )


def greedy(answerer: Answerer, prompt: tuple[str, str], count: int) -> list[int]:
    """The most probable tokens; the whole sequence is read again for each."""
    tokens = [token for part in prompt for token in ids(answerer.tokenizer, part)]
    start = len(tokens)
    for _ in range(count):
        tokens.append(int(answerer.model(torch.tensor([tokens]))[0][0, -1].argmax()))
    return tokens[start:]


def test_padded_vocabulary_rows_are_neither_generated_nor_counted(tokenizer):
    model = reciter(tokenizer, " Oslo")
    before = answers_to(Answerer(model, tokenizer))
    padded = model.lm_head.weight[len(tokenizer) :]
    assert len(padded) > 0
    with torch.no_grad():
        padded += 100.0
    assert_same(answers_to(Answerer(model, tokenizer)), before)


# Thresholds


def thresholded(model, tokenizer, threshold, prompts=PROMPTS, contexts=None) -> list[Answer]:
    answerer = Answerer(model, tokenizer, 6, no_answer_threshold=threshold)
    found: dict[int, Answer] = {}
    for batch in answerer.answer(prompts, contexts):
        found |= batch
    return [found[place] for place in range(len(prompts))]


def test_the_guess_is_the_abstention_exactly_above_the_threshold(tokenizer, attentive):
    free = answers_to(Answerer(attentive, tokenizer, 6))
    middle = sorted(answer.no_answer_probability for answer in free)[len(free) // 2]
    found = thresholded(attentive, tokenizer, middle)
    for answer, unlimited in zip(found, free, strict=True):
        assert answer.no_answer_probability == unlimited.no_answer_probability
        if answer.no_answer_probability > middle:
            assert answer.text == NO_ANSWER
            assert answer.confidence == answer.no_answer_probability
            assert answer.num_new_tokens == len(ids(tokenizer, f" {NO_ANSWER}"))
        else:
            assert answer.text == unlimited.text and answer.confidence == unlimited.confidence
    assert {answer.text == NO_ANSWER for answer in found} == {True, False}


def test_below_the_threshold_an_abstaining_model_gives_the_next_best_guess(tokenizer):
    """A model that abstains after any prompt; all other tokens are equally probable."""
    model = reciter(tokenizer, f" {NO_ANSWER}")
    for answer in thresholded(model, tokenizer, 1.0):
        assert answer.text and answer.text != NO_ANSWER  # "!", as it happens
        assert answer.confidence < 1e-3 < answer.no_answer_probability
    assert all(answer.text == NO_ANSWER for answer in thresholded(model, tokenizer, 0.5))
    silent = reciter(tokenizer, "")  # stops at once, which is an abstention too
    assert all(answer.num_new_tokens for answer in thresholded(silent, tokenizer, 1.0))


def test_probabilities_never_exceed_one(tokenizer):
    """No rounding makes one larger than a threshold of 1."""
    model = reciter(tokenizer, f" {NO_ANSWER}", logit=1000.0)
    for answer in answers_to(Answerer(model, tokenizer)):
        assert answer.no_answer_probability <= 1.0 and answer.confidence <= 1.0
    assert all(answer.text != NO_ANSWER for answer in thresholded(model, tokenizer, 1.0))


def test_nan_is_an_error(tokenizer, attentive):
    broken = copy.deepcopy(attentive)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(UserError, match="the model computes NaN"):
        answers_to(Answerer(broken, tokenizer))


def test_nan_during_decoding_is_an_error(tokenizer):
    """The prompt gives finite numbers, the first new token does not."""
    model = reciter(tokenizer, " Oslo")
    with torch.no_grad():
        model.backbone.embeddings.weight[ids(tokenizer, " Oslo")[0]] = math.nan
    with pytest.raises(UserError, match="the model computes NaN"):
        answers_to(Answerer(model, tokenizer), PROMPTS[:1])


# Batches that are done, and ranks


@pytest.mark.parametrize("window", [2, 5, 512])
@pytest.mark.parametrize("max_batch_tokens", [1, 100, 8192])
def test_batches_that_are_done_are_skipped_and_others_stay_the_same(
    tokenizer, attentive, max_batch_tokens, window, monkeypatch
):
    monkeypatch.setattr(answering, "WINDOW", window)
    answerer = Answerer(attentive, tokenizer, 4, max_batch_tokens)
    batches = list(answerer.answer(PROMPTS))
    whole = {place: answer for batch in batches for place, answer in batch.items()}
    for kept in {0, len(batches) // 2, len(batches) - 1}:
        done = {place for batch in batches[:kept] for place in batch}
        if len(batches[kept]) > 1:
            done.add(next(iter(batches[kept])))  # a batch of which only a part was written
        rest = list(answerer.answer(PROMPTS, done=done))
        assert [list(batch) for batch in rest] == [list(batch) for batch in batches[kept:]]
        for batch in rest:
            for place, answer in batch.items():
                expected = dataclasses.replace(whole[place], seconds=answer.seconds)
                assert answer == expected  # to the last bit


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_batches(tokenizer, attentive, world_size, monkeypatch):
    monkeypatch.setattr(answering, "WINDOW", 5)
    answerer = Answerer(attentive, tokenizer, 4, max_batch_tokens=100)
    whole = [list(batch) for batch in answerer.answer(PROMPTS)]
    shares = [
        [list(batch) for batch in answerer.answer(PROMPTS, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    assert sorted(batch for share in shares for batch in share) == sorted(whole)
    assert world_size > len(whole) or sum(map(bool, shares)) > world_size // 2


@pytest.mark.parametrize("window", [1, 2, 3, 4, 512])
def test_windows_contain_whole_runs_of_one_prefix(window, monkeypatch):
    """Otherwise batches would depend on where a run was cut off."""
    monkeypatch.setattr(answering, "WINDOW", window)
    prefixes = "aaabbcddddda"
    windows = list(answering._windows([(prefix, "?") for prefix in prefixes]))
    places = [sorted(place for run in w.values() for place in run) for w in windows]
    assert [place for some in places for place in some] == list(range(len(prefixes)))
    assert max(map(len, places)) <= window
    for one, other in pairwise(windows):
        assert not one.keys() & other.keys() or window < 5
