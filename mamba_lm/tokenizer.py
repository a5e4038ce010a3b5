"""Tokenizers, loaded as they are written; user text is only ever text.

`tokenizer.json` defines the tokens. `AutoTokenizer` of transformers 5 builds some tokenizers anew
from their class's name and vocabulary, and so splits text otherwise than the file says (digits, for
one): here the file is loaded as it is, and what was loaded is compared with it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from errors import UserError

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"  # of state-spaces' models, whose folders have none
_DEFAULT_EOS = "<|endoftext|>"
_VOCABULARIES = (  # each alone makes a folder one with a tokenizer
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model"),
)
_BESIDE = (  # what transformers reads beside them
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    "chat_template.jinja",
)
_HUB_FILES = ["*.json", "*.model", "tokenizer*", "vocab*", "merges.txt", "*.jinja"]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own, or parts of one."""
    return any((folder / name).exists() for name in (*_VOCABULARIES, "tokenizer_config.json"))


def find_tokenizer(name: str) -> Path:
    """The local folder, or tokenizer.json file, of this name; downloaded from the Hub if need be.
    Raises UserError."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    # Not by AutoTokenizer, which asks for a wrong name for a minute.
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the Hub client raises many kinds, all of them about reaching it
        raise _unusable(name, error) from error


def tokenizer_files(path: Path) -> list[Path]:
    """The files that loading the tokenizer at this path reads."""
    folder, names = path, (*_VOCABULARIES, *_BESIDE)
    if path.is_file():
        folder, names = path.parent, (path.name, *_BESIDE)
    elif (path / "tokenizer.json").exists():
        names = ("tokenizer.json", *_BESIDE)
    return [folder / name for name in names if (folder / name).is_file()]


def load_tokenizer_at(path: Path):
    """The tokenizer of a folder or of a tokenizer.json file, which is read with what is beside it.

    A file alone ends texts with <|endoftext|>. Raises UserError where nothing can be loaded, there
    is no end-of-text token, or transformers would make other tokens than the file says.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    try:
        if not file.is_file():
            loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            names = loaded.vocab_files_names.values()
            if not any((folder / name).is_file() for name in names):  # it is then an empty one
                raise ValueError(f"none of {', '.join(names)} is in it")
        elif file.name == "tokenizer.json" and (folder / "tokenizer_config.json").exists():
            loaded = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        else:
            written = json.loads(file.read_text(encoding="utf-8"))
            tokens = {token["content"] for token in written["added_tokens"]}
            eos = _DEFAULT_EOS if path.is_file() and _DEFAULT_EOS in tokens else None
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=eos)
        if file.is_file():
            _require_as_written(loaded, file)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, ... for one cause
        raise _unusable(path, error) from error
    if loaded.eos_token_id is None:
        raise UserError(
            f"{path}: the tokenizer has no end-of-text token; name it as eos_token in "
            f"{folder / 'tokenizer_config.json'}"
        )
    return loaded


def _unusable(name: str | Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(
        f"{name}: no tokenizer can be loaded from it ({reason[:120]}); "
        "give --tokenizer a folder, a tokenizer.json file or a Hub name"
    )


def _require_as_written(loaded, file: Path) -> None:
    """UserError unless a loaded tokenizer is the one of its file."""
    from tokenizers import Tokenizer

    written, found = Tokenizer.from_file(str(file)), loaded.backend_tokenizer
    changed = [
        part
        for part in ("normalizer", "pre_tokenizer", "decoder")
        if _state(getattr(written, part)) != _state(getattr(found, part))
    ]
    if written.get_vocab(False) != found.get_vocab(False):
        changed.append("vocab")
    added = found.get_added_tokens_decoder()
    for token_id, token in written.get_added_tokens_decoder().items():
        if str(added.get(token_id)) != str(token):
            changed.append(f"the added token {token}")
    if changed:
        raise UserError(
            f"{file}: transformers changes it when it loads it ({changed[0]}); remove what asks "
            "for that from tokenizer_config.json"
        )


def _state(part) -> bytes | None:
    return part and part.__getstate__()


def vocabulary_bound(tokenizer) -> int:
    """The largest token id and one. `len(tokenizer)` is smaller where ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens.

    Nothing in a text is markup: `<|endoftext|>` is the characters that it is written with, and
    never the control token. UserError where a tokenizer cannot write a text without one.
    """
    if not texts:
        return []
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    found = tokenizer(list(texts), **plain)["input_ids"]
    control = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    for place, ids in enumerate(found):
        if not control.isdisjoint(ids):
            found[place] = _without_control(tokenizer, texts[place], control, plain)
    return found


def _without_control(tokenizer, text: str, control: set[int], plain: dict) -> list[int]:
    """Tokens of a text with a control token's name in it, by a tokenizer whose vocabulary gives the
    name its id: the name's first character is tokenised apart from its rest."""
    names = "|".join(map(re.escape, tokenizer.all_special_tokens))
    cuts = [match.start() + 1 for match in re.finditer(names, text)]
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [token for piece in tokenizer(pieces, **plain)["input_ids"] for token in piece]
    if not control.isdisjoint(ids):
        token = next(token for token in ids if token in control)
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} makes its control token "
            f"{tokenizer.convert_ids_to_tokens(token)!r} of plain text: {text!r:.80}"
        )
    return ids


def token_ids(tokenizer, text: str) -> list[int]:
    """`encode` of one text: a part of a prompt, which is tokenised apart from others."""
    return encode(tokenizer, [text])[0]


def encode_with_offsets(tokenizer, texts: Sequence[str]) -> list[tuple[list[int], list[tuple]]]:
    """Token ids of each text as `encode` gives them, and where each token is in the text, as
    (start, end) in characters. UserError for a tokenizer that does not know."""
    require_offsets(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    encoded = backend.encode_batch(list(texts), add_special_tokens=False)
    return [(one.ids, one.offsets) for one in encoded]


def require_offsets(tokenizer) -> None:
    """UserError unless the tokenizer is a fast one, which knows where tokens are in a text."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{tokenizer.name_or_path}: a slow tokenizer, which does not report where tokens are in"
            " a text; convert it to a tokenizer.json for --constrain_to_context and --explain"
        )
