"""The model against `transformers`, float64 and itself: whole, in pieces, padded, forked."""

import math

import pytest
import torch
import torch.nn.functional as F

from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.models.modules import last_inputs
from mamba_lm.models.state import MambaState
from mamba_lm.tensors import right_pad

VARIANTS = {
    "mamba": {},
    "odd widths": {"d_model": 33, "expand": 3},
    "untied, biases": {"tie_embeddings": False, "proj_bias": True, "norm_eps": 0.1},
    "no conv bias, short conv": {"conv_bias": False, "d_conv": 2, "residual_in_fp32": False},
    "falcon": {"bcdt_rms_eps": 1e-6},
    "falcon, large epsilon": {"bcdt_rms_eps": 0.5, "d_model": 33, "tie_embeddings": False},
}
PRECISIONS = [(torch.float32, 1e-4), (torch.float64, 1e-9)]
variants = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
precisions = pytest.mark.parametrize("dtype, tolerance", PRECISIONS, ids=["float32", "float64"])


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 31, shape)


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tensors(state: MambaState) -> dict[str, torch.Tensor]:
    return {str(place): tensor for place, tensor in enumerate(state.tensors)}


def hidden_states(state: MambaState) -> tuple[torch.Tensor, ...]:
    """h of each layer: the second half of what a Mamba-1 state consists of."""
    return state.tensors[len(state.tensors) // 2 :]


# Parity


@variants
@precisions
@pytest.mark.parametrize("length", [1, 3, 63, 257])
def test_equals_transformers(
    changes, dtype, tolerance, length,
    make_model, as_transformers, assert_near, gradients, monkeypatch, request,
):  # fmt: skip
    model = make_model(**changes).to(dtype)
    theirs = as_transformers(model)
    if dtype == torch.float64:
        request.getfixturevalue("float64_throughout")
    ids = random_ids(2, length)
    logits, _ = model(ids)
    wanted = theirs(ids, use_cache=False, labels=ids if length > 1 else None)
    assert logits.dtype == wanted.logits.dtype == dtype
    assert_near(logits, wanted.logits, tolerance)
    if length > 1:
        loss = next_token_loss(logits, ids)
        assert_near(loss, wanted.loss, tolerance)
        assert_near(gradients(model, loss), gradients(theirs, wanted.loss), tolerance)


@variants
def test_float32_equals_float64(changes, make_model, assert_near, gradients):
    ids = random_ids(2, 100)
    got, wanted = make_model(**changes), make_model(**changes).double()
    (logits, state), (wanted_logits, wanted_state) = got(ids), wanted(ids)
    assert_near(logits, wanted_logits, 1e-4)
    assert_near(tensors(state), tensors(wanted_state), 1e-4)
    losses = next_token_loss(logits, ids), next_token_loss(wanted_logits, ids)
    assert_near(gradients(got, losses[0]), gradients(wanted, losses[1]), 1e-4)


@variants
def test_bfloat16_stays_close_and_keeps_the_state_in_float32(changes, make_model, assert_near):
    ids = random_ids(2, 40)
    wanted, _ = make_model(**changes)(ids)
    model = make_model(**changes).bfloat16()
    logits, state = model(ids)
    assert logits.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in hidden_states(state)} == {torch.float32}
    assert_near(logits, wanted, 0.1)
    _, middle = model(ids[:, :13])
    assert_near(model(ids[:, 13:], middle)[0], logits[:, 13:], 0.05)


# State


@variants
@precisions
@pytest.mark.parametrize("sizes", [[1] * 11, [5, 1, 3, 2], [2, 0, 9], [8, 3]], ids=str)
def test_pieces_equal_the_whole(changes, dtype, tolerance, sizes, make_model, assert_near):
    model = make_model(**changes).to(dtype)
    ids = random_ids(3, 11)
    wanted, wanted_state = model(ids)
    state, logits = None, []
    for piece in ids.split(sizes, dim=1):
        piece_logits, state = model(piece, state)
        logits.append(piece_logits)
    assert_near(torch.cat(logits, dim=1), wanted, tolerance)
    assert_near(tensors(state), tensors(wanted_state), tolerance)


@precisions
@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5], [9]], ids=str)
def test_pieces_across_a_fork_equal_the_whole(dtype, tolerance, sizes, make_model, assert_near):
    model = make_model().to(dtype)
    prefixes, index, suffixes = random_ids(2, 7), torch.tensor([1, 0, 1, 1]), random_ids(4, 9)
    _, state = model(prefixes)
    state, logits = state.fork(index), []
    for piece in suffixes.split(sizes, dim=1):
        piece_logits, state = model(piece, state)
        logits.append(piece_logits)
    wanted, wanted_state = model(torch.cat([prefixes[index], suffixes], dim=1))
    assert_near(torch.cat(logits, dim=1), wanted[:, 7:], tolerance)
    assert_near(tensors(state), tensors(wanted_state), tolerance)


