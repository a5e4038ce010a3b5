"""Train a Mamba language model to answer from a context and to abstain when it cannot.

    python train_mamba_with_context.py --model models/configs/mamba-demo.json \\
        --data_path data/demo/train.jsonl --tokenizer data/demo/tokenizer --output models/mine
    python train_mamba_with_context.py --model state-spaces/mamba-130m \\
        --data_path data/Mamba-Fine-Tune/squad_train.jsonl --output models/130m --num_epochs 10

The same command goes on where it was cut off. Several processes: torchrun --nproc_per_node N.
"""

import argparse
import functools

from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from context_qa.data_warnings import data_warnings
from context_qa.dataset import GroupedBatches, continuation
from context_qa.negatives import NEGATIVE_KINDS
from context_qa.training_data import data_report, within_length
from context_qa.training_run import TrainingRun
from context_qa.training_scores import doubts, examples_to_score, scorer
from errors import positive_float, positive_int, run_script, seed
from files import keep_inputs
from mamba_lm.checkpoint import load_model_and_tokenizer
from mamba_lm.device import choose_device
from mamba_lm.training import PrefixSuffixTrainer
from mamba_lm.training_arguments import training_arguments
from squad_utils import PROMPT_ORDERS, read_examples


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --model MODEL --data_path DATA --output DIR [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # fmt: off
    add = parser.add_argument
    add("--model", required=True, help="local folder, Hub name or config file")
    add("--data_path", required=True, metavar="DATA", help="JSONL or SQuAD JSON, or Hub name:split")
    add("--output", required=True, metavar="DIR", help="folder of the new model")
    add("--overwrite", action="store_true", help="remove the run or model that is at DIR")
    add("--tokenizer", metavar="NAME", help="folder, file or Hub name (default: the model's)")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")

    add = parser.add_argument_group("data").add_argument
    add("--negatives", choices=(*NEGATIVE_KINDS, "none"), default="random", metavar="KIND",
        help="other contexts: random, same_article, hard, none (default: random)")
    add("--negative_ratio", type=positive_float, default=1.0, metavar="R",
        help="unanswerable examples for an answerable one, the data's own first (default: 1)")
    add("--prompt_order", choices=PROMPT_ORDERS[:3], default=PROMPT_ORDERS[0], metavar="ORDER",
        help="context_first, question_first, read_twice (default: context_first)")
    add("--max_length", type=positive_int, metavar="N",
        help="tokens; longer examples are cut around the answer (default: no limit)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--num_epochs", type=positive_float, default=10.0, metavar="N", help="default: 10")
    add("--max_steps", type=positive_int, metavar="N", help="of the optimiser (default: all)")
    add("--learning_rate", type=positive_float, default=1e-4, metavar="RATE", help="default: 1e-4")
    add("--batch_size", type=positive_int, default=32, metavar="N", help="questions (default: 32)")
    add("--gradient_accumulation_steps", type=positive_int, default=1, metavar="N",
        help="default: 1")
    add("--optim", default="adamw_torch", metavar="NAME", help="default: adamw_torch")
    add("--fully_shard", action="store_true", help="weights in parts, over all processes")
    add("--trainer", metavar="KEY=VALUE", action="append", default=[],
        help="any field of TrainingArguments, repeatable: --trainer save_steps=100")

    add = parser.add_argument_group("scores").add_argument
    add("--eval_data", metavar="DATA", help="answered each epoch; the best model is kept")
    add("--patience", type=positive_int, default=5, metavar="N",
        help="end after so many evaluations without a better one (default: 5)")
    # fmt: on
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    keep_inputs([args.output], [args.model, args.tokenizer])
    arguments = trainer_arguments(args)
    with TrainingRun(args) as run:
        if run.is_complete:
            say(f"{args.output}: this run is complete; --overwrite begins anew")
        else:
            train(args, arguments, run)
            say(f"model written to {args.output}")


def train(args: argparse.Namespace, arguments: TrainingArguments, run: TrainingRun) -> None:
    negatives = None if args.negatives == "none" else args.negatives
    examples = read_examples(args.data_path)
    asked = read_examples(args.eval_data) if args.eval_data else []
    scored = examples_to_score(asked, negatives)
    set_seed(args.seed)  # before weights are drawn, should MODEL be a config file
    model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer)
    run.warn(data_warnings(args.data_path, examples, tokenizer, is_training=True))
    run.warn([*doubts(scored, examples), *data_warnings(args.eval_data, asked, tokenizer)])

    data = within_length(examples, tokenizer, args.prompt_order, args.max_length)
    batches = GroupedBatches(
        data.examples,
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
    score = scorer(scored, **prompt) if scored else None
    trainer = PrefixSuffixTrainer(
        model, arguments, batches, tokenize, tokenizer, score, args.patience, args.fully_shard
    )

    report = data_report(data, batches, **prompt, max_length=args.max_length)
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
    return training_arguments(args.output, device, args.trainer, **settings)


if __name__ == "__main__":
    run_script(main, parse_args)
