"""Load tokenizers exactly as their files define them, and encode text without special tokens.

`tokenizer.json` defines the tokens. `AutoTokenizer` of transformers 5 rebuilds some tokenizers from
their class name and vocabulary, and then splits text differently from the file, digits for example.
Here the file itself is loaded, and the loaded tokenizer is compared with it. In user text, the name
of a control token is plain text.
"""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from common.errors import UserError, warn
from mamba_lm.foreign_files import (
    parsing,
    read_foreign_object,
    require_file,
    require_files,
)

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"  # for state-spaces' models, whose folders have none
_DEFAULT_EOS = "<|endoftext|>"
_VOCABULARIES = (  # a folder with any of these has a tokenizer
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model"),
)
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_BESIDE = (*_CONFIGS, "added_tokens.json", "chat_template.jinja")  # read with a tokenizer.json
TOKENIZER_FILES = (*_VOCABULARIES, *_BESIDE, "merges.txt")
SAVED_FILES = ("tokenizer.json", *_BESIDE)  # a saved tokenizer replaces all of these
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # the flags of an added token
_MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)  # the form of control tokens


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains a tokenizer, or a part of one."""
    return any((folder / name).exists() for name in (*_VOCABULARIES, "tokenizer_config.json"))


def find_tokenizer(name: str) -> Path:
    """Return the local folder or tokenizer.json file of this name; a Hub name is downloaded first.

    Raises:
        UserError: if the name is not a local path and cannot be downloaded.
    """
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    # AutoTokenizer would ask the Hub for a wrong name for a minute.
    with parsing(lambda reason: _describe_unusable(name, reason)):
        return Path(snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, "config.json"]))


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files that are read to load the tokenizer at this path. Without a tokenizer.json,
    transformers also reads config.json, to choose the class."""
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    if file.name != "tokenizer.json":
        return [file]
    names = SAVED_FILES if file.is_file() else (*TOKENIZER_FILES, "config.json")
    return [folder / name for name in names if (folder / name).is_file()]


def load_tokenizer_at(path: Path):
    """Load the tokenizer of a folder, or of a tokenizer.json file and the files beside it.

    For a single file, and for a file in a model's folder, the end-of-text token is <|endoftext|> if
    no other file names one.

    Returns:
        A tokenizer of transformers.

    Raises:
        UserError: if no tokenizer can be loaded, it has no end-of-text token, or transformers would
            produce other tokens than the file defines.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    added = _check_files(file)
    with _silent_library(), parsing(lambda reason: _describe_unusable(path, reason)):
        loaded = _load_with_library(path, file, _find_default_eos(path, added))
        vocabulary, end = loaded.get_vocab(), loaded.eos_token_id
        special = set(loaded.all_special_tokens)
    if end is None:
        raise UserError(
            f"{path}: the tokenizer has no end-of-text token; set eos_token in "
            f"{file.parent / 'tokenizer_config.json'}"
        )
    if vocabulary.keys() <= special:
        raise UserError(f"{path}: the tokenizer has no tokens for text; give another one")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{path}: two tokens of the tokenizer have the same id; give another one")
    if added is not None:
        _require_as_defined(loaded, file, added)
    loaded.name_or_path = str(path)  # used in messages; empty for a single file
    _warn_if_lossy(loaded, path)
    return loaded


def _check_files(file: Path) -> dict[str, int] | None:
    """Check all files that transformers may read, and return the ids of the added tokens in
    tokenizer.json by their content; None without a tokenizer.json.

    Raises:
        UserError: if a file cannot be read safely, or the tokenizer needs code from its folder.
    """
    folder, is_alone = file.parent, file.name != "tokenizer.json"
    added = None
    if os.path.lexists(file):
        added = _read_added_tokens(file)
        for name in () if is_alone else (*_BESIDE, "config.json"):
            if os.path.lexists(folder / name):
                (read_foreign_object if name.endswith(".json") else require_file)(folder / name)
        if not is_alone and (folder / "additional_chat_templates").is_dir():
            require_files(folder / "additional_chat_templates")
    else:
        require_files(folder)  # the class that a config names decides which files are read
    config = folder / "tokenizer_config.json"
    settings = read_foreign_object(config) if config.exists() and not is_alone else {}
    for name in ("fast_tokenizer_files", *(("auto_map", "gguf_file") if added is None else ())):
        if name in settings:
            raise UserError(
                f"{config}: the field {name} loads the tokens from code or from other files, which "
                "is not supported; give a tokenizer.json"
            )
    return added


def _read_added_tokens(file: Path) -> dict[str, int]:
    listed = read_foreign_object(file).get("added_tokens", [])
    try:
        return {str(token["content"]): int(token["id"]) for token in listed}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: each of its added_tokens needs a content and an id") from error


def _find_default_eos(path: Path, added: Mapping[str, int] | None) -> str | None:
    """Return the end-of-text token for a tokenizer.json if no other file names one."""
    has_default = path.is_file() or (path / "config.json").is_file()
    return _DEFAULT_EOS if has_default and _DEFAULT_EOS in (added or ()) else None


def _load_with_library(path: Path, file: Path, eos: str | None):
    """Load with transformers, which may raise any exception."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = file.parent
    if not file.is_file():
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        names = loaded.vocab_files_names.values()
        if not any((folder / name).is_file() for name in names):  # an empty tokenizer
            raise ValueError(f"it contains none of {', '.join(names)}")
        return loaded
    if file.name == "tokenizer.json" and any((folder / n).exists() for n in _CONFIGS):
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=eos)


