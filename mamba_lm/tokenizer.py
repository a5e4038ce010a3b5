"""Tokenizers, loaded as they are written; user text is only ever text.

`tokenizer.json` defines the tokens. `AutoTokenizer` of transformers 5 rebuilds some tokenizers
from their class's name and vocabulary, and so splits text otherwise than the file says (digits, for
one): here the file is loaded as it is, and what was loaded is compared with it.
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

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"  # of state-spaces' models, whose folders have none
_DEFAULT_EOS = "<|endoftext|>"
_VOCABULARIES = (  # each alone makes a folder one with a tokenizer
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model"),
)
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_BESIDE = (*_CONFIGS, "added_tokens.json", "chat_template.jinja")  # read with a tokenizer.json
TOKENIZER_FILES = (*_VOCABULARIES, *_BESIDE, "merges.txt")
SAVED_FILES = ("tokenizer.json", *_BESIDE)  # what a saved tokenizer replaces: all that is read then
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of added tokens
_MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)  # as control tokens are written


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
    with parsing(lambda reason: _unusable(name, reason)):
        return Path(snapshot_download(name, allow_patterns=[*TOKENIZER_FILES, "config.json"]))


def tokenizer_files(path: Path) -> list[Path]:
    """The files that loading the tokenizer at this path reads. transformers chooses the class by
    config.json where there is no tokenizer.json."""
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = file.parent
    if file.name != "tokenizer.json":
        return [file]
    names = SAVED_FILES if file.is_file() else (*TOKENIZER_FILES, "config.json")
    return [folder / name for name in names if (folder / name).is_file()]


def load_tokenizer_at(path: Path):
    """The tokenizer of a folder or of a tokenizer.json file, which is read with what is beside it.

    A file alone, and one in a model's folder, ends texts with <|endoftext|> where no other file
    says what does. Raises UserError where nothing can be loaded, there is no end-of-text token, or
    transformers would make other tokens than the file says.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    added = _read_files(file)
    with _silent_library(), parsing(lambda reason: _unusable(path, reason)):
        loaded = _load(path, file, _eos(path, added))
        vocabulary, end = loaded.get_vocab(), loaded.eos_token_id
        special = set(loaded.all_special_tokens)
    if end is None:
        raise UserError(
            f"{path}: the tokenizer has no end-of-text token; name it as eos_token in "
            f"{file.parent / 'tokenizer_config.json'}"
        )
    if vocabulary.keys() <= special:
        raise UserError(f"{path}: the tokenizer has no tokens for texts")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{path}: two tokens of the tokenizer have one id")
    if added is not None:
        _require_as_written(loaded, file, added)
    loaded.name_or_path = str(path)  # empty, of a file alone; messages name the tokenizer by it
    _warn_of_losses(loaded, path)
    return loaded


def _read_files(file: Path) -> dict[str, int] | None:
    """The ids of the added tokens in tokenizer.json, None if there is none. UserError if any file
    that transformers may read with it is unfit, or the tokenizer needs code of its own."""
    folder, is_alone = file.parent, file.name != "tokenizer.json"
    added = None
    if os.path.lexists(file):
        added = _added_tokens(file)
        for name in () if is_alone else (*_BESIDE, "config.json"):
            if os.path.lexists(folder / name):
                (read_foreign_object if name.endswith(".json") else require_file)(folder / name)
        if not is_alone and (folder / "additional_chat_templates").is_dir():
            require_files(folder / "additional_chat_templates")
    else:
        require_files(folder)  # the class that a config names decides which are read
    config = folder / "tokenizer_config.json"
    settings = read_foreign_object(config) if config.exists() and not is_alone else {}
    for name in ("fast_tokenizer_files", *(("auto_map", "gguf_file") if added is None else ())):
        if name in settings:
            raise UserError(
                f"{config}: by the field {name} something else than the tokenizer's own files "
                "decides the tokens, such as code, which is never run; give a tokenizer.json"
            )
    return added


def _added_tokens(file: Path) -> dict[str, int]:
    listed = read_foreign_object(file).get("added_tokens", [])
    try:
        return {str(token["content"]): int(token["id"]) for token in listed}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise UserError(f"{file}: its added_tokens need a content and an id each") from error


def _eos(path: Path, added: Mapping[str, int] | None) -> str | None:
    """Of a tokenizer.json without another file that names it."""
    has_default = path.is_file() or (path / "config.json").is_file()
    return _DEFAULT_EOS if has_default and _DEFAULT_EOS in (added or ()) else None


