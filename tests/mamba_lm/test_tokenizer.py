"""Tokenizers as their files define them; control tokens in text; ids with gaps."""

import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from mamba_lm.checkpoint import (
    find_tokenizer_of,
    load_model_and_tokenizer,
    load_tokenizer,
    save_model,
)
from mamba_lm.folders import find_folder
from mamba_lm.tokenizer import (
    TOKENIZER_FILES,
    encode,
    encode_with_offsets,
    load_tokenizer_at,
    token_ids,
    tokenizer_files,
    vocabulary_bound,
)

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "data/demo/tokenizer"
CASES = ROOT.parent / "shared/cases"
EOS = "<|endoftext|>"
TEXT = "In 1998 Zoé paid $45 for 12 <|endoftext|> tickets.\n"


def byte_level(split_digits: bool = False, specials=(EOS,)) -> Tokenizer:
    """A tokenizer trained on a line in which "1998" is a word."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split_digits:
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["in 1998 the fair of 1998 was in 1998"] * 3, trainer)
    return tokenizer


def sentencepiece_like(unigram: bool = False) -> Tokenizer:
    """A tokenizer in which spaces are part of words, and the first word gets one."""
    tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    settings = {"special_tokens": ["<unk>", "</s>"], "show_progress": False, "vocab_size": 300}
    trainer = (
        trainers.UnigramTrainer(unk_token="<unk>", **settings)
        if unigram
        else trainers.BpeTrainer(**settings)
    )
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text("utf-8")], trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS} | config))
    return folder


CLASSES = ["GPTNeoXTokenizerFast", "GPT2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_tokens_are_those_of_the_file_for_every_class(name, beside_a_model, tmp_path, make_model):
    """transformers 5 rebuilds tokenizers from their class name: digits would not be split."""
    written = byte_level(split_digits=True)
    folder = save_tokenizer(written, tmp_path / "t", tokenizer_class=name)
    if beside_a_model:
        save_model(make_model(vocab_size=400), folder)
    wanted = written.encode("in 1998", add_special_tokens=False)
    assert wanted.tokens[-4:] == ["1", "9", "9", "8"]
    for path in (folder, folder / "tokenizer.json"):
        loaded = load_tokenizer("", str(path))
        assert token_ids(loaded, "in 1998") == wanted.ids
        assert loaded.eos_token_id == written.token_to_id(EOS)
    if beside_a_model:
        assert token_ids(load_tokenizer(str(folder)), "in 1998") == wanted.ids


def test_a_change_by_transformers_is_refused(tmp_path, monkeypatch):
    folder = save_tokenizer(byte_level(split_digits=True), tmp_path / "t")
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: loaded)
    with pytest.raises(UserError, match=r"tokenizer.json: not loaded as it is defined .pre_tok"):
        load_tokenizer_at(folder)


def test_a_single_file_has_the_default_end_of_text_only_if_it_contains_it(tmp_path):
    folder = save_tokenizer(byte_level(), tmp_path / "a")
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer("", str(folder / "tokenizer.json")).eos_token == EOS
    folder = save_tokenizer(byte_level(specials=["<end>"]), tmp_path / "b")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer("", str(folder / "tokenizer.json"))


def test_truncation_settings_in_the_file_are_not_applied(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=9)
    loaded = load_tokenizer_at(save_tokenizer(tokenizer, tmp_path / "t"))
    text = "one two three four five six"
    assert loaded.decode(token_ids(loaded, text)) == text
    [(ids, _)] = encode_with_offsets(loaded, [text])
    assert ids == token_ids(loaded, text)


# Choice of the tokenizer


def test_a_falcon_mamba_model_needs_its_own_tokenizer(make_model, tmp_path):
    save_model(make_model(bcdt_rms_eps=1e-6), tmp_path / "model")
    for name in (tmp_path / "model", ROOT / "models/configs/mamba-demo.json"):
        with pytest.raises(UserError, match="its family has no default one; give its"):
            find_tokenizer_of(str(name))
    assert load_tokenizer(str(tmp_path / "model"), str(DEMO)).eos_token == EOS


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model", "vocab.txt", "spiece.model"])
def test_a_broken_tokenizer_of_another_kind_is_an_error(name, make_model, tmp_path):
    """It is no reason to use GPT-NeoX's tokenizer."""
    save_model(make_model(), tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    reason = "(: no tokenizer can be loaded|/vocab.json: not JSON)"
    with pytest.raises(UserError, match=f"{tmp_path}/model{reason}"):
        load_tokenizer(str(tmp_path / "model"))


def test_messages_name_a_tokenizer_that_is_a_single_file(make_model, tmp_path, capsys):
    save_model(make_model(vocab_size=5000), tmp_path / "model")
    file = tmp_path / "alone.json"
    byte_level().save(str(file))
    load_model_and_tokenizer(str(tmp_path / "model"), str(file))
    err = capsys.readouterr().err
    assert f", the tokenizer {file} has only " in err and "  " not in err


def test_a_tokenizer_much_smaller_than_the_vocabulary_gives_a_warning(make_model, tmp_path, capsys):
    for rows, is_warned in ((2156, False), (2216, False), (4000, True)):
        save_model(make_model(vocab_size=rows), tmp_path / str(rows))
        load_model_and_tokenizer(str(tmp_path / str(rows)), str(DEMO))
        assert ("only 2,156 token ids" in capsys.readouterr().err) == is_warned


def test_tokenizer_files_are_those_that_are_read(tmp_path):
    folder = save_tokenizer(byte_level(), tmp_path / "t")
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "unrelated.json"):
        (folder / name).write_text("{}")
    read = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"]
    assert {path.name for path in tokenizer_files(folder)} == set(read)
    assert {path.name for path in tokenizer_files(folder / "tokenizer.json")} == set(read)