def _describe_unusable(name: str | Path, reason: str) -> str:
    return (
        f"{name}: no tokenizer can be loaded from it ({reason}); "
        "give a folder with a tokenizer, a tokenizer.json file or a Hub name"
    )


@contextlib.contextmanager
def _silent_library() -> Iterator[None]:
    """Discard what Rust code prints: panics on standard error, unknown fields on standard output.
    The error message reports them in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    shown = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with open(os.devnull, "w") as null:
        for descriptor in shown:
            os.dup2(null.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stderr.flush()
        for descriptor, copy in shown.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _require_as_defined(loaded, file: Path, added: Mapping[str, int]) -> None:
    """Raise a UserError unless a loaded tokenizer produces the tokens that its file defines. Warns
    if the files beside it add tokens that ordinary text can contain."""
    from tokenizers import Tokenizer

    with parsing(lambda reason: _describe_unusable(file, reason)):
        written, found = Tokenizer.from_file(str(file)), loaded.backend_tokenizer
    changed = [
        part
        for part in ("normalizer", "pre_tokenizer", "decoder")
        if _state(getattr(written, part)) != _state(getattr(found, part))
    ]
    if written.get_vocab(False) != found.get_vocab(False):
        changed.append("vocab")
    if getattr(written.model, "dropout", None):
        changed.append("dropout, with which ids differ from call to call")
    # The library gives a new id to an added token that is not in its vocabulary.
    decoder = loaded.init_kwargs.get("added_tokens_decoder", {})
    ids = {**added, **{str(token): number for number, token in decoder.items()}}
    for content, number in ids.items():
        if found.token_to_id(content) != int(number):
            changed.append(f"the id {number} of the added token {content!r}")
    before = {str(token): token for token in written.get_added_tokens_decoder().values()}
    for token in found.get_added_tokens_decoder().values():
        own = before.get(str(token))
        if own is None:
            if not token.special:
                warn(f"{file.parent}: {str(token)!r} is a token that {file.name} does not contain")
        elif any(getattr(own, flag) != getattr(token, flag) for flag in _FLAGS) or (
            own.special != token.special and str(token) not in loaded.all_special_tokens
        ):
            changed.append(f"how the added token {str(token)!r} is found in text")
    if changed:
        raise UserError(
            f"{file}: not loaded as it is defined ({changed[0]}); correct it, or the settings in "
            "the files beside it"
        )


def _warn_if_lossy(tokenizer, path: Path) -> None:
    """Warn if a tokenizer drops parts of text without an unknown token in their place."""
    with _silent_library():
        lost = [name for name, text in _RARE.items() if not _tokens_or_error(tokenizer, text)]
    if lost:
        warn(f"{path}: the tokenizer drops {' and '.join(lost)}: it has no token for them")


_RARE = {"newlines": "\n", "characters that it does not know": "\U00012345"}


def _tokens_or_error(tokenizer, text: str) -> object:
    try:
        return _tokens(tokenizer, [text])[0]
    except UserError as error:  # such a text is refused with this error, not dropped
        return error


def _state(part) -> bytes | None:
    return part and part.__getstate__()


def vocabulary_bound(tokenizer) -> int:
    """Return the largest token id plus one. `len(tokenizer)` is smaller if ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens.

    The name of a control token in a text is plain text: `<|endoftext|>` becomes the tokens of its
    characters, never the control token.

    Raises:
        UserError: if the tokenizer cannot encode a text, or not without a control token.
    """
    if not texts:
        return []
    found = _tokens(tokenizer, texts)
    control = _control_tokens(tokenizer)
    for place, ids in enumerate(found):
        if not control.keys().isdisjoint(ids):
            pieces = _split_control_tokens(texts[place], control.values())
            rows = _tokens(tokenizer, [piece for _, piece in pieces])
            found[place] = [token for row in rows for token in row]
            _require_no_control(tokenizer, found[place], texts[place])
    return found


def _tokens(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    with parsing(lambda reason: _describe_unencodable(tokenizer, texts, reason)):
        return tokenizer(list(texts), **_PLAIN)["input_ids"]


def _describe_unencodable(tokenizer, texts: Sequence[str], reason: str) -> str:
    shown = f"{texts[0]!r:.80}" if len(texts) == 1 else f"one of {len(texts):,} texts"
    return f"the tokenizer {tokenizer.name_or_path} has no tokens for {shown} ({reason})"


_PLAIN = {"add_special_tokens": False, "split_special_tokens": True}


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer) -> dict[int, str]:
    """Return the control tokens by id: end-of-text, and all added tokens in the form of markup,
    such as <s>, [PAD] and <|im_start|>. Added tokens that are words or marks can occur in text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    markup = {number: str(t) for number, t in added.items() if _MARKUP.fullmatch(str(t))}
    model = tokenizer.backend_tokenizer.model if getattr(tokenizer, "is_fast", False) else None
    unknown = {tokenizer.unk_token, getattr(model, "unk_token", None)}  # not every config names it
    markup = {number: name for number, name in markup.items() if name not in unknown}
    return markup | {tokenizer.eos_token_id: tokenizer.eos_token}


