"""Train a Mamba language model to answer from a context and to abstain when it cannot.

    python train_mamba_with_context.py --model models/configs/mamba-demo.json \\
        --data_path data/demo/train.jsonl --tokenizer data/demo/tokenizer --output models/mine
    python train_mamba_with_context.py --model state-spaces/mamba-130m \\
        --data_path data/Mamba-Fine-Tune/squad_train.jsonl --output models/130m --num_epochs 10

The same command resumes a run that was interrupted. Several processes: torchrun --nproc_per_node N.
"""

from common.script import loading, run_script

import argparse

from common.command_line import Parser, positive_float, positive_int, seed
from common.output_files import check_inputs_not_overwritten
from context_qa.arguments import read_inputs
from context_qa.negatives import NEGATIVE_KINDS
from context_qa.training import TrainingSettings
from squad_utils import PROMPT_ORDERS


def parse_args() -> argparse.Namespace:
    usage = "%(prog)s --model MODEL --data_path DATA --output DIR [options]"
    parser = Parser(__doc__, usage=usage)
    # fmt: off
    add = parser.add_argument
    add("--model", required=True, help="local folder, Hub name or config file")
    add("--data_path", required=True, metavar="DATA", help="JSONL or SQuAD JSON, or Hub name:split")
    add("--output", required=True, metavar="DIR", help="folder of the new model")
    add("--overwrite", action="store_true", help="restart: remove the run in DIR")
    add("--tokenizer", metavar="NAME", help="folder, file or Hub name (default: the model's)")
    add("--seed", type=seed, default=0, metavar="N", help="default: 0")

    add = parser.add_argument_group("data").add_argument
    add("--negatives", choices=(*NEGATIVE_KINDS, "none"), default="random", metavar="KIND",
        help="random, same_article, hard, none (default: random)")
    add("--negative_ratio", type=positive_float, default=1.0, metavar="R",
        help="unanswerable examples for an answerable one, the data's own first (default: 1)")
    add("--prompt_order", choices=PROMPT_ORDERS[:3], default=PROMPT_ORDERS[0], metavar="ORDER",
        help="context_first, question_first, read_twice (default: context_first)")
    add("--max_length", type=positive_int, metavar="N",
        help="tokens; longer examples are cut around the answer (default: no limit)")

    add = parser.add_argument_group("optimization").add_argument
    add("--num_epochs", type=positive_float, default=10.0, metavar="N", help="default: 10")
    add("--max_steps", type=positive_int, metavar="N", help="of the optimizer (default: all)")
    add("--learning_rate", type=positive_float, default=1e-4, metavar="RATE", help="default: 1e-4")
    add("--batch_size", type=positive_int, default=32, metavar="N", help="questions (default: 32)")
    add("--gradient_accumulation_steps", type=positive_int, default=1, metavar="N",
        help="default: 1")
    add("--optim", default="adamw_torch", metavar="NAME", help="default: adamw_torch")
    add("--fully_shard", action="store_true", help="shard the weights over all processes")
    add("--trainer", metavar="KEY=VALUE", action="append", default=[],
        help="any field of TrainingArguments, repeatable: --trainer save_steps=100")

    add = parser.add_argument_group("scores").add_argument
    add("--eval_data", metavar="DATA", help="scored each epoch; the best model is kept")
    add("--patience", type=positive_int, default=5, metavar="N",
        help="stop after N evaluations without a better score, or an equal one with a lower loss "
        "(default: 5)")
    # fmt: on
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    check_inputs_not_overwritten([args.output], [args.model, args.tokenizer])
    sources = (args.data_path, args.eval_data)
    data = read_inputs(args.model, args.tokenizer, sources, args.output)
    with loading("PyTorch"):
        from context_qa.training.train import train
    train(TrainingSettings(**vars(args)), data)


if __name__ == "__main__":
    run_script(main, parse_args)
