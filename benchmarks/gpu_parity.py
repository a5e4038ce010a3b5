"""The first part of benchmarks.gpu: what runs on the GPU against the float64 reference."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_lm.selective_scan import load_backend, reference

ROWS = 3
# Of the largest entry. In bfloat16 the inputs are exact, rounded before; outputs are rounded again.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def parity(
    ways: dict[str, tuple[str, dict]], device: torch.device, lengths: Sequence[int], d: int
) -> Iterator[dict]:
    """A row for each way through the scan, dtype and case: the worst error over rows of these
    lengths in outputs, states and gradients, as parts of what is tolerated. ways: name to a backend
    and what to set in it."""
    for (name, (backend, settings)), dtype in itertools.product(ways.items(), TOLERANCES):
        for case, options in CASES.items():
            module = load_backend(backend)
            before = {key: getattr(module, key) for key in settings}
            vars(module).update(settings)
            try:
                errors = [
                    _errors(module.selective_scan, _inputs(l, d, dtype, device), **options)
                    for l in lengths
                ]
            finally:
                vars(module).update(before)
            worst = {
                part: _worst(of_length[part] for of_length in errors)
                for part in ("output", "state", "gradient")
            }
            yield {
                "name": f"{name}, {case}, {str(dtype).removeprefix('torch.')}",
                **worst,
                "ok": all(error <= 1 for error in worst.values()),
            }


# fork: rows of the initial state that each row goes on from; padded: rows of unlike lengths.
CASES = {
    "from zero": {"state": False},
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
    fork: bool = False,
    padded: bool = False,
) -> dict[str, float]:
    """Errors in parts of what is tolerated."""
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
        y, h = function(**given, lengths=lengths)
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(v.shape, generator=generator).to(v) for v in (y, h)]
        torch.autograd.backward([y, h], grads)
        found = {"output": y.detach(), "final state": h.detach()}
        return found | {name: leaf.grad for name, leaf in leaves.items()}

    got, wanted = run(scan, None), run(reference.selective_scan, torch.float64)
    errors = {"output": [], "state": [], "gradient": []}
    for name, exact in wanted.items():
        kind = {"output": "output", "final state": "state"}.get(name, "gradient")
        error = (got[name].double() - exact).abs().max() / (exact.abs().max() + 1e-30)
        errors[kind].append(error.item() / tolerance)
    return {kind: _worst(of_kind) for kind, of_kind in errors.items()}


def _worst(errors: Iterable[float]) -> float:
    """NaN if one is, unlike max()."""
    return torch.tensor(list(errors)).max().item()
