"""The state of a run in a checkpoint's files, validated, as anybody may have written them; and the
best of a run's evaluations."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.trainer_callback import TrainerState

from common.errors import UserError
from common.json_text import read_json
from mamba_lm.foreign_files import parsing, require_plain

STATE = "trainer_state.json"
_LONGEST_NAME = 100
_LARGEST = torch.finfo(torch.float32).max
_EXACT = 2**53  # whole numbers below it are exact as floats too


class BestEvaluation(NamedTuple):
    """The step of the best evaluation, and the number of evaluations since the last one that was
    better than all before it, which a run's patience limits."""

    step: int
    num_since_better: int


def find_best_evaluation(
    rows: Iterable[Mapping[str, float]], metric: str, greater_is_better: bool
) -> BestEvaluation | None:
    """The evaluation in a log with the best metric; among equal ones that with the lowest
    eval_loss, and then the latest. None before the first. The evaluation before training does not
    count: it has no checkpoint."""
    best, best_rank = None, None
    for row in rows:
        if metric not in row or row["step"] == 0:
            continue
        value = row[metric] if greater_is_better else -row[metric]
        rank = tuple(
            -math.inf if math.isnan(v) else v for v in (value, -row.get("eval_loss", math.inf))
        )
        if best is None or rank > best_rank:
            best, best_rank = BestEvaluation(row["step"], 0), rank
        else:
            step = row["step"] if rank == best_rank else best.step
            best = BestEvaluation(step, best.num_since_better + 1)
    return best


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _EXACT


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _EXACT)


def _is_above_0(value: object) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _is_log(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict) and _is_count(row.get("step")) and all(map(_is_figure, row.items()))
        for row in value
    )


def _is_figure(item: tuple[str, object]) -> bool:
    """Whether a figure of a log has a name and a value that can be drawn."""
    name, value = item
    is_name = name.isidentifier() and len(name) <= _LONGEST_NAME
    return is_name and _is_number(value) and not _LARGEST < abs(value) < math.inf


def _has_end_flag(value: object) -> bool:
    try:
        return type(value["TrainerControl"]["args"]["should_training_stop"]) is bool
    except (TypeError, KeyError, IndexError):
        return False


_FIELDS: dict[str, Callable[[object], bool]] = {  # of a TrainerState, where it matters
    **dict.fromkeys(
        ("global_step", "max_steps", "num_train_epochs", "train_batch_size",
         "num_input_tokens_seen"), _is_count
    ),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _is_above_0),
    "epoch": lambda value: value == 0 or _is_above_0(value),
    "total_flos": _is_number,
    "log_history": _is_log,
    "best_metric": lambda value: value is None or _is_number(value),
    "best_global_step": lambda value: value is None or _is_count(value),
    "best_model_checkpoint": lambda value: value is None or isinstance(value, str),
    "stateful_callbacks": _has_end_flag,
}  # fmt: skip


def read_state(checkpoint: Path) -> TrainerState:
    """The Trainer's state in a checkpoint; UserError where it contains what no Trainer writes."""
    path = checkpoint / STATE
    state = read_json(path)
    known = {field.name for field in fields(TrainerState)}
    if not isinstance(state, dict) or state.keys() - known:
        raise UserError(f"{path}: not a Trainer's state")
    for name, is_valid in _FIELDS.items():
        if not is_valid(state.get(name)):
            raise UserError(f"{path}: {name!r} cannot be {state.get(name)!s:.40}")
    return TrainerState(**state)


def has_ended(state: TrainerState) -> bool:
    """Whether the run had come to its own end."""
    return state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]


def read_unlogged(path: Path) -> tuple[float, int]:
    """The sum of the losses that were not logged yet, and the last step that was."""
    found = read_json(path)
    if (
        not isinstance(found, list)
        or len(found) != 2
        or not (_is_number(found[0]) and _is_count(found[1]))
    ):
        raise UserError(f"{path}: not a loss and a step")
    return found[0], found[1]


def read_tensors(path: Path) -> Any:
    """The tensors and plain values that torch.save wrote: no code of a pickle runs. Tensors stay in
    the file until they are used, so that several processes share the memory."""
    require_plain(path, "tensors")
    with parsing(lambda reason: f"{path}: cannot be read ({reason})"):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def has_form_of(value: object, own: object) -> bool:
    """Whether a value that was read can replace this one: it has the same type, keys, length and
    shape, at every level."""
    if isinstance(own, dict):
        return (
            isinstance(value, dict)
            and value.keys() == own.keys()
            and all(has_form_of(value[key], own[key]) for key in own)
        )
    if isinstance(own, (list, tuple)):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(own)
            and all(map(has_form_of, value, own))
        )
    if isinstance(own, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (own.shape, own.dtype)
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, (int, float)):
        return _is_number(value)
    return type(value) is type(own)


def fits_optimizer(state: object, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a full state that was read belongs to such an optimizer."""
    own = optimizer.state_dict()
    if not isinstance(state, dict) or state.keys() != own.keys():
        return False
    if not has_form_of(state["param_groups"], own["param_groups"]):
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_adam = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adam)
    return isinstance(state["state"], dict) and all(
        type(index) is int and 0 <= index < len(parameters)
        and isinstance(moments, dict)
        and _fit(moments, parameters[index].shape, is_adam)
        for index, moments in state["state"].items()
    )  # fmt: skip


def _fit(moments: dict, shape: torch.Size, is_adam: bool) -> bool:
    """Whether moments fit a parameter of this shape, as far as their names show."""
    shapes = {
        "step": torch.Size(),
        "exp_avg_sq_row": shape[:-1],
        "exp_avg_sq_col": shape[:-2] + shape[-1:],
        **dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), shape),
    }
    if moments.get("momentum_buffer") is not None:  # SGD without momentum has none
        shapes["momentum_buffer"] = shape
    needed = {"step", "exp_avg", "exp_avg_sq"} if is_adam else set()
    return needed <= moments.keys() and all(
        _is_moment(moment, shapes.get(name)) for name, moment in moments.items()
    )


def _is_moment(value: object, shape: torch.Size | None) -> bool:
    """shape None: any."""
    if not isinstance(value, Tensor):
        return shape is None or (shape == () and _is_number(value))
    is_own_memory = (
        value.layout == torch.strided
        and not value.is_meta
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )
    return is_own_memory and (shape is None or (value.shape == shape and value.is_floating_point()))
