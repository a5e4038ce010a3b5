"""One row token by token: as batches are decoded, or drawn from what a sampler leaves."""

import math
from collections import Counter

import pytest
import torch

from common.errors import UserError
from mamba_lm import cuda_graphs, streaming
from mamba_lm.generate import Reading, decode, read
from mamba_lm.streaming import Sampler, Stream

VOCABULARY = 31  # of 32 rows: the last is padding
PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5], [7, 9, 3, 2], [28, 4, 6], [0, 0, 1]]
STOPS = [2, 3, 5, 8, 13, 21]


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(make_model):
    """A model that is sure of itself, most of all of its padded row."""
    model = make_model(tie_embeddings=False)
    model.lm_head.weight *= 3
    model.lm_head.weight[VOCABULARY:] *= 30
    return model


@pytest.fixture(scope="module", params=PROMPTS, ids=str)
def reading(request, model) -> Reading:
    return read(model, [request.param], vocab_size=VOCABULARY)


@pytest.fixture(params=[False, True], ids=["step by step", "graphs"])
def graphs(request, monkeypatch):
    """Steps by CUDA graphs, but for the capture: a replay is the steps themselves, run again."""
    monkeypatch.setattr(streaming, "is_captured", lambda model: request.param)
    monkeypatch.setattr(cuda_graphs, "capture", lambda run, pool: (run() or run, (0, 7)))
    cuda_graphs._graphs.clear()
    yield
    assert bool(cuda_graphs._graphs) == request.param
    cuda_graphs._graphs.clear()


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 12])
@pytest.mark.parametrize("stops", [STOPS, [30], []], ids=str)
def test_a_stream_is_what_decode_gives(max_new_tokens, stops, model, reading, graphs):
    [wanted] = decode(model, reading, stops, max_new_tokens, VOCABULARY)
    for _ in range(2):  # the second time graphs are there
        stream = Stream(model, reading, stops, max_new_tokens, VOCABULARY)
        assert list(stream) == wanted.token_ids
        assert stream.log_prob == pytest.approx(wanted.log_prob, abs=1e-4)


def test_a_token_is_told_before_the_next_is_computed(model, monkeypatch):
    steps = []
    step = model.stepper()
    monkeypatch.setattr(model, "stepper", lambda: lambda *args: steps.append(args) or step(*args))
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    for told, _ in enumerate(Stream(model, reading, [], 5, VOCABULARY)):
        assert len(steps) == told


def test_the_reading_is_left_as_it_was(model):
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    before = [tensor.clone() for tensor in (reading.log_probs, *reading.state.tensors)]
    list(Stream(model, reading, [], 5, VOCABULARY))
    after = (reading.log_probs, *reading.state.tensors)
    assert all(map(torch.equal, before, after))


def test_nan_ends_a_stream_and_is_told(model):
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    broken = reading._replace(log_probs=torch.full_like(reading.log_probs, math.nan))
    for sampler in (Sampler(), Sampler(temperature=1.0)):
        stream = Stream(model, broken, STOPS, 5, VOCABULARY, sampler)
        assert list(stream) == [] and math.isnan(stream.log_prob)


def test_the_probability_of_what_was_drawn_is_the_models_own(model):
    reading = read(model, [[3, 1, 4]], vocab_size=VOCABULARY)
    stream = Stream(model, reading, [30], 6, VOCABULARY, Sampler(temperature=3.0, seed=5))
    drawn = list(stream)
    assert drawn != decode(model, reading, [30], 6, VOCABULARY)[0].token_ids
    ids = [3, 1, 4, *drawn]
    after = model(torch.tensor([ids]))[0][0, :, :VOCABULARY].log_softmax(dim=-1)
    log_probs = [after[2 + n, token].item() for n, token in enumerate(drawn)]
    stopped = [after[-1, 30].item()] if len(drawn) < 6 else []
    assert stream.log_prob == pytest.approx(sum(log_probs + stopped), abs=1e-4)


# Sampling

LOG_PROBS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def shares(sampler: Sampler, draws: int = 4000) -> list[float]:
    counts = Counter(sampler(LOG_PROBS) for _ in range(draws))
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
def test_what_is_drawn(settings, expected):
    assert shares(Sampler(**settings)) == pytest.approx(expected, abs=0.03)
    barred = [token for token, share in enumerate(expected) if share == 0]
    assert all(shares(Sampler(**settings))[token] == 0 for token in barred)


def test_equal_seeds_draw_equally():
    def draw(seed: int) -> list[int]:
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler(LOG_PROBS) for _ in range(50)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}])
def test_a_choice_of_what_is_drawn_needs_a_temperature(settings):
    with pytest.raises(UserError, match="give a --temperature"):
        Sampler(**settings)