def _load(path: Path, file: Path, eos: str | None):
    """The library's part, which may raise anything."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = file.parent
    if not file.is_file():
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        names = loaded.vocab_files_names.values()
        if not any((folder / name).is_file() for name in names):  # it is then an empty one
            raise ValueError(f"none of {', '.join(names)} is in it")
        return loaded
    if file.name == "tokenizer.json" and any((folder / n).exists() for n in _CONFIGS):
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=eos)


def _unusable(name: str | Path, reason: str) -> str:
    return (
        f"{name}: no tokenizer can be loaded from it ({reason}); "
        "give --tokenizer a folder, a tokenizer.json file or a Hub name"
    )


@contextlib.contextmanager
def _silent_library() -> Iterator[None]:
    """Rust code tells of panics on standard error, of unknown fields on standard output, where
    answers are: the refusal says it in one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    shown = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with open(os.devnull, "w") as nothing:
        for descriptor in shown:
            os.dup2(nothing.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stderr.flush()
        for descriptor, copy in shown.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _require_as_written(loaded, file: Path, added: Mapping[str, int]) -> None:
    """UserError unless a loaded tokenizer makes the tokens that its file says; a warning where
    files beside it add tokens that ordinary text can contain."""
    from tokenizers import Tokenizer

    with parsing(lambda reason: _unusable(file, reason)):
        written, found = Tokenizer.from_file(str(file)), loaded.backend_tokenizer
    changed = [
        part
        for part in ("normalizer", "pre_tokenizer", "decoder")
        if _state(getattr(written, part)) != _state(getattr(found, part))
    ]
    if written.get_vocab(False) != found.get_vocab(False):
        changed.append("vocab")
    if getattr(written.model, "dropout", None):
        changed.append("dropout, by which ids would differ from call to call")
    # The library gives another id than the file says to a token that is not in its vocabulary.
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
                warn(f"{file.parent}: {str(token)!r} is a token that {file.name} does not have")
        elif any(getattr(own, flag) != getattr(token, flag) for flag in _FLAGS) or (
            own.special != token.special and str(token) not in loaded.all_special_tokens
        ):
            changed.append(f"how the added token {str(token)!r} is found in texts")
    if changed:
        raise UserError(
            f"{file}: not loaded as it is written ({changed[0]}); correct it, or what asks for "
            "that in the files beside it"
        )


def _warn_of_losses(tokenizer, path: Path) -> None:
    """A line where a tokenizer drops parts of texts, with no unknown token in their place."""
    with _silent_library():
        lost = [name for name, text in _RARE.items() if not _tokens_or_error(tokenizer, text)]
    if lost:
        warn(f"{path}: the tokenizer drops {' and '.join(lost)}: no token stands for them")


_RARE = {"newlines": "\n", "characters that it does not know": "\U00012345"}


def _tokens_or_error(tokenizer, text: str) -> object:
    try:
        return _tokens(tokenizer, [text])[0]
    except UserError as error:  # a text with it will be refused by that
        return error


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
    found = _tokens(tokenizer, texts)
    control = _control_tokens(tokenizer)
    for place, ids in enumerate(found):
        if not control.keys().isdisjoint(ids):
            pieces = _pieces(texts[place], control.values())
            rows = _tokens(tokenizer, [piece for _, piece in pieces])
            found[place] = [token for row in rows for token in row]
            _require_no_control(tokenizer, found[place], texts[place])
    return found


def _tokens(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    with parsing(lambda reason: _unwritable(tokenizer, texts, reason)):
        return tokenizer(list(texts), **_PLAIN)["input_ids"]


def _unwritable(tokenizer, texts: Sequence[str], reason: str) -> str:
    shown = f"{texts[0]!r:.80}" if len(texts) == 1 else f"one of {len(texts):,} texts"
    return f"the tokenizer {tokenizer.name_or_path} has no tokens for {shown} ({reason})"


_PLAIN = {"add_special_tokens": False, "split_special_tokens": True}


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer) -> dict[int, str]:
    """End-of-text, and all added tokens that are written as markup is: <s>, [PAD], <|im_start|>. An
    added token that is a word or a mark is part of texts."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    markup = {number: str(t) for number, t in added.items() if _MARKUP.fullmatch(str(t))}
    model = tokenizer.backend_tokenizer.model if getattr(tokenizer, "is_fast", False) else None
    unknown = {tokenizer.unk_token, getattr(model, "unk_token", None)}  # a config need not name it
    markup = {number: name for number, name in markup.items() if name not in unknown}
    return markup | {tokenizer.eos_token_id: tokenizer.eos_token}


def _pieces(text: str, names: Iterable[str]) -> list[tuple[int, str]]:
    """A text cut after the first character of each control token's name in it, and where each piece
    begins: tokenised apart, they do not give the control token."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    starts = [0, *(match.start() + 1 for match in re.finditer(pattern, text))]
    return [(a, text[a:b]) for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def _require_no_control(tokenizer, ids: Sequence[int], text: str) -> None:
    control = _control_tokens(tokenizer)
    token = next((token for token in ids if token in control), None)
    if token is not None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} makes its control token {control[token]!r} of "
            f"plain text: {text!r:.80}"
        )


def token_ids(tokenizer, text: str) -> list[int]:
    """`encode` of one text: a part of a prompt, which is tokenised apart from others."""
    return encode(tokenizer, [text])[0]


def encode_with_offsets(tokenizer, texts: Sequence[str]) -> list[tuple[list[int], list[tuple]]]:
    """Token ids of each text as `encode` gives them, and where each token is in the text, as
    (start, end) in characters. UserError for a tokenizer that does not know."""
    require_offsets(tokenizer)
    backend, control = tokenizer.backend_tokenizer, _control_tokens(tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode_batch(texts):
        with parsing(lambda reason: _unwritable(tokenizer, texts, reason)):
            return backend.encode_batch(texts, add_special_tokens=False)

    found = []
    for text, one in zip(texts, encode_batch(texts), strict=True):
        ids, offsets = one.ids, one.offsets
        if not control.keys().isdisjoint(ids):
            pieces = _pieces(text, control.values())
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
    """UserError unless the tokenizer is a fast one, which knows where tokens are in a text."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{tokenizer.name_or_path}: a slow tokenizer, which does not report where tokens are in"
            " a text; convert it to a tokenizer.json for --constrain_to_context and --explain"
        )
