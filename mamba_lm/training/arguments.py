"""TrainingArguments as this project uses them: its defaults, and what of them is refused."""

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from common.errors import UserError

_SHARD = (
    "the Trainer's own is not used (on a CPU it would be plain data parallelism, silently); "
    "--fully_shard shards, on CPUs and GPUs"
)
_FIELDS = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "an object",
    list: "a list",
    type(None): "null",
}
_FLAGS = {  # fields that have a flag of their own, which more than the Trainer reads
    "output_dir": "--output",
    "seed": "--seed",
    "num_train_epochs": "--num_epochs",
    "per_device_train_batch_size": "--batch_size",
    **{name: f"--{name}" for name in ("max_steps", "learning_rate", "gradient_accumulation_steps",
                                      "optim")},
}  # fmt: skip
_NOT_USED = {  # fields of TrainingArguments that would have no effect here, or a wrong one
    "fsdp": _SHARD,
    "deepspeed": _SHARD,
    "fp16": "its first steps overflow, which ends a run here; bf16=true",
    "save_only_model": "a run could not go on from such a checkpoint",
    "push_to_hub": "upload the folder once the run is complete",
    "ignore_data_skip": "a run goes on with the batch where it was cut off",
    "data_seed": "--seed decides the order too",
    "include_num_input_tokens_seen": "training_log.jsonl has the tokens a second",
    **dict.fromkeys(
        ("auto_find_batch_size", "label_smoothing_factor", "neftune_noise_alpha",
         "parallelism_config", "torch_compile", "torch_compile_backend", "torch_compile_mode",
         "use_liger_kernel"), "not made for this model"
    ),
}  # fmt: skip
MAX_WORKERS = 64  # each is a process, which takes memory
_BLAMED = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def blaming_arguments() -> Iterator[None]:
    """What goes wrong in this block is a UserError on the training arguments, in a line."""
    try:
        yield
    except _BLAMED as error:
        what = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"training arguments: {what}") from error


def _kinds(field: str) -> list[type]:
    """The kinds of JSON values that a field takes, by its type."""
    hint = typing.get_type_hints(TrainingArguments)[field]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else (hint,)
    taken = [typing.get_origin(member) or member for member in members]
    return [kind for kind in _WORDS if kind in taken]


def _parse(override: str) -> tuple[str, object]:
    """A field and its value; UserError where that is none, or not to be given here."""
    key, separator, text = override.partition("=")
    if not separator or key not in _FIELDS:
        near = "".join(f" ({name}?)" for name in difflib.get_close_matches(key, _FIELDS, n=1))
        raise UserError(f"--trainer {override}: give KEY=VALUE, a field of TrainingArguments{near}")
    if key in _FLAGS:
        raise UserError(f"--trainer {override}: use {_FLAGS[key]}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if key in _NOT_USED and value is not False and value != _FIELDS[key]:
        raise UserError(f"training arguments: {override}: {_NOT_USED[key]}")
    kinds = _kinds(key)
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        said = " or ".join(_WORDS[kind] for kind in kinds)
        raise UserError(f"training arguments: {override}: give {said}")
    return key, value


def training_arguments(
    output: str, device: torch.device, overrides: Sequence[str] = (), **settings
) -> TrainingArguments:
    """TrainingArguments with this project's defaults.

    settings: fields of TrainingArguments. overrides: "KEY=VALUE" strings for any other field, the
    value as JSON or plain text. UserError on a field that TrainingArguments does not have.
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
    chosen = defaults | settings | dict(map(_parse, overrides))
    for name in ("fsdp", "deepspeed"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise UserError(f"accelerate launch with {name}: {_NOT_USED[name]}")
    keeps_best = chosen.pop("load_best_model_at_end", True)
    with blaming_arguments():
        arguments = TrainingArguments(output_dir=output, **chosen)
    # Now and not before: the Trainer wants a checkpoint with each evaluation and only then, where
    # `ResumableTrainer` writes one of the best by itself.
    evaluates = arguments.eval_strategy != IntervalStrategy.NO
    arguments.load_best_model_at_end = bool(keeps_best) and evaluates
    workers = arguments.dataloader_num_workers
    if not 0 <= workers <= MAX_WORKERS:
        raise UserError(
            f"training arguments: dataloader_num_workers={workers}: give 0 to {MAX_WORKERS}"
        )
    # Without torchrun the Trainer would split our batches over several GPUs with nn.DataParallel,
    # whose prefix_index would then point into another GPU's prefixes.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
