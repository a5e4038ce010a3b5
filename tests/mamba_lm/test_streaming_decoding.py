"""One row token by token: greedy as in batches, or sampled."""

import math
from collections import Counter

import pytest
import torch

from common.errors import UserError
from mamba_lm import cuda_graphs, generate
from mamba_lm.choosers import Greedy, Sampler, make_chooser
from mamba_lm.generate import Decoder, Reading, decode, read

VOCABULARY = 31  # of 32 rows: the last is padding
PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5], [7, 9, 3, 2], [28, 4, 6], [0, 0, 1]]
STOPS = [2, 3, 5, 8, 13, 21]


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(make_model):
    """A model with high probabilities, the highest for its padded row."""
    model = make_model(tie_embeddings=False)
    model.lm_head.weight *= 3
    model.lm_head.weight[VOCABULARY:] *= 30
    return model


@pytest.fixture(scope="module", params=PROMPTS, ids=str)
def reading(request, model) -> Reading:
    return read(model, [request.param], vocab_size=VOCABULARY)


@pytest.fixture(params=[False, True], ids=["step by step", "graphs"])
def graphs(request, monkeypatch):
    """Without and with CUDA graphs; the capture is replaced: a replay runs the steps again."""
    monkeypatch.setattr(generate, "is_captured", lambda model: request.param)
    monkeypatch.setattr(cuda_graphs, "capture", lambda run, pool: (run() or run, (0, 7)))
    cuda_graphs._graphs.clear()
    yield
    assert bool(cuda_graphs._graphs) == request.param
    cuda_graphs._graphs.clear()


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 12])
@pytest.mark.parametrize("stops", [STOPS, [30], []], ids=str)
def test_a_stream_equals_decode(max_new_tokens, stops, model, reading, graphs):
    [wanted] = decode(model, reading, stops, max_new_tokens, VOCABULARY)
    for _ in range(2):  # the second time graphs exist
        decoder = Decoder(model, reading, stops, max_new_tokens, VOCABULARY)
        for _ in range(2):
            assert list(decoder.stream()) == wanted.token_ids
            assert decoder.log_probs.item() == pytest.approx(wanted.log_prob, abs=1e-4)


def test_a_token_is_yielded_before_the_next_is_computed(model, monkeypatch):
    steps = []
    step = model.stepper()
    monkeypatch.setattr(model, "stepper", lambda: lambda *args: steps.append(args) or step(*args))
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    for yielded, _ in enumerate(Decoder(model, reading, [], 5, VOCABULARY).stream()):
        assert len(steps) == yielded


def test_the_reading_does_not_change(model):
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    before = [tensor.clone() for tensor in (reading.log_probs, *reading.state.tensors)]
    list(Decoder(model, reading, [], 5, VOCABULARY).stream())
    after = (reading.log_probs, *reading.state.tensors)
    assert all(map(torch.equal, before, after))


def test_nan_ends_a_stream(model):
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    broken = reading._replace(log_probs=torch.full_like(reading.log_probs, math.nan))
    for chooser in (Greedy(), Sampler(temperature=1.0)):
        decoder = Decoder(model, broken, STOPS, 5, VOCABULARY, chooser)
        assert list(decoder.stream()) == [] and math.isnan(decoder.log_probs.item())


def test_the_probability_of_sampled_tokens_is_that_of_the_model(model):
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    decoder = Decoder(model, reading, [30], 6, VOCABULARY, Sampler(temperature=3.0, seed=5))
    drawn = list(decoder.stream())
    assert drawn != decode(model, reading, [30], 6, VOCABULARY)[0].token_ids
    ids = [3, 1, 4, *drawn]
    after = model(torch.tensor([ids]))[0][0, :, :VOCABULARY].log_softmax(dim=-1)
    log_probs = [after[2 + n, token].item() for n, token in enumerate(drawn)]
    stopped = [after[-1, 30].item()] if len(drawn) < 6 else []
    assert decoder.log_probs.item() == pytest.approx(sum(log_probs + stopped), abs=1e-4)


# Sampling

LOG_PROBS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def sample(chooser: Greedy | Sampler, times: int) -> list[int]:
    rows, places = LOG_PROBS.expand(times, -1), torch.arange(times)
    return chooser.choose(rows, torch.tensor([], dtype=torch.long), places).token_ids.tolist()


def shares(chooser: Greedy | Sampler, draws: int = 4000) -> list[float]:
    counts = Counter(sample(chooser, draws))
    return [counts[token] / draws for token in range(len(LOG_PROBS))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.685, 0.247, 0.062, 0.007]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1.0, "top_k": 9}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_p": 0.9}, [0.526, 0.316, 0.158, 0]),
        ({"temperature": 1.0, "top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_p": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.6}, [0.564, 0.436, 0, 0]),
        ({"temperature": 1e-320}, [1, 0, 0, 0]),
        ({"temperature": 1e30}, [0.25] * 4),
        ({}, [1, 0, 0, 0]),
    ],
    ids=str,
)
def test_distribution_of_samples(settings, expected):
    assert shares(make_chooser(**settings)) == pytest.approx(expected, abs=0.03)
    excluded = [token for token, share in enumerate(expected) if share == 0]
    assert all(shares(make_chooser(**settings))[token] == 0 for token in excluded)


def test_equal_seeds_give_equal_samples():
    drawn = [sample(Sampler(temperature=1.0, seed=seed), 50) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}])
def test_top_k_and_top_p_need_a_temperature(settings):
    with pytest.raises(UserError, match="give a temperature above 0"):
        make_chooser(**settings)
