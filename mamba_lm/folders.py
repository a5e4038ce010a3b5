"""Find a model's folder, before anything that takes time is loaded."""

from pathlib import Path

from common.errors import UserError
from mamba_lm.foreign_files import parsing, read_foreign_json
from mamba_lm.tokenizer import TOKENIZER_FILES, find_tokenizer

RECORD = "training_args.json"  # the settings of the training, in the trained model's folder
_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", *TOKENIZER_FILES]


def require_model(name: str, tokenizer: str | None = None) -> None:
    """Raise a UserError unless the model exists, and the tokenizer if one is named.

    Both are a local folder or a Hub name; a model may also be a config file.
    """
    if name.endswith(".json"):
        read_foreign_json(Path(name))
    else:
        find_folder(name)
    if tokenizer is not None:
        find_tokenizer(tokenizer)


def find_folder(name: str) -> Path:
    """Return the local folder of a model; a Hub name is downloaded first.

    Raises:
        UserError: if there is no such folder, or the Hub does not provide it.
    """
    path = Path(name)
    if path.is_dir():
        return path
    is_hub_name = name.count("/") == 1 and not name.startswith((".", "/"))
    if path.exists() or not is_hub_name or path.parent.is_dir():  # models/... means a local folder
        raise UserError(f"{name}: no such model folder; give a folder, a Hub name or a config file")
    from huggingface_hub import snapshot_download

    with parsing(
        lambda reason: (
            f"{name}: no such local folder, and it cannot be downloaded from the Hub ({reason}); "
            "check the name and the network, or give a local folder"
        )
    ):
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