def test_reading_leaves_the_given_state_as_it_was(make_model):
    model = make_model()
    _, state = model(random_ids(2, 5))
    before = state.map(torch.clone)
    first, _ = model(random_ids(2, 6), state)
    assert all(map(torch.equal, state.tensors, before.tensors))
    assert not torch.equal(first, model(random_ids(2, 6), state)[0])


@pytest.mark.parametrize("index", [[2, 0], [1, 1, 1, 0], [0], []], ids=str)
def test_fork_takes_rows_as_often_as_named(index, make_model):
    _, state = make_model()(random_ids(3, 6))
    forked = state.fork(torch.tensor(index, dtype=torch.long))
    assert forked.batch_size == len(index)
    for name, tensor in tensors(forked).items():
        assert torch.equal(tensor, tensors(state)[name][index])


def test_concatenate_joins_rows_in_order(make_model):
    _, state = make_model()(random_ids(5, 6))
    parts = [state.fork(torch.tensor(rows)) for rows in ([0], [1, 2, 3], [4])]
    joined = MambaState.concatenate(parts)
    assert joined.batch_size == 5
    for name, tensor in tensors(joined).items():
        assert torch.equal(tensor, tensors(state)[name])


def test_detach_cuts_the_gradient_and_nothing_else(make_model):
    _, state = make_model()(random_ids(2, 6))
    for name, tensor in tensors(state.detach()).items():
        assert tensors(state)[name].requires_grad and not tensor.requires_grad
        assert torch.equal(tensor, tensors(state)[name])


def test_state_moves_between_dtypes_and_devices(make_model):
    _, state = make_model()(random_ids(2, 6))
    assert {tensor.dtype for tensor in tensors(state.to(torch.float64)).values()} == {torch.float64}
    assert {tensor.device.type for tensor in tensors(state.to("meta")).values()} == {"meta"}


@pytest.mark.parametrize("length", [1, 2, 3, 64])
@pytest.mark.parametrize("padded", [False, True])
def test_num_bytes_is_all_memory_that_a_state_keeps_alive(length, padded, make_model):
    model = make_model()
    with torch.inference_mode():
        lengths = torch.full((2,), length) if padded else None
        _, state = model.encode(random_ids(2, length), lengths=lengths)
    assert state.num_bytes == 2 * (2 * 48 * 3 * 4 + 2 * 48 * 7 * 4)  # layers x (conv + ssm)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.tensors}
    assert sum(storages.values()) == state.num_bytes


# Padding


LENGTHS = [0, 1, 2, 3, 4, 9]


