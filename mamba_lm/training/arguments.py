"""TrainingArguments as this project uses them: its defaults, and the values that are refused."""

import contextlib
import dataclasses
import difflib
import json
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from common.errors import UserError

_SHARD = (
    "the Trainer's own sharding is not used (on a CPU it would silently be data parallelism); "
    "fully_shard works on CPUs and GPUs"
)
_FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "an object",
    list: "a list",
    type(None): "null",
}
_NOT_USED = {  # fields of TrainingArguments that would have no effect here, or a wrong one
    "fsdp": _SHARD,
    "deepspeed": _SHARD,
    "fp16": "its first steps overflow, which ends a run here; use bf16=true",
    "save_only_model": "a run could not be resumed from such a checkpoint",
    "push_to_hub": "upload the folder once the run is complete",
    "ignore_data_skip": "a run resumes with the batch where it was stopped",
    "data_seed": "seed decides the order too",
    "include_num_input_tokens_seen": "training_log.jsonl has the tokens per second",
    "restore_callback_states_from_checkpoint": "no callback keeps a state in checkpoints",
    **dict.fromkeys(
        ("auto_find_batch_size", "label_smoothing_factor", "neftune_noise_alpha",
         "parallelism_config", "torch_compile", "torch_compile_backend", "torch_compile_mode",
         "use_liger_kernel"), "not made for this model"
    ),
}  # fmt: skip
MAX_WORKERS = 64  # each is a process, which takes memory
_UNLISTED_INTEGRATIONS = {"flyte"}  # known, but get_available_reporting_integrations omits it


@contextlib.contextmanager
def reporting_arguments() -> Iterator[None]:
    """For a block in which transformers validates arguments: what it raises on a wrong value, or on
    a package that is not installed, becomes a UserError. Other exceptions are bugs and pass."""
    try:
        yield
    except (ValueError, ImportError, OSError, OverflowError) as error:
        what = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"training arguments: {what}") from error


def _json_kinds(field: str) -> list[type]:
    """The kinds of JSON values that a field takes, by its type."""
    hint = typing.get_type_hints(TrainingArguments)[field]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else (hint,)
    taken = [typing.get_origin(member) or member for member in members]
    return [kind for kind in _WORDS if kind in taken]


def _parse(override: str, reserved: Mapping[str, str]) -> tuple[str, object]:
    """A field and its value; UserError where that is none, or not to be given here."""
    key, separator, text = override.partition("=")
    if not separator or key not in _FIELDS:
        near = "".join(f" ({name}?)" for name in difflib.get_close_matches(key, _FIELDS, n=1))
        wanted = f"give KEY=VALUE, a field of TrainingArguments{near}"
        raise UserError(f"training arguments: {override}: {wanted}")
    if key in reserved:
        raise UserError(f"training arguments: {override}: set {reserved[key]} instead")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    problem = _find_problem(key, value)
    if problem is not None:
        raise UserError(f"training arguments: {override}: {problem}")
    return key, value


def _find_problem(key: str, value: object) -> str | None:
    """Why a field cannot have this value; None if it can, as far as its type tells."""
    if key in _NOT_USED and value is not False and value != _FIELDS[key].default:
        return _NOT_USED[key]
    kinds = _json_kinds(key)
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        return f"give {' or '.join(_WORDS[kind] for kind in kinds)}"
    choices = _FIELDS[key].metadata.get("choices")
    if choices and value not in choices and value != _FIELDS[key].default:
        return f"choose from {', '.join(map(str, choices))}"
    if key == "accelerator_config" and isinstance(value, dict):
        known = [field.name for field in dataclasses.fields(AcceleratorConfig)]
        if not value.keys() <= set(known):
            return f"its keys are {', '.join(known)}"
    return None


def training_arguments(
    output: str,
    device: torch.device,
    overrides: Sequence[str] = (),
    reserved: Mapping[str, str] = types.MappingProxyType({"output_dir": "output"}),
    **settings,
) -> TrainingArguments:
    """TrainingArguments with this project's defaults.

    settings: fields of TrainingArguments. overrides: a user's "KEY=VALUE" strings for other fields,
    the value as JSON or plain text. reserved: fields that the user must give in another way, and
    that way, for the message. UserError on a field that TrainingArguments does not have, and on a
    value that it refuses or that would have no effect.
    """
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": 20,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,  # one every 500 steps, and ten minutes: `SafeStop`
        "report_to": "none",
        "disable_tqdm": False,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",  # autocast; the weights stay in float32
    }
    chosen = defaults | settings | dict(_parse(override, reserved) for override in overrides)
    for name in ("fsdp", "deepspeed"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise UserError(f"accelerate launch with {name}: {_NOT_USED[name]}")
    keeps_best = chosen.pop("load_best_model_at_end", True)
    with reporting_arguments():
        arguments = TrainingArguments(output_dir=output, **chosen)
    # Now and not before: TrainingArguments requires a checkpoint with each evaluation and only
    # then, where `PrefixSuffixTrainer` writes one of the best by itself.
    evaluates = arguments.eval_strategy != IntervalStrategy.NO
    arguments.load_best_model_at_end = bool(keeps_best) and evaluates
    # It would give callbacks attributes from a checkpoint, which anybody may have written.
    arguments.restore_callback_states_from_checkpoint = False
    workers = arguments.dataloader_num_workers
    if not 0 <= workers <= MAX_WORKERS:
        raise UserError(
            f"training arguments: dataloader_num_workers={workers}: give 0 to {MAX_WORKERS}"
        )
    _require_integrations(arguments.report_to)
    _require_scheduler(arguments)
    # Without torchrun the Trainer would split our batches over several GPUs with nn.DataParallel,
    # whose prefix_index would then point into another GPU's prefixes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _require_integrations(names: Sequence[str]) -> None:
    """UserError unless each is a package for reports that is installed."""
    available = get_available_reporting_integrations()
    for name in names:
        if name not in {*available, *_UNLISTED_INTEGRATIONS}:
            installed = ", ".join(["none", *available])
            raise UserError(
                f"training arguments: report_to={name}: not installed; choose from {installed}"
            )


def _require_scheduler(arguments: TrainingArguments) -> None:
    """UserError unless lr_scheduler_kwargs fit lr_scheduler_type: tries a short schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    needs_metric = arguments.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, "greedy")
    try:
        with warnings.catch_warnings(action="ignore"):
            scheduler = get_scheduler(
                arguments.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=4,
                scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
            )  # fmt: skip
            for _ in range(4):
                scheduler.step(*[1.0] * needs_metric)
    except (TypeError, ValueError) as error:  # only the user's values can be wrong here
        name, given = arguments.lr_scheduler_type.value, arguments.lr_scheduler_kwargs
        raise UserError(
            f"training arguments: lr_scheduler_type={name} with lr_scheduler_kwargs={given}: "
            f"{str(error).splitlines()[0]}"
        ) from error
