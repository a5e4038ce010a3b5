"""Train a model as the training script says: data, model, trainer, and what goes with the model."""

import argparse
import functools
import multiprocessing

from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from common.errors import UserError, report_loading
from common.processes import disconnect
from context_qa.arguments import Data
from context_qa.batches import GroupedBatches, continuation
from context_qa.data_warnings import data_warnings
from context_qa.training.data_report import data_report, within_length
from context_qa.training.run_folder import TrainingRun
from context_qa.training.scores import doubts, examples_to_score, scorer
from mamba_lm.checkpoint import load_model_and_tokenizer
from mamba_lm.device import choose_device
from mamba_lm.training.arguments import training_arguments
from mamba_lm.training.trainer import PrefixSuffixTrainer


def train(args: argparse.Namespace, data: Data) -> None:
    """Train the model that args describe, or go on with it. data: the examples of each file that
    args name. Raises UserError."""
    arguments = trainer_arguments(args)
    with TrainingRun(args) as run:
        if run.is_complete:
            say(f"{args.output}: this run is complete; --overwrite begins anew")
        else:
            complete(args, data, arguments, run)
            say(f"model written to {args.output}")
    disconnect()


def complete(
    args: argparse.Namespace, data: Data, arguments: TrainingArguments, run: TrainingRun
) -> None:
    negatives = None if args.negatives == "none" else args.negatives
    examples, asked = data[args.data_path], data[args.eval_data] if args.eval_data else []
    scored = examples_to_score(asked, negatives)
    set_seed(args.seed)  # before weights are drawn, should MODEL be a config file
    report_loading(args.model)
    model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer)
    run.warn(data_warnings(args.data_path, examples, tokenizer, is_training=True))
    run.warn([*doubts(scored, examples), *data_warnings(args.eval_data, asked, tokenizer)])

    fitting = within_length(examples, tokenizer, args.prompt_order, args.max_length)
    batches = GroupedBatches(
        fitting.examples,
        args.batch_size,
        negatives,
        args.seed,
        arguments.process_index,
        arguments.world_size,
        negative_ratio=args.negative_ratio,
        accumulation=args.gradient_accumulation_steps,
    )
    prompt = {"tokenizer": tokenizer, "prompt_order": args.prompt_order}
    tokenize = functools.partial(continuation, **prompt, max_length=args.max_length)
    metric = arguments.metric_for_best_model
    score = scorer(scored, **prompt, metric=metric) if scored else None
    trainer = PrefixSuffixTrainer(
        model, arguments, batches, tokenize, tokenizer, score, args.patience, args.fully_shard
    )

    report = data_report(fitting, batches, **prompt, max_length=args.max_length)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters\n{report}")
    checkpoint = run.checkpoint or arguments.resume_from_checkpoint
    if checkpoint:
        say(f"going on from {checkpoint}")
    trainer.train(checkpoint, run.begin)
    trainer.save_model()
    state, kept_step = trainer.state, trainer.kept_step or trainer.state.global_step
    if state.global_step < state.max_steps:
        say(f"ended at step {state.global_step} of {state.max_steps}: no better score any more")
    if kept_step < state.global_step:
        say(f"the best model, that of step {kept_step}, is kept")
    run.finish(report, state, kept_step)


def say(text: str) -> None:
    """Print once, of several processes."""
    PartialState().print(text, flush=True)


def trainer_arguments(args: argparse.Namespace) -> TrainingArguments:
    settings = {
        "num_train_epochs": args.num_epochs,
        "max_steps": args.max_steps or -1,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "optim": args.optim,
        "seed": args.seed,
    }
    if args.eval_data:
        settings |= {"eval_strategy": "epoch", "metric_for_best_model": "exact_match"}
    device = choose_device("cpu" if "use_cpu=true" in args.trainer else "auto")
    arguments = training_arguments(args.output, device, args.trainer, **settings)
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