def _split_control_tokens(text: str, names: Iterable[str]) -> list[tuple[int, str]]:
    """Split a text after the first character of each control token's name in it, and return where
    each piece begins, and the piece. Tokenised one by one, they do not give the control token."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    starts = [0, *(match.start() + 1 for match in re.finditer(pattern, text))]
    return [(a, text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _require_no_control(tokenizer, ids: Sequence[int], text: str) -> None:
    control = _control_tokens(tokenizer)
    token = next((token for token in ids if token in control), None)
    if token is not None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} encodes plain text as its control token "
            f"{control[token]!r}: {text!r:.80}; remove that text or give another tokenizer"
        )


def token_ids(tokenizer, text: str) -> list[int]:
    """Return the token ids of one text, as `encode`."""
    return encode(tokenizer, [text])[0]


def encode_with_offsets(tokenizer, texts: Sequence[str]) -> list[tuple[list[int], list[tuple]]]:
    """Return, for each text, the token ids as `encode` and each token's (start, end) in characters.

    Raises:
        UserError: as `encode` and `require_offsets`.
    """
    require_offsets(tokenizer)
    backend, control = tokenizer.backend_tokenizer, _control_tokens(tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode_batch(texts):
        with parsing(lambda reason: _describe_unencodable(tokenizer, texts, reason)):
            return backend.encode_batch(texts, add_special_tokens=False)

    found = []
    for text, one in zip(texts, encode_batch(texts), strict=True):
        ids, offsets = one.ids, one.offsets
        if not control.keys().isdisjoint(ids):
            pieces = _split_control_tokens(text, control.values())
            rows = encode_batch([piece for _, piece in pieces])
            ids = [token for row in rows for token in row.ids]
            offsets = [
                (begin + start, begin + end)
                for (begin, _), row in zip(pieces, rows, strict=True)
                for start, end in row.offsets
            ]
            _require_no_control(tokenizer, ids, text)
        found.append((ids, offsets))
    return found


def require_offsets(tokenizer) -> None:
    """Raise a UserError unless the tokenizer is a fast one, which reports where tokens are."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{tokenizer.name_or_path}: a slow tokenizer, which does not report where tokens "
            "are in a text; convert it to a tokenizer.json"
        )
