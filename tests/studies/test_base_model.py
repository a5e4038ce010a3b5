"""The base model study: a token file loses nothing, training learns and resumes, models load."""

import argparse
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from mamba_lm.checkpoint import load_model_and_tokenizer
from mamba_lm.tokenizer import load_tokenizer_at
from squad_utils import read_examples
from studies.base_model import pack, train_base_model
from studies.base_model.make_recall_practice import practice
from studies.base_model.text_files import Document, read_documents
from studies.base_model.train_tokenizer import sample, train_tokenizer
from studies.base_model.windows import Windows, split_held_out

ROOT = Path(__file__).parents[2]


def article(number: int) -> str:
    """A text with regularities that a small model finds fast."""
    rng = random.Random(number)
    names = rng.sample(["Ada", "Bo", "Cy", "Dee"], 2)
    line = f"{names[0]} met {names[1]} in {rng.randint(1900, 1999)}. <|endoftext|> is a text – ö.\n"
    return f"= Article {number} =\n" + line * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a text file, a tokenizer of 400 ids and a token file."""
    folder = tmp_path_factory.mktemp("base")
    texts = [article(number) for number in range(60)]
    (folder / "text.txt").write_text("".join(texts), encoding="utf-8")
    train_tokenizer(texts, 400, "merged", str(folder / "tokenizer"))
    tokens = pack.pack(texts, str(folder / "tokenizer"), str(folder / "tokens"), processes=2)
    assert tokens[1] == 60
    config = {"d_model": 32, "n_layer": 2, "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_title_begins_a_document(tmp_path):
    text = "= A =\none\n= not a title\n= B =\ntwo"
    for name, opened in (("a.txt", open), ("a.txt.xz", lzma.open)):
        with opened(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(text)
        assert list(read_documents([tmp_path / name])) == [
            Document("A", "= A =\none\n= not a title\n"),
            Document("B", "= B =\ntwo"),
        ]
    (tmp_path / "bad.txt.xz").write_bytes(b"no xz")
    with pytest.raises(UserError, match=r"bad\.txt\.xz"):
        list(read_documents([tmp_path / "bad.txt.xz"]))


def test_a_sample_is_of_every_kth_text():
    texts = [f"{number:04}" for number in range(1000)]
    found = sample(iter(texts), 1000)
    assert found == texts[::4]
    assert sample(texts, 1e9) == texts


@pytest.mark.parametrize("digits, count", [("merged", 1), ("single", 4)])
def test_digits_are_merged_or_single(tmp_path, digits, count):
    train_tokenizer(["1999 was. " * 50], 300, digits, str(tmp_path / "tokenizer"))
    tokenizer = load_tokenizer_at(tmp_path / "tokenizer")
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer("1999")["input_ids"]) == count


def test_a_token_file_gives_the_texts_again(folder):
    packed = pack.read_packed(str(folder / "tokens"))
    tokenizer = load_tokenizer_at(folder / "tokenizer")
    assert list(pack.read_texts(packed, tokenizer)) == [article(number) for number in range(60)]
    assert packed.num_bytes == [len(article(number).encode()) for number in range(60)]
    # The text's own <|endoftext|> is characters, not a document's end.
    assert (packed.tokens == 0).sum() == 60
    (folder / "short.json").write_text((folder / "tokens.json").read_text())
    (folder / "short.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    with pytest.raises(UserError, match="says otherwise"):
        pack.read_packed(str(folder / "short"))


def test_token_files_are_read_as_one(folder):
    tokenizer = load_tokenizer_at(folder / "tokenizer")
    packed = pack.read_all([str(folder / "tokens")] * 2)
    assert list(pack.read_texts(packed, tokenizer)) == 2 * [article(n) for n in range(60)]
    assert len(packed.num_bytes) == 120


def test_held_out_documents_are_the_last(folder):
    packed = pack.read_packed(str(folder / "tokens"))
    rest, held_out = split_held_out(packed, 300)
    assert (
        300
        <= len(held_out.tokens)
        < 300 + max(b - a for a, b in zip(packed.starts, packed.starts[1:], strict=False))
    )
    assert len(rest) + len(held_out.tokens) == len(packed.tokens) and rest[-1] == 0
    text = load_tokenizer_at(folder / "tokenizer").decode(held_out.tokens[held_out.tokens != 0])
    assert held_out.num_bytes == len(text.encode())
    with pytest.raises(UserError, match="held out"):
        split_held_out(packed, len(packed.tokens))


def test_an_epoch_reads_every_window_once(folder):
    tokens, _ = split_held_out(pack.read_packed(str(folder / "tokens")), 300)
    windows = Windows(tokens, 16, 0, torch.device("cpu"))
    starts = [windows._start(place) for place in range(windows.an_epoch)]
    assert sorted(starts) == list(range(min(starts), min(starts) + 16 * windows.an_epoch, 16))
    assert 0 <= min(starts) < 16 and max(starts) + 17 <= len(tokens)
    batch = windows.batch(3, 4)
    assert batch.shape == (4, 17)
    assert batch[1].tolist() == tokens[starts[13] : starts[13] + 17].tolist()
    again = Windows(tokens, 16, 0, torch.device("cpu"))
    assert torch.equal(again.batch(3, 4), batch)  # without the batches before it


def train(folder: Path, output: Path, **changes) -> None:
    settings = {
        "config": folder / "config.json", "tokenizer": folder / "tokenizer", "output": output,
        "tokens": folder / "tokens", "max_steps": 60, "length": 32, "batch_size": 8,
        "learning_rate": 1e-2, "held_out": 300, "evaluations": 3, "device": "cpu", "log_every": 10,
    } | changes  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    command = [sys.executable, "-m", "studies.base_model.train_base_model", *flags]
    subprocess.run(command, cwd=ROOT, check=True)


def run(script: str, *arguments) -> None:
    command = [sys.executable, "-m", f"studies.base_model.{script}", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True)


def rows(output: Path) -> list[dict]:
    return [json.loads(row) for row in (output / "log.jsonl").read_text().splitlines()]


def test_training_learns_and_the_model_loads(folder, tmp_path):
    train(folder, tmp_path / "base")
    bits = [row["held_out_bits_per_byte"] for row in rows(tmp_path / "base") if len(row) == 4]
    assert len(bits) == 3 and bits[2] < bits[0]
    losses = [row["loss"] for row in rows(tmp_path / "base") if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    model, tokenizer = load_model_and_tokenizer(str(tmp_path / "base"))
    assert model.config.d_model == 32 and tokenizer.eos_token_id == 0


def test_a_resumed_run_equals_one_that_was_never_stopped(folder, tmp_path, monkeypatch, one_thread):
    def run(output: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        arguments = argparse.Namespace(
            config=str(folder / "config.json"), tokenizer=None, tokens=[str(folder / "tokens")],
            output=str(tmp_path / output), max_steps=12, minutes=None, length=16, batch_size=4,
            learning_rate=1e-2, warmup=0.1, weight_decay=0.1, held_out=300, evaluations=2,
            log_every=5, save_minutes=1e-9, device="cpu", seed=3,
        )  # fmt: skip
        torch.manual_seed(3)
        model = train_base_model.load_model(arguments.config).train()
        run = train_base_model.Run(arguments, model, None, torch.device("cpu"))
        step = run._train_step

        def stopping_step():
            if run.step == stop_at:
                raise KeyboardInterrupt
            return step()

        run._train_step = stopping_step
        run.train()
        return model.state_dict()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=7)
    resumed = run("cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [row["step"] for row in rows(tmp_path / "cut")] == [
        row["step"] for row in rows(tmp_path / "whole")
    ]


@pytest.mark.slow
def test_a_run_with_other_settings_is_not_resumed(folder, tmp_path):
    train(folder, tmp_path / "base", max_steps=2)
    with pytest.raises(subprocess.CalledProcessError):
        train(folder, tmp_path / "base", max_steps=2, learning_rate=1e-3)


def test_the_clock_ends_a_run(folder, tmp_path):
    train(folder, tmp_path / "base", max_steps=None, minutes=0.02)
    assert rows(tmp_path / "base")[-1]["seconds"] < 60


def test_recall_practice_asks_for_what_another_paragraph_says():
    paragraphs = [
        "The lighthouse was built by Maria Jansen. " + "Visitors climb its stairs. " * 6 + "End.",
        "Nothing recurs here. " * 20 + "End.",
        "Later the old lighthouse was sold, and Maria Jansen built another one near the harbour "
        "in Delft. " + "The harbour was full of herring boats in those days. " * 4 + "End.",
    ]
    document = Document("Lights", "= Lights =\n" + "\n".join(paragraphs) + "\n")
    rows = practice(document)
    asked = {row["context"]: row for row in rows}
    assert set(asked) == {paragraphs[0], paragraphs[2]}
    for row in rows:
        assert row["answers"] == ["Maria Jansen"] and row["answers"][0] in row["context"]
        assert "Maria" not in row["question"] and row["question"].endswith("?")
        assert row["question"].rstrip("?") not in row["context"]
    assert asked[paragraphs[2]]["question"] == "The lighthouse was built by what?"
    assert practice(document) == rows and practice(document, of_paragraph=3) == rows
    # Without a word in common but the span there is no question.
    paragraphs[0] = "Nobody knew Maria Jansen as a writer of verse. " + "She kept silent then. " * 9
    assert not practice(Document("Lights", "= Lights =\n" + "\n".join(paragraphs)))


def test_reader_data_are_mixed_and_named(folder, tmp_path):
    rows = [
        {"context": "Ada met Bo.", "question": "Who met Bo?", "answers": ["Ada", "Bo"], "id": "1"},
        {"context": "Ada met Bo.", "question": "Who?", "answers": ["Cy"], "id": "2"},
        {"context": "Ada met Bo.", "question": "Who is Cy?", "answers": [], "id": "3"},
        {"context": "x " * 2000, "question": "What?", "answers": ["x"], "id": "4"},
    ]
    for name, opened in (("one.jsonl", open), ("two.jsonl.xz", lzma.open)):
        with opened(tmp_path / name, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    run("mix_reader_data", tmp_path / "one.jsonl", tmp_path / "two.jsonl.xz",
        "--output", tmp_path / "mix.jsonl")  # fmt: skip
    examples = read_examples(str(tmp_path / "mix.jsonl"))
    assert [example.id for example in examples] == ["one/1", "two/1"]
    assert examples[0].answers == ("Ada",)


@pytest.mark.slow
def test_the_base_model_becomes_a_reader(folder, tmp_path):
    """Through every script, as the README has them; the reader is written in bfloat16 too."""
    recall = tmp_path / "recall.jsonl"
    run("make_recall_practice", folder / "tokens", "--tokenizer", folder / "tokenizer",
        "--output", recall, "--processes", 1)  # fmt: skip
    row = {"context": "Ada met Bo in 1911.", "question": "Who met Bo?", "answers": ["Ada"]}
    with open(recall, "a") as file:
        file.write(json.dumps(row) + "\n")
    train(folder, tmp_path / "base", max_steps=3)
    command = [sys.executable, "train_mamba_with_context.py", "--model", tmp_path / "base"]
    command += ["--data_path", recall, "--output", tmp_path / "reader", "--max_steps", "2"]
    command += ["--negatives", "none", "--trainer", "use_cpu=true"]
    subprocess.run(command, cwd=ROOT, check=True)
    run("export_bfloat16", tmp_path / "reader", tmp_path / "small")
    model, _ = load_model_and_tokenizer(str(tmp_path / "small"), dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("reader", "small")]
    assert sizes[1] < 0.6 * sizes[0]


def test_no_script_needs_what_a_lent_machine_lacks():
    """The optional packages are imported where they are used."""
    missing = ("datasets", "duckdb", "bm25s", "rich", "prompt_toolkit")
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
    modules = "train_mamba_with_context, eval_mamba_with_context"
    studies = ", ".join(
        f"studies.base_model.{path.stem}" for path in (ROOT / "studies/base_model").glob("*.py")
    )
    code = f"import sys; {blocked}import {modules}, {studies}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