def padding_mask(where: str, lengths: list[int], size: int) -> torch.Tensor:
    """Rows with `lengths` real tokens; "middle" pads between their first half and their second."""
    mask = torch.zeros(len(lengths), size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        places = {
            "left": torch.arange(size - length, size),
            "right": torch.arange(length),
            "middle": (torch.arange(length) - length // 2) % size,
            "scattered": torch.randperm(size)[:length],
        }
        mask[row, places[where]] = True
    return mask


@precisions
@pytest.mark.parametrize("where", ["left", "right", "middle", "scattered"])
@pytest.mark.parametrize("carried", [[0, 1, 2, 3, 4, 8], None], ids=["carried", "fresh"])
@pytest.mark.parametrize("changes", [{}, {"bcdt_rms_eps": 1e-6}, {"d_conv": 2}], ids=str)
def test_padded_rows_equal_rows_read_alone(
    changes, carried, where, dtype, tolerance, make_model, assert_near
):
    model = make_model(**changes).to(dtype)
    rows, state = range(len(LENGTHS)), None
    singles = [None] * len(rows)
    if carried is not None:
        _, state = model.encode(random_ids(len(rows), 8), lengths=torch.tensor(carried))
        singles = [state.fork(torch.tensor([row])) for row in rows]
    mask = padding_mask(where, LENGTHS, size=11)
    ids = random_ids(*mask.shape)  # whatever stands under the padding is no token
    logits, new_state = model(ids, state, mask)
    for row in rows:
        wanted, wanted_state = model(ids[row : row + 1, mask[row]], singles[row])
        if LENGTHS[row]:
            assert_near(logits[row, mask[row]], wanted[0], tolerance)
        assert_near(tensors(new_state.fork(torch.tensor([row]))), tensors(wanted_state), tolerance)


def test_rows_without_a_real_token_keep_their_state_to_the_bit(make_model):
    model = make_model()
    _, state = model(random_ids(3, 5))
    _, read_on = model(random_ids(3, 4), state, torch.zeros(3, 4, dtype=torch.bool))
    _, read_nothing = model(random_ids(3, 0), state)
    for name, tensor in tensors(state).items():
        assert torch.equal(tensors(read_on)[name], tensor)
        assert torch.equal(tensors(read_nothing)[name], tensor)


def test_padding_neither_gets_nor_spoils_gradients(make_model, assert_near, gradients):
    model = make_model(tie_embeddings=False).double()
    ids = random_ids(3, 10) % 30
    mask = padding_mask("scattered", [4, 10, 1], size=10)
    logits, state = model(ids.masked_fill(~mask, 30), mask=mask)
    loss = logits[mask].square().sum() + sum(h.square().sum() for h in hidden_states(state))
    got = gradients(model, loss)
    assert not got["backbone.embeddings.weight"][30].any()
    wanted_loss = 0.0
    for row in range(3):
        logits, state = model(ids[row : row + 1, mask[row]])
        wanted_loss = (
            wanted_loss
            + logits.square().sum()
            + sum(h.square().sum() for h in hidden_states(state))
        )
    assert_near(got, gradients(model, wanted_loss), 1e-9)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_last_inputs_by_definition(length, carried, padded, count):
    x = torch.randn(4, length, 5)
    before = torch.randn(4, count, 5) if carried else None
    lengths = torch.randint(0, length + 1, (4,)) if padded else torch.full((4,), length)
    got = last_inputs(x, before, count, lengths if padded else None)
    for row in range(4):
        seen = torch.zeros(count, 5) if before is None else before[row]
        assert torch.equal(got[row], torch.cat([seen, x[row, : lengths[row]]])[-count:])


@pytest.mark.parametrize("count", [1, 3])
def test_last_inputs_of_a_row_are_its_own(count):
    """Whatever `lengths` says: it counts no more than l inputs, and no fewer than none."""
    x, before = torch.randn(4, 7, 5), torch.randn(4, count, 5)
    got = last_inputs(x, before, count, torch.tensor([9, 7, -2, 4]))
    assert torch.equal(got, last_inputs(x, before, count, torch.tensor([7, 7, 0, 4])))


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("MAMBA_SCAN_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("carried", [False, True])
def test_lengths_beyond_a_row_end_with_it(carried, backend, make_model):
    model, ids = make_model(), random_ids(4, 6)
    state = model.encode(random_ids(4, 5))[1] if carried else None
    hidden, after = model.encode(ids, state, torch.tensor([11, -3, 4, 7]))
    wanted, wanted_after = model.encode(ids, state, torch.tensor([6, 0, 4, 6]))
    assert torch.equal(hidden, wanted)
    for name, tensor in tensors(wanted_after).items():
        assert torch.equal(tensors(after)[name], tensor), name
    _, alone = model.encode(ids[:1], None if state is None else state.fork(torch.tensor([0])))
    for name, tensor in tensors(alone).items():
        assert torch.allclose(tensors(after)[name][:1], tensor, atol=1e-5), name


@pytest.mark.parametrize("lengths", [[3], [3, 3, 3], [[3], [3]]], ids=str)
def test_lengths_of_another_shape_are_errors(lengths, backend, make_model):
    with pytest.raises(ValueError, match=r"lengths has shape .*, expected \(2,\)"):
        make_model().encode(random_ids(2, 4), lengths=torch.tensor(lengths))


def test_a_mask_of_numbers_is_one_of_truths(backend, make_model):
    """A sum of them would be lengths beyond the row."""
    model, ids = make_model(), random_ids(2, 6)
    mask = padding_mask("scattered", [6, 4], size=6)
    logits, state = model(ids, mask=mask)
    same, same_state = model(ids, mask=2 * mask.int())
    assert torch.equal(same[mask], logits[mask])
    for name, tensor in tensors(state).items():
        assert torch.equal(tensors(same_state)[name], tensor), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_know_nothing_of_each_other(padded, value, backend, make_model):
    """Nor of what is in the padding: in results and gradients, to the bit."""
    model, l = make_model(d_state=5, d_model=12), 6 if backend == "triton" else 34
    ids, others = random_ids(4, l), [0, 2, 3]
    lengths = torch.tensor([l, l - 1, 0, l // 2] if padded else [l] * 4)
    real = torch.arange(l) < lengths[:, None]

    def read(ids, state):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in state.tensors]
        hidden, after = model.encode(ids, MambaState(tuple(leaves)), lengths if padded else None)
        found = [hidden.where(real.unsqueeze(-1), 0), *after.tensors]
        torch.autograd.backward(found, [tensor.detach() for tensor in found])
        return found + [leaf.grad for leaf in leaves]

    _, state = model.encode(random_ids(4, 5))
    wanted = read(ids, state)
    spoilt = state.detach().map(torch.clone)
    hidden_states(spoilt)[0][1] = spoilt.tensors[0][1] = value
    got = read(ids.where(real, random_ids(4, l)), spoilt)
    assert not got[0][1, 0].isfinite().any()
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("d_state", [1, 5, 17])
@torch.no_grad()
def test_rows_of_a_step_know_nothing_of_each_other(d_state, make_model):
    """In the kernel of one token; in that of a sequence, a token knows nothing of later ones."""
    model, others = make_model(d_state=d_state), [0, 2, 3, 4, 5]
    state, step = model.encode(random_ids(6, 5))[1], model.stepper()
    token = random_ids(6)
    wanted, wanted_after = step(token, state)
    for tensor in (hidden_states(state)[0], state.tensors[1]):
        tensor[1] = math.nan
    got, after = step(token, state)
    assert torch.equal(got[others], wanted[others]) and got[1].isnan().all()
    for name, tensor in tensors(wanted_after).items():
        assert torch.equal(tensors(after)[name][others], tensor[others]), name

    ids, first = torch.tensor([3, 4, 5, 6, 7, 8]), state.fork(torch.tensor([0]))
    wanted, _ = model.encode_each(ids, first)
    model.backbone.embeddings.weight[7] = math.nan
    got, _ = model.encode_each(ids, first)
    assert torch.equal(got[:4], wanted[:4]) and got[4:].isnan().all()


def test_right_pad():
    padded, lengths = right_pad([[1, 2, 3], [], [4]], value=9)
    assert padded.tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert lengths.tolist() == [3, 0, 1]
    assert padded.dtype == lengths.dtype == torch.int64


# Forks and gradients


@pytest.mark.parametrize("changes", [{}, {"bcdt_rms_eps": 1e-6, "tie_embeddings": False}], ids=str)
@precisions
def test_gradients_through_a_fork_equal_those_of_independent_examples(
    changes, dtype, tolerance, make_model, assert_near, gradients
):
    model = make_model(**changes).to(dtype)
    prefixes = [random_ids(length) for length in (9, 1, 4)]
    pairs = [(0, 5), (2, 1), (0, 2), (0, 7), (1, 3)]  # prefix, length of the suffix
    suffixes = [random_ids(length) for _, length in pairs]

    padded, lengths = right_pad([prefix.tolist() for prefix in prefixes])
    _, state = model.encode(padded, lengths=lengths)
    padded, lengths = right_pad([suffix.tolist() for suffix in suffixes])
    forked = state.fork(torch.tensor([place for place, _ in pairs]))
    hidden, _ = model.encode(padded, forked, lengths)
    real = torch.arange(padded.shape[1]) < lengths[:, None]
    loss = model.lm_head(hidden[real]).square().sum()

    wanted = 0.0
    for (place, length), suffix in zip(pairs, suffixes, strict=True):
        logits, _ = model(torch.cat([prefixes[place], suffix]).unsqueeze(0))
        wanted = wanted + logits[0, -length:].square().sum()
    assert_near(loss, wanted, tolerance)
    assert_near(gradients(model, loss), gradients(model, wanted), tolerance)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_gradients_of_a_fork_are_reproducible_to_the_bit(four_threads):
    """Those of h[index] are not, where threads add into one row: nine times of ten at this size."""
    h, index, weight = torch.randn(3, 48, 7), torch.randint(0, 3, (4096,)), torch.randn(4096, 48, 7)
    h.requires_grad_()

    def run() -> torch.Tensor:
        forked = MambaState((h,)).fork(index)
        return torch.autograd.grad((forked.tensors[0] * weight).sum(), h)[0]

    first = run()
    assert all(torch.equal(run(), first) for _ in range(20))


# What callers ask of forward


@pytest.mark.parametrize("padded", [False, True])
def test_logits_at_asked_for_positions(padded, make_model, assert_near):
    model = make_model()
    ids, at = random_ids(4, 9), torch.rand(4, 9) < 0.3
    mask = padding_mask("scattered", [9, 3, 5, 1], size=9) if padded else None
    at = at if mask is None else at & mask
    whole, state = model(ids, mask=mask)
    some, same_state = model(ids, mask=mask, logits_at=at)
    assert 0 < len(some) == at.sum() < at.numel()
    assert_near(some, whole[at], 1e-6)
    assert_near(tensors(same_state), tensors(state), 0)


@pytest.mark.parametrize("changes", [{}, {"bcdt_rms_eps": 1e-6}], ids=["mamba", "falcon"])
def test_a_hook_reads_delta(changes, make_model, assert_near):
    model = make_model(**changes)
    mixer, seen = model.backbone.layers[1].mixer, {}
    mixer.x_proj.register_forward_hook(lambda m, i, output: seen.update(x_proj=output))
    mixer.delta.register_forward_hook(lambda m, i, output: seen.update(delta=output))
    model(random_ids(2, 9))
    dt = seen["x_proj"][..., :5]
    if changes:
        dt = dt / torch.sqrt(dt.square().mean(-1, keepdim=True) + 1e-6)
    delta = torch.log1p(torch.exp(dt @ mixer.dt_proj.weight.T + mixer.dt_proj.bias))
    assert seen["delta"].shape == (2, 9, 48)
    assert_near(seen["delta"], delta, 1e-5)


def test_the_delta_that_a_hook_returns_is_the_one_the_scan_uses(make_model):
    """Δ = 0 from a position on stops the state there: what filtering a context by Δ relies on."""
    model = make_model(n_layer=1)
    ids = random_ids(1, 9)
    _, wanted = model(ids[:, :4])

    def stop(module, inputs, delta):
        return delta * (torch.arange(9) < 4).unsqueeze(-1)

    model.delta_modules[0].register_forward_hook(stop)
    _, state = model(ids)
    assert torch.allclose(state.tensors[1], wanted.tensors[1], atol=1e-6)
    assert state.tensors[1].abs().max() > 1e-2


# Start and config


@pytest.fixture(scope="module")
def fresh() -> MambaLM:
    torch.manual_seed(1)
    return MambaLM(MambaConfig(2000, d_model=128, n_layer=4, proj_bias=True, tie_embeddings=False))


def test_delta_starts_log_uniform_between_its_bounds(fresh):
    delta = torch.cat([F.softplus(b.mixer.dt_proj.bias.detach()) for b in fresh.backbone.layers])
    assert 1e-3 * 0.999 <= delta.min() < 1.2e-3 and 0.083 < delta.max() <= 0.1 * 1.001
    assert 8e-3 < delta.median() < 12.5e-3  # log-uniform: the geometric mean of the bounds, 0.01


def test_other_weights_start_as_in_the_papers_code(fresh):
    assert fresh.backbone.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert fresh.backbone.embeddings.weight.mean().item() == pytest.approx(0, abs=2e-4)
    for block in fresh.backbone.layers:
        mixer = block.mixer
        assert torch.equal(mixer.A_log.exp().round(), torch.arange(1.0, 17).expand(256, 16))
        assert torch.equal(mixer.D, torch.ones(256)) and torch.equal(
            block.norm.weight, torch.ones(128)
        )
        assert not mixer.in_proj.bias.any() and not mixer.out_proj.bias.any()
        for weight, bound in [
            (mixer.dt_proj.weight, 8**-0.5),  # dt_rank ** -0.5
            (mixer.in_proj.weight, 128**-0.5),
            (mixer.out_proj.weight, 256**-0.5 / math.sqrt(4)),  # 1 / sqrt(n_layer)
        ]:
            assert 0.95 * bound < weight.abs().max() <= 1.0001 * bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)  # uniform


@pytest.mark.parametrize(
    "vocab_size, multiple, rows",
    [(50277, 8, 50280), (50280, 8, 50280), (1702, 8, 1704), (31, 1, 31), (1, 16, 16)],
)
def test_vocabulary_is_padded_up_to_a_multiple(vocab_size, multiple, rows):
    config = MambaConfig(vocab_size, d_model=8, n_layer=1, pad_vocab_size_multiple=multiple)
    assert config.vocab_rows == rows
    with torch.device("meta"):
        model = MambaLM(config)
    assert len(model.backbone.embeddings.weight) == len(model.lm_head.weight) == rows


@pytest.mark.parametrize(
    "d_model, changes, rank, inner",
    [(768, {}, 48, 1536), (24, {}, 2, 48), (16, {"expand": 3}, 1, 48), (24, {"dt_rank": 5}, 5, 48)],
)
def test_derived_sizes(d_model, changes, rank, inner):
    config = MambaConfig(8, d_model, n_layer=1, **changes)
    assert (config.dt_rank, config.d_inner) == (rank, inner)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_one_parameter(tied, make_model):
    model = make_model(tie_embeddings=tied)
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == tied
