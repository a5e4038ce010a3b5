"""Decoding constrained to given sequences, against a search that reads all tokens for each step."""

import random

import pytest
import torch

from mamba_lm.choosers import Constrained, TokenSequence
from mamba_lm.generate import decode, prefill, read
from mamba_lm.models.mamba import MambaConfig, MambaLM

VOCABULARY, STOPS = 12, {0, 1}


@pytest.fixture(scope="module")
def model() -> MambaLM:
    torch.manual_seed(0)
    config = MambaConfig(
        VOCABULARY,
        d_model=16,
        n_layer=2,
        d_state=4,
        tie_embeddings=False,
        pad_vocab_size_multiple=8,
    )
    model = MambaLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.lm_head.weight[VOCABULARY:] = 9.0  # padded rows: never generated
    return model


def decode_constrained(model, reading, sequences):
    chooser = Constrained(sequences)
    return decode(model, reading, STOPS, chooser.max_new_tokens, VOCABULARY, chooser)


def whole_sequences(sequences: list[list[int]]) -> list[TokenSequence]:
    return [TokenSequence(s, [False] * (len(s) - 1) + [True]) for s in sequences]


@torch.no_grad()
def brute_force(model: MambaLM, prompt: list[int], sequences: list[list[int]]):
    """The greedy choice; all tokens are read again for each new one."""
    generated, total = [], 0.0
    while True:
        logits = model(torch.tensor([prompt + generated]))[0][0, -1, :VOCABULARY]
        log_probs = logits.log_softmax(-1)
        possible = [s for s in sequences if s[: len(generated)] == generated]
        tokens = {s[len(generated)] for s in possible if len(s) > len(generated)}
        best_stop = max(float(log_probs[stop]) for stop in STOPS)
        best = max(tokens, key=lambda token: float(log_probs[token]), default=None)
        if generated in sequences and (best is None or best_stop >= log_probs[best]):
            return generated, total + float(log_probs[sorted(STOPS)].logsumexp(0))
        generated = [*generated, best]
        total += float(log_probs[best])


@pytest.mark.parametrize("seed", range(10))
def test_sequences_equal_those_of_a_search_without_states(model, seed):
    rng = random.Random(seed)

    def sequence(longest: int) -> list[int]:
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(1, longest))]

    prompts = [sequence(6) for _ in range(9)]
    choices = [[sequence(4) for _ in range(rng.randint(1, 30))] for _ in prompts]
    with torch.inference_mode():
        reading = read(model, prompts, prefill(model, [[]] * len(prompts)), VOCABULARY)
        rows = [whole_sequences(sequences) for sequences in choices]
        found = decode_constrained(model, reading, rows)
    for prompt, sequences, (ids, log_prob) in zip(prompts, choices, found, strict=True):
        expected, total = brute_force(model, prompt, sequences)
        assert ids == expected
        assert log_prob == pytest.approx(total, abs=1e-4)
    assert len({len(ids) for ids, _ in found}) > 1


def test_the_result_of_free_decoding_is_chosen_if_it_is_allowed(model):
    """With the same log-probability, whatever the other sequences are."""
    prompts = [[token] for token in range(2, VOCABULARY)]
    reading = read(model, prompts, prefill(model, [[]] * len(prompts)), VOCABULARY)
    free = decode(model, reading, STOPS, 30, VOCABULARY)
    ended = [row for row, (ids, _) in enumerate(free) if 0 < len(ids) < 30]
    assert ended
    choices = [whole_sequences([[3], [4, 5], free[row].token_ids]) for row in ended]
    found = decode_constrained(model, reading.fork(torch.tensor(ended)), choices)
    for row, generation in zip(ended, found, strict=True):
        assert generation.token_ids == free[row].token_ids
        assert generation.log_prob == pytest.approx(free[row].log_prob, abs=1e-4)


def test_a_sequence_may_end_after_several_tokens(model):
    """One sequence with several ends equals several sequences."""
    prompts = [[token] for token in range(2, VOCABULARY)]
    reading = read(model, prompts, prefill(model, [[]] * len(prompts)), VOCABULARY)
    lengths = set()
    for seed in range(8):
        long = random.Random(seed).sample(range(2, VOCABULARY), 5)
        one = [[TokenSequence(long, [True, False, True, True, True])]] * len(prompts)
        many = [whole_sequences([long[:n] for n in (1, 3, 4, 5)])] * len(prompts)
        found, same = (decode_constrained(model, reading, r) for r in (one, many))
        assert found == same
        lengths |= {len(ids) for ids, _ in found}
        assert one[0][0].contains(long[:3])
        assert not one[0][0].contains(long[:2]) and not one[0][0].contains(long[1:2])
    assert len(lengths) > 2


@pytest.mark.parametrize(
    "sequences", [[], [TokenSequence([3, 4], [True, False])], [TokenSequence([], [])]]
)
def test_a_row_that_could_not_end_is_an_error(model, sequences):
    reading = read(model, [[5]], prefill(model, [[]]), VOCABULARY)
    with pytest.raises(ValueError, match="each row needs sequences"):
        decode_constrained(model, reading, [sequences])
