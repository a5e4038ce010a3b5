"""Where a model is: found before anything that takes time is loaded."""

from pathlib import Path

from errors import UserError
from files import read_json
from mamba_lm.tokenizer import TOKENIZER_FILES, find_tokenizer

_HUB_FILES = ["*.json", "*.safetensors", "pytorch_model*.bin", *TOKENIZER_FILES]


def require_model(name: str, tokenizer: str | None = None) -> None:
    """UserError where there is no model, or no tokenizer, of this name, here or on the Hub."""
    if name.endswith(".json"):
        read_json(name, "a model's config file")
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

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the Hub client raises many kinds, all of them about reaching it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: no such folder here, and the Hub cannot give it ({reason[:120]}); "
            "check the name and the network, or give a local folder"
        ) from error
