"""Write a model again in bfloat16, half the size, with its tokenizer.

python -m studies.base_model.export_bfloat16 models/base models/base-bf16
"""

from common.script import run_script

import argparse

import torch

from common.command_line import Parser
from common.errors import UserError
from common.output_files import new_folder
from mamba_lm.checkpoint import load_model_and_tokenizer, save_model


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model")
    parser.add_argument("output", metavar="DIR", help="folder of the new one")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.model.endswith(".json"):
        raise UserError(f"{args.model}: a config file has no weights; give a model's folder")
    model, tokenizer = load_model_and_tokenizer(args.model, dtype=torch.bfloat16)
    save_model(model, new_folder(args.output), tokenizer)
    size = 2 * sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} MB of weights written to {args.output}")


if __name__ == "__main__":
    run_script(main, parse_args)
