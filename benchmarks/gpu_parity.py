"""The first part of benchmarks.gpu: the GPU's results against the float64 reference."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import without_prefix
from mamba_lm.generate import decode, read
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.selective_scan import load_backend, reference
from mamba_lm.training.prefix_suffix import Item, PrefixSuffixLM, collate

ROWS = 3
# Of the largest entry. In bfloat16 the inputs are exact, rounded before; outputs are rounded again.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
MODEL_TOLERANCE = 1e-4
FAILED = {"output": [math.inf], "state": [math.inf], "gradient": [math.inf]}


def parity(
    backends: Iterable[str], device: torch.device, lengths: Sequence[int], d: int
) -> Iterator[dict]:
    """A row for each backend, dtype and case: the worst error over rows of these lengths in
    outputs, states and gradients, as fractions of the tolerance."""
    for backend, dtype in itertools.product(backends, TOLERANCES):
        for case, options in CASES.items():
            title = f"{backend}, {case}, {str(dtype).removeprefix('torch.')}"
            try:
                scan = load_backend(backend).selective_scan
                errors = [_errors(scan, _inputs(l, d, dtype, device), **options) for l in lengths]
            except Exception as error:  # what else can be measured still is
                yield _row(f"{title} ({first_line(error)})", FAILED)
                continue
            merged = {kind: [e for of_l in errors for e in of_l[kind]] for kind in errors[0]}
            yield _row(title, merged)


# state: an initial state is given; keep: the final state is returned; fork: rows continue from rows
# of a state; padded: rows of different lengths; grad: with gradients.
CASES = {
    "from zero, none kept": {"state": False, "keep": False},
    "from zero": {"state": False},
    "without gradients": {"grad": False},
    "with states": {},
    "forked, padded": {"fork": True, "padded": True},
}


def _inputs(l: int, d: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """mamba's n, values of its sizes; those that keep float32 in bfloat16 too are A, D, states."""
    generator, n = torch.Generator().manual_seed(l), 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "x": normal(ROWS, l, d),
        "delta": F.softplus(normal(ROWS, l, d) - 2),
        "B": normal(ROWS, l, n),
        "C": normal(ROWS, l, n),
        "z": normal(ROWS, l, d),
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    inputs |= {"A": -torch.exp(normal(d, n)), "D": normal(d), "initial_state": normal(ROWS, n, d)}
    return {name: value.to(device) for name, value in inputs.items()}


def _errors(
    scan: Callable,
    inputs: dict[str, Tensor],
    state: bool = True,
    keep: bool = True,
    fork: bool = False,
    padded: bool = False,
    grad: bool = True,
) -> dict[str, list[float]]:
    """Errors as fractions of the tolerance, by kind."""
    l, device = inputs["x"].shape[1], inputs["x"].device
    tolerance = TOLERANCES[inputs["x"].dtype]
    index = torch.tensor([0, 2, 2] if fork else [0, 1, 2], device=device)
    lengths = torch.tensor([l, l // 2, 0], device=device) if padded else None

    def run(function: Callable, dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {
            name: value.detach().to(dtype or value.dtype, copy=True).requires_grad_()
            for name, value in inputs.items()
            if state or name != "initial_state"
        }
        given = dict(leaves)
        if state:
            given["initial_state"] = given["initial_state"].index_select(0, index)
        with torch.set_grad_enabled(grad):
            y, h = function(**given, lengths=lengths, return_state=keep)
        results = {"output": y, "final state": h} if keep else {"output": y}
        if grad:
            generator = torch.Generator().manual_seed(1)
            grads = [torch.randn(v.shape, generator=generator).to(v) for v in results.values()]
            torch.autograd.backward(list(results.values()), grads)
        found = {name: result.detach() for name, result in results.items()}
        return found | {name: leaf.grad for name, leaf in leaves.items() if grad}

    got, wanted = run(scan, None), run(reference.selective_scan, torch.float64)
    errors = {"output": [], "state": [], "gradient": []}
    for name, exact in wanted.items():
        kind = {"output": "output", "final state": "state"}.get(name, "gradient")
        error = (got[name].double() - exact).abs().max() / (exact.abs().max() + 1e-30)
        errors[kind].append(error.item() / tolerance)
    return errors


def model_parity(
    backends: Iterable[str], device: torch.device, chosen: Callable[[str], AbstractContextManager]
) -> Iterator[dict]:
    """A row for each backend: a small model in float32 against itself in float64. Its loss on
    forked states and on examples read whole, with all gradients; a state after one token by the
    fused step; and greedy answers, whose tokens must be the same. `chosen(backend)` sets a backend
    for a while."""
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=96, d_model=64, n_layer=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(device)
    wanted = _of_model(copy.deepcopy(model).double())
    for backend in backends:
        title = f"model, {backend}, float32"
        try:
            with chosen(backend):
                got = _of_model(copy.deepcopy(model))  # with graphs of its own
        except Exception as error:
            yield _row(f"{title} ({first_line(error)})", FAILED)
            continue
        errors = {"output": [], "state": [], "gradient": []}
        for (kind, name), exact in wanted.items():
            error = (got[kind, name].double() - exact).abs().max() / (exact.abs().max() + 1e-30)
            if name == "tokens" and error > 0:
                error = torch.tensor(math.inf)
            errors[kind].append(error.item() / MODEL_TOLERANCE)
        yield _row(title, errors)


def _of_model(model: MambaLM) -> dict[tuple[str, str], Tensor]:
    device = model.lm_head.weight.device
    examples = [
        Item.with_target(range(prefix), range(10, 10 + prompt), range(30, 30 + target))
        for prefix, prompt, target in ((40, 9, 3), (40, 1, 1), (3, 20, 7), (0, 5, 2))
    ]
    found = {}
    for kind, of_kind in (("forked", examples), ("whole", map(without_prefix, examples))):
        batch = {name: value.to(device) for name, value in collate(of_kind).items()}
        model.zero_grad()
        loss = PrefixSuffixLM(model)(**batch)["loss"]
        loss.backward()
        found["output", f"loss, {kind}"] = loss.detach()
        for name, parameter in model.named_parameters():
            found["gradient", f"{name}, {kind}"] = parameter.grad.clone()
    with torch.inference_mode():
        reading = read(model, [list(range(5, 5 + length)) for length in (1, 7, 50, 3, 12)])
        step = model.stepper()
        hidden, state = step(torch.arange(5, device=device), reading.state)
        answers = decode(model, reading, [1, 2, 3], 11)
    found["output", "hidden"] = hidden
    found |= {("state", f"{layer}"): h for layer, h in enumerate(state.tensors)}
    tokens = [token for answer in answers for token in (*answer.token_ids, -1)]
    found["output", "tokens"] = torch.tensor(tokens + [0] * (60 - len(tokens)), device=device)
    found["output", "log_probs"] = torch.tensor([a.log_prob for a in answers], device=device)
    return found


def _row(name: str, errors: dict[str, list[float]]) -> dict:
    """With the worst error of each kind. NaN if one is: max() could miss it."""
    worst = {kind: torch.tensor([0.0, *of]).max().item() for kind, of in errors.items()}
    return {"name": name, **worst, "ok": all(error <= 1 for error in worst.values())}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