# Ids with gaps


@pytest.fixture
def gaps(tmp_path) -> Path:
    """A tokenizer of 257 tokens whose end-of-text has id 300: the shared case, or the same made
    here."""
    if (CASES / "tokenizer_holes").exists():
        return CASES / "tokenizer_holes"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)} | {EOS: 300}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = save_tokenizer(tokenizer, tmp_path / "gaps")
    written = json.loads((folder / "tokenizer.json").read_text())
    written["added_tokens"] = [
        {"id": 300, "content": EOS, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return folder


def test_the_bound_of_a_vocabulary_is_its_largest_id(gaps, make_model, tmp_path):
    tokenizer = load_tokenizer_at(gaps)
    assert (len(tokenizer), tokenizer.eos_token_id, vocabulary_bound(tokenizer)) == (257, 300, 301)
    save_model(make_model(vocab_size=296), tmp_path / "small")
    with pytest.raises(
        UserError, match=r"296 vocabulary rows, the tokenizer .* has token ids up to 300;"
    ):
        load_model_and_tokenizer(str(tmp_path / "small"), str(gaps))
    save_model(make_model(vocab_size=304), tmp_path / "fit")
    load_model_and_tokenizer(str(tmp_path / "fit"), str(gaps))


# Added tokens


def add_token(folder: Path, **added: object) -> None:
    """Append an added token to tokenizer.json."""
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    plain = {"id": 0, "content": "", "special": False, "normalized": False}
    plain |= {"single_word": False, "lstrip": False, "rstrip": False}
    written["added_tokens"].append(plain | added)
    path.write_text(json.dumps(written))


def test_an_added_token_whose_id_the_library_changes_is_refused(tmp_path):
    folder = save_tokenizer(byte_level(), tmp_path / "a")
    add_token(folder, id=7000, content="<z>")
    with pytest.raises(UserError, match=r"not loaded as it is defined .the id 7000 of .*<z>"):
        load_tokenizer_at(folder)
    decoder = {"9000": {"content": "<ctl>", "special": True, "normalized": False,
                        "lstrip": False, "rstrip": False, "single_word": False}}  # fmt: skip
    folder = save_tokenizer(byte_level(), tmp_path / "b", added_tokens_decoder=decoder)
    with pytest.raises(UserError, match="the id 9000 of the added token '<ctl>'"):
        load_tokenizer_at(folder)


@pytest.mark.parametrize("flag", ["special", "lstrip", "rstrip", "single_word"])
def test_an_added_token_that_is_found_differently_is_refused(flag, tmp_path):
    written = byte_level()
    written.add_tokens(["  "])
    number = written.token_to_id("  ")
    flags = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    decoder = {str(number): {"content": "  "} | flags | {"normalized": True, flag: True}}
    folder = save_tokenizer(written, tmp_path / "a", added_tokens_decoder=decoder)
    with pytest.raises(UserError, match="how the added token '  ' is found in text"):
        load_tokenizer_at(folder)


def test_words_that_another_file_makes_tokens_give_a_warning(tmp_path, capsys):
    folder = save_tokenizer(byte_level(), tmp_path / "a", pad_token="[PAD]")
    assert load_tokenizer_at(folder).pad_token_id is not None
    assert capsys.readouterr().err == ""  # a control token does not occur in text
    folder = save_tokenizer(byte_level(), tmp_path / "b")
    (folder / "added_tokens.json").write_text(json.dumps({"zzz": len(load_tokenizer_at(folder))}))
    loaded = load_tokenizer_at(folder)
    assert loaded.convert_tokens_to_ids("zzz") == len(loaded) - 1
    assert "'zzz' is a token that tokenizer.json does not contain" in capsys.readouterr().err


def test_dropout_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.model.dropout = 0.1
    with pytest.raises(UserError, match="dropout"):
        load_tokenizer_at(save_tokenizer(tokenizer, tmp_path / "a"))


# Folders with other files


def test_a_model_folder_with_only_a_tokenizer_json(make_model, tmp_path):
    save_model(make_model(vocab_size=400), tmp_path / "model")
    byte_level().save(str(tmp_path / "model/tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "model")).eos_token == EOS
    named = byte_level(specials=[EOS, "<end>"])
    named.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    for path in ("model", "model/tokenizer.json"):
        assert load_tokenizer("", str(tmp_path / path)).eos_token == "<end>"


def test_config_json_is_a_tokenizer_file_without_a_tokenizer_json(tmp_path):
    """The class that it names decides how text is split."""
    (tmp_path / "vocab.json").write_text("{}")
    for name in ("merges.txt", "config.json", "unrelated.json"):
        (tmp_path / name).write_text("{}")
    assert {path.name for path in tokenizer_files(tmp_path)} == {
        "vocab.json", "merges.txt", "config.json"
    }  # fmt: skip


def test_all_files_of_a_tokenizer_are_downloaded(monkeypatch, tmp_path):
    requested = []

    def download(name, allow_patterns):
        requested.extend(allow_patterns)
        return str(DEMO)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for find in (lambda: find_tokenizer_of("", "some/name"), lambda: find_folder("some/name")):
        requested.clear()
        find()
        for name in (*TOKENIZER_FILES, "config.json"):
            assert any(fnmatch(name, pattern) for pattern in requested), name


def test_saving_removes_the_files_of_an_older_tokenizer(make_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("added_tokens.json", "chat_template.jinja", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    tokenizer = load_tokenizer_at(DEMO)
    save_model(make_model(vocab_size=2156), folder, tokenizer)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    save_model(make_model(vocab_size=2156), folder)  # without a tokenizer, the files stay
    assert {path.name for path in folder.iterdir()} == names


# Control tokens in text


def tokenizers(tmp_path):
    yield load_tokenizer_at(DEMO)
    yield load_tokenizer_at(save_tokenizer(byte_level(), tmp_path / "byte"))
    for unigram in (False, True):
        folder = save_tokenizer(
            sentencepiece_like(unigram),
            tmp_path / f"{unigram}",
            eos_token="</s>",
            unk_token="<unk>",
        )
        yield load_tokenizer_at(folder)


def test_the_name_of_a_control_token_in_a_text_is_plain_text(tmp_path):
    for tokenizer in tokenizers(tmp_path):
        name = tokenizer.eos_token
        texts = [f"see {name} here", name, f"{name}{name}", f"x{name}\n", "no markup", ""]
        for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
            assert tokenizer.eos_token_id not in ids
            assert ids == token_ids(tokenizer, text)
            if "<unk>" not in tokenizer.decode(ids):
                shown = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                assert shown.replace(" ", "").strip() == text.replace(" ", "").strip()
        with_offsets = encode_with_offsets(tokenizer, texts)
        assert [ids for ids, _ in with_offsets] == encode(tokenizer, texts)
        for text, (ids, offsets) in zip(texts, with_offsets, strict=True):
            assert len(offsets) == len(ids)
            assert all(0 <= start <= end <= len(text) for start, end in offsets)


def test_markup_is_plain_text_even_if_it_is_not_a_special_token(tmp_path):
    folder = save_tokenizer(byte_level(), tmp_path / "a")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["<|im_start|>", "hotel"])
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer_at(folder)
    markup, word = (loaded.convert_tokens_to_ids(t) for t in ("<|im_start|>", "hotel"))
    ids = token_ids(loaded, "a hotel <|im_start|>user")
    assert markup not in ids and word in ids
    assert loaded.decode(ids) == "a hotel <|im_start|>user"


def test_a_special_token_that_is_a_mark_or_a_word_is_used_in_text(tmp_path):
    written = byte_level(specials=[EOS, "!", "Question"])
    folder = save_tokenizer(written, tmp_path / "a", pad_token="!", mask_token="Question")
    loaded = load_tokenizer_at(folder)
    text = "A Question! An answer!"
    assert loaded.decode(token_ids(loaded, text)) == text


def test_ordinary_text_has_the_tokens_of_the_library():
    tokenizer = load_tokenizer_at(DEMO)
    text = "The Wild Swan Hotel has 62 rooms. It costs $95 – naïve?\n\nQ: Who?\nA:"
    assert token_ids(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_slow_tokenizer_is_refused_where_offsets_are_needed():
    class Slow:
        is_fast, name_or_path = False, "some/slow"

    with pytest.raises(
        UserError, match=r"some/slow: a slow tokenizer.*convert it to a tokenizer\.json"
    ):
        encode_with_offsets(Slow(), ["x"])


def test_the_saved_tokenizer_is_the_loaded_one(make_model, tmp_path):
    source = save_tokenizer(
        byte_level(split_digits=True), tmp_path / "t", tokenizer_class="GPT2Tokenizer"
    )
    tokenizer = load_tokenizer_at(source)
    encode(tokenizer, [TEXT])
    encode_with_offsets(tokenizer, [TEXT])
    save_model(make_model(vocab_size=400), tmp_path / "model", tokenizer)
    again = load_tokenizer(str(tmp_path / "model"))
    assert token_ids(again, TEXT) == token_ids(tokenizer, TEXT)
    assert again(EOS, add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]
    assert len(again) == len(tokenizer)
