"""Train a Mamba language model to answer from a context and to abstain when it cannot.

    python train_mamba_with_context.py --model models/configs/mamba-demo.json \\
        --data_path data/demo/train.jsonl --tokenizer data/demo/tokenizer --output models/mine
    python train_mamba_with_context.py --model state-spaces/mamba-130m \\
        --data_path data/Mamba-Fine-Tune/squad_train.jsonl --output models/130m --num_epochs 10

Every answerable question is also asked on another context, where "I don't know." is right.
"""

import argparse
import functools
import json
import shutil
from pathlib import Path

from transformers import set_seed

from context_qa.dataset import GroupedBatches, continuation
from context_qa.provenance import run_record
from errors import positive_float, positive_int, run_script
from mamba_lm.checkpoint import NOTE, load_model_and_tokenizer, new_folder
from mamba_lm.device import choose_device
from mamba_lm.training import PrefixSuffixTrainer, training_arguments
from squad_utils import NEGATIVE_KINDS, PROMPT_ORDERS, read_examples


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="local folder, Hub name or config file")
    parser.add_argument("--data_path", required=True, help="JSONL or SQuAD JSON, or Hub name:split")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the new model")
    parser.add_argument("--num_epochs", type=positive_float, default=10.0, help="default: 10")
    parser.add_argument("--tokenizer", help="folder, file or Hub name (default: the model's)")
    parser.add_argument("--learning_rate", type=positive_float, default=1e-4, help="default: 1e-4")
    parser.add_argument(
        "--batch_size", type=positive_int, default=32, help="questions (default: 32)"
    )
    parser.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="default: 1"
    )
    parser.add_argument("--optim", default="adamw_torch", help="default: adamw_torch")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--negatives",
        choices=(*NEGATIVE_KINDS, "none"),
        default="random",
        help="the other context of each question (default: random)",
    )
    parser.add_argument(
        "--trainer",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any field of TrainingArguments, repeatable: --trainer max_steps=100",
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    examples = read_examples(args.data_path)
    output = new_folder(args.output)
    arguments = training_arguments(
        args.output,
        choose_device("cpu" if "use_cpu=true" in args.trainer else "auto"),
        args.trainer,
        num_train_epochs=args.num_epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        optim=args.optim,
        seed=args.seed,
    )
    set_seed(args.seed)  # before weights are drawn, should MODEL be a config file
    model, tokenizer = load_model_and_tokenizer(args.model, args.tokenizer)
    batches = GroupedBatches(
        examples,
        arguments.train_batch_size,
        None if args.negatives == "none" else args.negatives,
        args.seed,
        arguments.process_index,
        arguments.world_size,
    )
    tokenize = functools.partial(continuation, tokenizer=tokenizer, prompt_order=PROMPT_ORDERS[0])
    trainer = PrefixSuffixTrainer(model, arguments, batches, tokenize, tokenizer)
    if trainer.is_world_process_zero():
        num_parameters = sum(p.numel() for p in model.parameters())
        num_contexts = len({example.context for example in examples})
        print(
            f"{num_parameters:,} parameters; {len(examples):,} questions on {num_contexts:,} "
            f"contexts, {batches.num_pairings:,} examples an epoch with negatives: {args.negatives}"
        )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        record = run_record(args, args.model, args.data_path)
        (output / "training_args.json").write_text(json.dumps(record, indent=2) + "\n")
        note = Path(args.model) / NOTE
        if note.is_file():
            shutil.copy(note, output)
        print(f"model written to {output}")


if __name__ == "__main__":
    run_script(main, parse_args)
