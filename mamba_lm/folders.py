"""Where a model is: found before anything that takes time is loaded."""

from pathlib import Path

from common.errors import UserError
from mamba_lm.foreign_files import parsing, read_foreign_json
from mamba_lm.tokenizer import TOKENIZER_FILES, find_tokenizer

RECORD = "training_args.json"  # in a trained model's folder: how it was trained
_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", *TOKENIZER_FILES]


def require_model(name: str, tokenizer: str | None = None) -> None:
    """UserError where there is no model, or no tokenizer, of this name, here or on the Hub."""
    if name.endswith(".json"):
        read_foreign_json(Path(name))
    else:
        find_folder(name)
    if tokenizer is not None:
        find_tokenizer(tokenizer)


def find_folder(name: str) -> Path:
    """The local folder of a model, downloaded from the Hub if need be."""
    path = Path(name)
    if path.is_dir():
        return path
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/"))
    if path.exists() or not is_hub_name or path.parent.is_dir():  # models/... is meant to be here
        raise UserError(f"{name}: no such model folder; give a folder, a Hub name or a config file")
    from huggingface_hub import snapshot_download

    with parsing(
        lambda reason: (
            f"{name}: no such folder here, and the Hub cannot give it ({reason}); "
            "check the name and the network, or give a local folder"
        )
    ):
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
