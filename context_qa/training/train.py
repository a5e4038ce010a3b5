"""Train a model to answer from a context, and write its card."""

import dataclasses
import functools
import multiprocessing

from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from common.errors import UserError, report_loading
from common.processes import broadcast, disconnect
from common.provenance import describe_run, hash_or_name, sha256
from context_qa.arguments import Data
from context_qa.batches import GroupedBatches, continuation
from context_qa.data_warnings import data_warnings
from context_qa.training import TrainingSettings
from context_qa.training.data_report import cut_to_length, make_data_report
from context_qa.training.model_card import MODEL_CARD, make_model_card
from context_qa.training.scores import find_score_problems, make_scorer, scored_examples, scores_at
from mamba_lm.checkpoint import load_model_and_tokenizer, model_hashes
from mamba_lm.device import choose_device
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.run_folder import RunFolder
from mamba_lm.training.trainer import PrefixSuffixTrainer

_SETTINGS = {  # by the fields of TrainingArguments that they decide
    "output_dir": "output",
    "num_train_epochs": "num_epochs",
    "per_device_train_batch_size": "batch_size",
    **{
        name: name
        for name in ("seed", "max_steps", "learning_rate", "gradient_accumulation_steps", "optim")
    },
}
_WITHOUT_EFFECT = (  # on the weights: fields of TrainingArguments that may change on a resume
    *("save_steps", "save_total_limit", "disable_tqdm", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("report_to", "run_name", "project", "log_level"),
)


def train(settings: TrainingSettings, data: Data) -> None:
    """Train the model that the settings describe, or resume its run. data: the examples of each
    file that they name. Raises UserError."""
    arguments = make_arguments(settings)
    state = PartialState()
    record = broadcast(describe(settings) if state.is_main_process else None)
    with RunFolder(
        settings.output,
        settings=decisive_settings(settings, record, state.num_processes),
        description=record,
        inputs=settings.inputs(),
        card=MODEL_CARD,
        overwrite=settings.overwrite,
    ) as run:
        if run.is_complete:
            say(f"{settings.output}: this run is complete; set overwrite to restart it")
        else:
            complete(settings, data, arguments, run)
            say(f"model written to {settings.output}")
    disconnect()


def complete(
    settings: TrainingSettings, data: Data, arguments: TrainingArguments, run: RunFolder
) -> None:
    """Train to the end, and write the model and its card."""
    negatives = settings.negative_kind
    examples = data[settings.data_path]
    asked = data[settings.eval_data] if settings.eval_data else []
    scored = scored_examples(asked, negatives)
    set_seed(settings.seed)  # before weights are drawn, should the model be a config file
    report_loading(settings.model)
    model, tokenizer = load_model_and_tokenizer(settings.model, settings.tokenizer)
    run.warn(data_warnings(settings.data_path, examples, tokenizer, is_training=True))
    run.warn(find_score_problems(scored, examples))
    run.warn(data_warnings(settings.eval_data, asked, tokenizer))

    fitting = cut_to_length(examples, tokenizer, settings.prompt_order, settings.max_length)
    batches = GroupedBatches(
        fitting.examples,
        settings.batch_size,
        negatives,
        settings.seed,
        arguments.process_index,
        arguments.world_size,
        negative_ratio=settings.negative_ratio,
        accumulation=settings.gradient_accumulation_steps,
    )
    prompt = {"tokenizer": tokenizer, "prompt_order": settings.prompt_order}
    tokenize = functools.partial(continuation, **prompt, max_length=settings.max_length)
    metric = arguments.metric_for_best_model
    trainer = PrefixSuffixTrainer(
        model,
        arguments,
        batches,
        tokenize,
        tokenizer,
        score=make_scorer(scored, **prompt, metric=metric) if scored else None,
        patience=settings.patience,
        sharded=settings.fully_shard,
    )

    report = make_data_report(fitting, batches, **prompt, max_length=settings.max_length)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters\n{report}")
    checkpoint = run.checkpoint or arguments.resume_from_checkpoint
    if checkpoint:
        say(f"resuming from {checkpoint}")
    trainer.train(checkpoint, run.begin)
    trainer.save_model()
    state, kept_step = trainer.state, trainer.kept_step or trainer.state.global_step
    if state.global_step < state.max_steps:
        say(f"stopped at step {state.global_step} of {state.max_steps}: scores no longer improve")
    if kept_step < state.global_step:
        say(f"the best model, that of step {kept_step}, is kept")
    steps = {"steps": state.global_step, "epochs": state.epoch, "step_of_model": kept_step}
    scores = scores_at(state.log_history, kept_step)
    card = make_model_card(settings, report, steps, scores)
    run.finish(card, **steps, data=dataclasses.asdict(report), scores=scores)


def say(text: str) -> None:
    """Print once, of several processes."""
    PartialState().print(text, flush=True)


def make_arguments(settings: TrainingSettings) -> TrainingArguments:
    """The Trainer's arguments; UserError where they, or what they need here, are wrong."""
    fields = {
        "num_train_epochs": settings.num_epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "optim": settings.optim,
        "seed": settings.seed,
    }
    if settings.eval_data:
        fields |= {"eval_strategy": "epoch", "metric_for_best_model": "exact_match"}
    device = choose_device("cpu" if "use_cpu=true" in settings.trainer else "auto")
    arguments = training_arguments(settings.output, device, settings.trainer, _SETTINGS, **fields)
    if not settings.eval_data:
        if arguments.eval_strategy != "no" or arguments.eval_on_start:
            raise UserError("training arguments: evaluation needs eval_data")
        if arguments.metric_for_best_model is not None:
            raise UserError("training arguments: metric_for_best_model needs eval_data")
    if arguments.dataloader_num_workers:
        require_shared_memory()
    return arguments


def require_shared_memory() -> None:
    """UserError where worker processes cannot share anything: /dev/shm is missing, or read-only."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise UserError(
            f"dataloader_num_workers: processes cannot share memory here ({error.strerror}); give 0"
        ) from error


def describe(settings: TrainingSettings) -> dict:
    """What the record of the run contains beside its settings: arguments, versions, hashes."""
    return (
        describe_run(dataclasses.asdict(settings))
        | model_hashes(settings.model, settings.tokenizer)
        | {"data_sha256": sha256(settings.data_path)}
    )


def decisive_settings(settings: TrainingSettings, record: dict, num_processes: int) -> dict:
    """What decides the weights: the settings, with the hashes of the files in `record` in place of
    their names."""
    hashes = {
        "model": record["model_sha256"] or settings.model,
        "tokenizer": record["tokenizer_sha256"],
        "data_path": record["data_sha256"] or settings.data_path,
        "eval_data": hash_or_name(settings.eval_data),
    }
    others = dataclasses.asdict(settings).items()
    others = {n: v for n, v in others if n not in (*hashes, "output", "overwrite")}
    overrides = dict(override.split("=", 1) for override in settings.trainer)
    effective = {k: v for k, v in overrides.items() if k not in _WITHOUT_EFFECT}
    return hashes | others | {"trainer": effective, "processes": num_processes}
