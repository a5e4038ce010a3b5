"""Reading, greedy decoding and scores against a plain loop that reads all tokens for each step."""

import pytest
import torch

from mamba_lm import cuda_graphs, generate, stepper
from mamba_lm.generate import Generation, continuation_log_prob, decode, read

VOCABULARY = 31  # of 32 rows: the last is padding
PROMPTS = [[3, 1, 4], [15], [9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2], [28, 4, 6], [0, 0, 1], [30]]
STOPS = [2, 3, 5, 8, 13, 21]


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=[{}, {"bcdt_rms_eps": 1e-6}], ids=["mamba", "falcon"])
def model(request, make_model):
    """A model with high probabilities, the highest for its padded row."""
    model = make_model(tie_embeddings=False, **request.param)
    model.lm_head.weight *= 3
    model.lm_head.weight[VOCABULARY:] *= 30
    return model


@pytest.fixture(scope="module")
def reading(model):
    return read(model, PROMPTS, vocab_size=VOCABULARY)


def log_probs_after(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (l, v) of the token after each one, by one forward pass."""
    logits, _ = model(torch.tensor([ids]))
    return logits[0, :, :VOCABULARY].double().log_softmax(dim=-1)


def decode_plainly(model, prompt: list[int], stops: list[int], max_new_tokens: int) -> Generation:
    token_ids, log_prob = [], 0.0
    while True:
        after = log_probs_after(model, prompt + token_ids)[-1]
        choice = after.argmax().item()
        if choice in stops:
            return Generation(token_ids, log_prob + after[stops].exp().sum().log().item())
        if len(token_ids) == max_new_tokens:
            return Generation(token_ids, log_prob)
        token_ids.append(choice)
        log_prob += after[choice].item()


@pytest.fixture(params=[False, True], ids=["step by step", "graphs"])
def graphs(request, monkeypatch):
    """Without and with CUDA graphs; the capture is replaced: a replay runs the steps again.
    Returns the sizes of the captured graphs."""
    sizes, shared = [], []

    def replay_by_running(run, pool):
        assert pool == ((0, 7) if shared[-1] else None)
        run()
        return run, (0, 7)

    def counted(step, start, steps, beside):
        sizes.append(len(start[0]))
        shared.append(beside is not None)
        return cuda_graphs.StepGraph(step, start, steps, beside)

    monkeypatch.setattr(generate, "is_captured", lambda model: request.param)
    monkeypatch.setattr(generate, "StepGraph", counted)
    monkeypatch.setattr(cuda_graphs, "capture", replay_by_running)
    cuda_graphs._graphs.clear()
    yield sizes
    assert bool(sizes) <= request.param
    # All but the first share its memory; after weights move, the largest is first again.
    assert shared == [size != sizes[0] for size in sizes]
    cuda_graphs._graphs.clear()


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 12])
@pytest.mark.parametrize("stops", [STOPS, [30], []], ids=str)
def test_decode_equals_a_plain_loop(max_new_tokens, stops, model, reading, graphs):
    got = decode(model, reading, stops, max_new_tokens, VOCABULARY)
    for prompt, generation in zip(PROMPTS, got, strict=True):
        wanted = decode_plainly(model, prompt, stops, max_new_tokens)
        assert generation.token_ids == wanted.token_ids
        assert generation.log_prob == pytest.approx(wanted.log_prob, abs=1e-4)


def test_rows_that_stop_at_different_steps_equal_rows_alone(model, reading, graphs):
    together = decode(model, reading, STOPS, 12, VOCABULARY)
    lengths = {len(generation.token_ids) for generation in together}
    assert len(lengths) >= 4 and {0, 12} <= lengths
    for row, generation in enumerate(together):
        alone = decode(model, reading.fork(torch.tensor([row])), STOPS, 12, VOCABULARY)
        assert alone[0].token_ids == generation.token_ids


def test_stop_ids_may_come_as_a_set_and_are_never_in_the_output(model, reading):
    for stops, some_are_in_it in [(set(), True), (set(STOPS), False)]:
        generations = decode(model, reading, stops, 12, VOCABULARY)
        token_ids = {token for generation in generations for token in generation.token_ids}
        assert bool(token_ids & set(STOPS)) == some_are_in_it


def test_vocab_size_excludes_padded_rows(model, reading):
    unlimited = decode(model, read(model, PROMPTS), [], 12)
    assert any(VOCABULARY in generation.token_ids for generation in unlimited)
    limited = decode(model, reading, [], 12, VOCABULARY)
    assert max(max(generation.token_ids) for generation in limited) < VOCABULARY
    assert reading.log_probs.shape == (len(PROMPTS), VOCABULARY)
    assert torch.allclose(reading.log_probs.exp().sum(1), torch.ones(len(PROMPTS)))


@pytest.mark.parametrize("graphs", [True], indirect=True)
def test_graphs_are_kept_until_weights_move(model, reading, graphs):
    first = decode(model, reading, STOPS, 12, VOCABULARY)
    captured = list(graphs)
    assert captured[0] == len(PROMPTS) and captured == sorted(captured, reverse=True)
    assert len(captured) == len(set(captured)) > 1
    assert decode(model, reading, STOPS, 12, VOCABULARY) == first
    assert graphs == captured  # no new ones
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    assert decode(model, reading, STOPS, 12, VOCABULARY) == first
    assert graphs == 2 * captured


@pytest.mark.parametrize("graphs", [True], indirect=True)
def test_graphs_do_not_keep_the_stops_of_another_call(model, reading, graphs):
    """A captured address would be that of the stops of the first call."""
    decode(model, reading, STOPS, 12, VOCABULARY)
    others = [stop + 1 for stop in STOPS]
    got = decode(model, reading, others, 12, VOCABULARY)
    assert graphs.count(len(PROMPTS)) == 1
    for prompt, generation in zip(PROMPTS, got, strict=True):
        assert generation.token_ids == decode_plainly(model, prompt, others, 12).token_ids


@pytest.mark.parametrize("graphs", [True], indirect=True)
def test_many_rows_use_no_graph_until_few_are_left(model, reading, graphs, monkeypatch):
    monkeypatch.setattr(generate, "GRAPH_ROWS", 6)
    got = decode(model, reading, STOPS, 12, VOCABULARY)
    assert graphs and max(graphs) <= 6
    for prompt, generation in zip(PROMPTS, got, strict=True):
        assert generation.token_ids == decode_plainly(model, prompt, STOPS, 12).token_ids


def test_which_models_are_captured(make_model, monkeypatch):
    model = make_model()
    assert not stepper.is_captured(model)  # on the CPU
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert stepper.is_captured(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device_type: True)
        assert not stepper.is_captured(model)
    for module in (model, model.lm_head, model.backbone.norm_f, model.backbone.layers[0].mixer):
        hook = module.register_forward_hook(lambda *args: None)
        assert not stepper.is_captured(model)
        hook.remove()
    assert stepper.is_captured(model)


def test_sizes_of_graphs():
    sizes = [cuda_graphs.graph_size(rows) for rows in range(1, 18)]
    assert sizes == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]


def test_decode_does_not_change_the_reading(model, reading, graphs):
    before = decode(model, reading, STOPS, 12, VOCABULARY)
    assert decode(model, reading, STOPS, 12, VOCABULARY) == before


def test_read_continues_from_the_state_of_each_row(model, reading, assert_near):
    suffixes = [[1, 2], [3, 4, 5, 6], [7], [8], [9, 10], [11], [12, 13, 14], [15]]
    got = read(model, suffixes, reading.state, VOCABULARY)
    for row, (prompt, suffix) in enumerate(zip(PROMPTS, suffixes, strict=True)):
        assert_near(reading.log_probs[row], log_probs_after(model, prompt)[-1], 1e-5)
        assert_near(got.log_probs[row], log_probs_after(model, prompt + suffix)[-1], 1e-5)


def test_a_forked_reading_decodes_as_its_rows(model, reading):
    index = [4, 0, 4, 7, 2]
    forked = decode(model, reading.fork(torch.tensor(index)), STOPS, 12, VOCABULARY)
    whole = decode(model, reading, STOPS, 12, VOCABULARY)
    assert [g.token_ids for g in forked] == [whole[row].token_ids for row in index]


@pytest.mark.parametrize("token_ids", [[6], [17, 0, 6, 30]], ids=str)
@pytest.mark.parametrize("stops", [STOPS, [30]], ids=str)
def test_continuation_log_prob_is_the_sum_of_its_tokens_and_the_stop(
    token_ids, stops, model, reading, assert_near
):
    got = continuation_log_prob(model, reading, token_ids, stops, VOCABULARY)
    wanted = []
    for prompt in PROMPTS:
        after = log_probs_after(model, prompt + token_ids)[len(prompt) - 1 :]
        tokens = sum(after[step, token] for step, token in enumerate(token_ids))
        wanted.append(tokens + after[-1, stops].exp().sum().log())
    assert_near(got, torch.stack(wanted), 1e-5)


def test_continuation_log_prob_of_the_greedy_answer_equals_that_of_decode(model, reading):
    """The confidence of a guess and that of "I don't know." are comparable."""
    generations = decode(model, reading, STOPS, 12, VOCABULARY)
    ended = [row for row, g in enumerate(generations) if 0 < len(g.token_ids) < 12]
    assert ended
    for row in ended:
        one = reading.fork(torch.tensor([row]))
        token_ids, log_prob = generations[row]
        got = continuation_log_prob(model, one, token_ids, STOPS, VOCABULARY)
        assert got.item() == pytest.approx(log_prob, abs=1e-4)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("continuation", [[4], [7, 1, 4, 4, 9, 1, 6]], ids=str)
@pytest.mark.parametrize("prompt", PROMPTS[:4], ids=str)
def test_read_and_score_is_both(prompt, continuation, is_fused, model, monkeypatch, assert_near):
    state = read(model, [[5, 6]]).state
    wanted = read(model, [prompt], state, VOCABULARY)
    [log_prob] = continuation_log_prob(model, wanted, continuation, STOPS, VOCABULARY).tolist()
    if not is_fused:
        monkeypatch.setattr(model, "encode_each", lambda *args: None)
    got, score = generate.read_and_score(model, prompt, state, continuation, STOPS, VOCABULARY)
    assert score == pytest.approx(log_prob, abs=1e-4)
    assert_near(got.log_probs, wanted.log_probs, 1e-5)
    for one, other in zip(got.state.tensors, wanted.state.tensors, strict=True):
        assert_near(one, other, 1e-5)
