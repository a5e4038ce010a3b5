"""Tokenizers as they are written; text that is never markup; ids with holes."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from errors import UserError
from mamba_lm.checkpoint import (
    find_tokenizer_of,
    load_model_and_tokenizer,
    load_tokenizer,
    save_model,
)
from mamba_lm.tokenizer import (
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
    """Trained on a line in which "1998" is a word."""
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
    """Blanks are part of words, and the first word gets one."""
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


def folder_of(tokenizer: Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS} | config))
    return folder


CLASSES = ["GPTNeoXTokenizerFast", "GPT2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_tokens_are_those_of_the_file_whatever_the_class(
    name, beside_a_model, tmp_path, make_model
):
    """transformers 5 rebuilds what it knows by its class's name: digits would stay together."""
    written = byte_level(split_digits=True)
    folder = folder_of(written, tmp_path / "t", tokenizer_class=name)
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
    folder = folder_of(byte_level(split_digits=True), tmp_path / "t")
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: loaded)
    with pytest.raises(UserError, match=r"tokenizer.json: transformers changes it .*pre_tokenizer"):
        load_tokenizer_at(folder)


def test_a_file_alone_has_the_usual_end_of_text_only_if_it_is_in_it(tmp_path):
    folder = folder_of(byte_level(), tmp_path / "a")
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer("", str(folder / "tokenizer.json")).eos_token == EOS
    folder = folder_of(byte_level(specials=["<end>"]), tmp_path / "b")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-text token"):
        load_tokenizer("", str(folder / "tokenizer.json"))


def test_a_truncation_in_the_file_cuts_nothing(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=9)
    loaded = load_tokenizer_at(folder_of(tokenizer, tmp_path / "t"))
    text = "one two three four five six"
    assert loaded.decode(token_ids(loaded, text)) == text
    [(ids, _)] = encode_with_offsets(loaded, [text])
    assert ids == token_ids(loaded, text)


# Which tokenizer


def test_a_falcon_mamba_model_needs_its_own(make_model, tmp_path):
    save_model(make_model(bcdt_rms_eps=1e-6), tmp_path / "model")
    for name in (tmp_path / "model", ROOT / "models/configs/mamba-demo.json"):
        with pytest.raises(UserError, match=r"Falcon-Mamba model without a tokenizer.*--tok"):
            find_tokenizer_of(str(name))
    assert load_tokenizer(str(tmp_path / "model"), str(DEMO)).eos_token == EOS


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.model", "vocab.txt", "spiece.model"])
def test_a_tokenizer_of_another_kind_is_not_passed_over(name, make_model, tmp_path):
    """A broken one is an error, not a reason to take GPT-NeoX's."""
    save_model(make_model(), tmp_path / "model")
    (tmp_path / "model" / name).write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path}/model: no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path / "model"))


def test_a_tokenizer_much_smaller_than_the_vocabulary_is_warned_about(make_model, tmp_path, capsys):
    for rows, is_said in ((2156, False), (2216, False), (4000, True)):
        save_model(make_model(vocab_size=rows), tmp_path / str(rows))
        load_model_and_tokenizer(str(tmp_path / str(rows)), str(DEMO))
        assert ("only 2,156 token ids" in capsys.readouterr().err) == is_said


def test_the_files_that_are_read(tmp_path):
    folder = folder_of(byte_level(), tmp_path / "t")
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "unrelated.json"):
        (folder / name).write_text("{}")
    read = ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "merges.txt"]
    assert {path.name for path in tokenizer_files(folder)} == set(read)
    assert {path.name for path in tokenizer_files(folder / "tokenizer.json")} == set(read)


# Ids with holes


@pytest.fixture
def holes(tmp_path) -> Path:
    """End-of-text is id 300 of 257 tokens: a case from outside where it is there, else the same."""
    if (CASES / "tokenizer_holes").exists():
        return CASES / "tokenizer_holes"
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(
        sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = folder_of(tokenizer, tmp_path / "holes")
    written = json.loads((folder / "tokenizer.json").read_text())
    written["added_tokens"] = [
        {"id": 300, "content": EOS, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(written))
    return folder


def test_the_bound_of_a_vocabulary_is_its_largest_id(holes, make_model, tmp_path):
    tokenizer = load_tokenizer_at(holes)
    assert (len(tokenizer), tokenizer.eos_token_id, vocabulary_bound(tokenizer)) == (257, 300, 301)
    save_model(make_model(vocab_size=296), tmp_path / "small")
    with pytest.raises(UserError, match=r"296 vocabulary rows, the tokenizer .* up to 300;"):
        load_model_and_tokenizer(str(tmp_path / "small"), str(holes))
    save_model(make_model(vocab_size=304), tmp_path / "fit")
    load_model_and_tokenizer(str(tmp_path / "fit"), str(holes))


# Text is text


def tokenizers(tmp_path):
    yield load_tokenizer_at(DEMO)
    yield load_tokenizer_at(folder_of(byte_level(), tmp_path / "byte"))
    for unigram in (False, True):
        folder = folder_of(
            sentencepiece_like(unigram),
            tmp_path / f"{unigram}",
            eos_token="</s>",
            unk_token="<unk>",
        )
        yield load_tokenizer_at(folder)


def test_the_name_of_a_control_token_in_a_text_is_text(tmp_path):
    for tokenizer in tokenizers(tmp_path):
        name = tokenizer.eos_token
        texts = [f"see {name} here", name, f"{name}{name}", f"x{name}\n", "no markup", ""]
        for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
            assert tokenizer.eos_token_id not in ids
            assert ids == token_ids(tokenizer, text)
            if "<unk>" not in tokenizer.decode(ids):
                shown = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                assert shown.replace(" ", "").strip() == text.replace(" ", "").strip()
        [(ids, offsets)] = encode_with_offsets(load_tokenizer_at(DEMO), [TEXT])
        assert 0 not in ids and offsets[-1][1] == len(TEXT)


def test_ordinary_text_has_the_tokens_it_always_had():
    tokenizer = load_tokenizer_at(DEMO)
    text = "The Wild Swan Hotel has 62 rooms. It costs $95 – naïve?\n\nQ: Who?\nA:"
    assert token_ids(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_slow_tokenizer_is_refused_where_offsets_are_needed():
    class Slow:
        is_fast, name_or_path = False, "some/slow"

    with pytest.raises(UserError, match=r"some/slow: a slow tokenizer.*--constrain_to_"):
        encode_with_offsets(Slow(), ["x"])


def test_the_tokenizer_that_is_saved_is_the_one_that_was_loaded(make_model, tmp_path):
    source = folder_of(
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
