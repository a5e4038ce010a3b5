"""Untrusted files, damaged in many ways: each is read, or refused in one line. No other error, no
crash, no hang, no memory far beyond the file's size.

Each case runs in its own process. The number after a target's name is the seed of a failed case.
"""

import faulthandler
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import duckdb
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import query_results
from common.errors import UserError, printable
from context_qa.arguments import trained_prompt_order
from context_qa.console.terminal import read_context
from context_qa.results.comparison import compare
from context_qa.results.reading import read_objects, results_rows
from context_qa.results.report import report_page
from context_qa.results.summary import read_summary
from context_qa.shots import n_shot_prompt, read_shots
from mamba_lm import checkpoint
from mamba_lm.checkpoint import files_read, load_model, load_model_and_tokenizer, save_model
from mamba_lm.delta import delta_layers
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.tokenizer import encode, encode_with_offsets, load_tokenizer_at
from mamba_lm.training.checkpoints import find_damage, publish_checkpoint
from squad_utils import prompt_parts, read_examples
from tests.test_report_results import ROWS, SUMMARY, write

CASES = 10  # for each target; `make test-slow` runs 100 times as many more
MEMORY = 2**30  # bytes, besides what is in use and twice the file
SECONDS = 20  # of processor time
TEXT = "In 1998 Zoé paid $45 for <|endoftext|>\ntickets."


# The code that reads each file


def load(folder: Path) -> None:
    _, tokenizer = load_model_and_tokenizer(str(folder))
    write_text(tokenizer)
    files_read(str(folder))


def write_text(tokenizer) -> None:
    [ids] = encode(tokenizer, [TEXT])
    tokenizer.decode(ids)
    if tokenizer.is_fast:
        encode_with_offsets(tokenizer, [TEXT])


def load_random(folder: Path) -> None:
    checkpoint.memory_bytes = lambda: MEMORY // 8
    load_model(str(folder / "config.json"))


def read_data(path: Path) -> None:
    for example in read_examples(str(path)):
        prompt_parts(example.context, example.question)


def use_results(folder: Path) -> None:
    path = folder / "results.jsonl"
    objects, is_torn = read_objects(str(path))
    rows = results_rows(objects, str(path))
    report_page(rows, read_summary(path), path.name, is_torn)
    compare(str(path), str(path))


def query(folder: Path) -> None:
    query_results.load_results(duckdb.connect(), str(folder / "any.jsonl"), "df")


TARGETS: dict[str, Callable[[Path], object]] = {  # the damaged file, and what reads its folder
    "transformers/config.json": load,
    "transformers/generation_config.json": load,
    "transformers/model.safetensors": load,
    "transformers/tokenizer.json": load,
    "transformers/tokenizer_config.json": load,
    "transformers/special_tokens_map.json": load,
    "transformers/added_tokens.json": load,
    "transformers/delta_layers.json": lambda folder: delta_layers(str(folder), 2),
    "transformers/training_args.json": lambda folder: trained_prompt_order(str(folder)),
    "state_spaces/config.json": lambda folder: load_model(str(folder)),
    "state_spaces/pytorch_model.bin": lambda folder: load_model(str(folder)),
    "shards/model.safetensors.index.json": lambda folder: load_model(str(folder)),
    "random/config.json": load_random,
    "gpt2/vocab.json": lambda folder: write_text(load_tokenizer_at(folder)),
    "gpt2/merges.txt": lambda folder: write_text(load_tokenizer_at(folder)),
    "gpt2/tokenizer_config.json": lambda folder: write_text(load_tokenizer_at(folder)),
    "checkpoint-7/manifest.json": find_damage,
    "data/data.jsonl": lambda folder: read_data(folder / "data.jsonl"),
    "data/squad.json": lambda folder: read_data(folder / "squad.json"),
    "data/shots.jsonl": lambda folder: n_shot_prompt(read_shots(str(folder / "shots.jsonl"))),
    "data/context.txt": lambda folder: read_context(str(folder / "context.txt")),
    "results/results.jsonl": use_results,
    "results/results.jsonl.summary.json": use_results,
    "query/any.jsonl": query,
}


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Path:
    """A folder with all files, undamaged."""
    root = tmp_path_factory.mktemp("undamaged")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=320, d_model=8, n_layer=2, d_state=3))
    model.generation = {"eos_token_id": 0, "temperature": 0.5}
    for format in ("transformers", "state_spaces"):
        save_model(model, root / format, format=format)
    for path in ("random/config.json", "shards/config.json"):
        put(root / path, json.loads((root / "transformers/config.json").read_text()))
    split(load_file(root / "transformers/model.safetensors"), root / "shards")
    folder = root / "transformers"
    tokenizer.save(str(folder / "tokenizer.json"))
    put(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "model_max_length": 1000})
    put(folder / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}})
    put(folder / "added_tokens.json", {"<|endoftext|>": 0})
    put(folder / "delta_layers.json", [0, 1])
    put(folder / "training_args.json", {"arguments": {"prompt_order": "context_first"}})
    written = json.loads((folder / "tokenizer.json").read_text())["model"]
    put(root / "gpt2/vocab.json", written["vocab"])
    merges = [" ".join(merge) for merge in written["merges"]]
    (root / "gpt2/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    put(root / "gpt2/tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    state = root / "state"
    state.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (state / name).write_text(name)
    publish_checkpoint(state, root / "checkpoint-7")
    for name in ("results", "data", "query"):
        (root / name).mkdir()
    write(root / "results/results.jsonl", ROWS, SUMMARY)
    write(root / "query/any.jsonl", [{"a": 1, "b": [1.5], "c": {"d": "x"}}, {"a": None}])
    row = {"context": "Ann lives in Oslo.", "question": "Where?", "answers": {"text": ["Oslo"]}}
    write(root / "data/data.jsonl", [row | {"id": "a", "title": "T"}, row | {"answers": ["Oslo"]}])
    write(root / "data/shots.jsonl", [{"question": "Where?", "answer": "Oslo"}] * 2)
    (root / "data/context.txt").write_text(TEXT)
    qas = [{"id": "a", "question": "Where?", "answers": [{"text": "Oslo", "answer_start": 13}]}]
    paragraph = {"context": "Ann lives in Oslo.", "qas": qas}
    put(root / "data/squad.json", {"data": [{"title": "T", "paragraphs": [paragraph]}]})
    for name, use in TARGETS.items():
        if use is not query:  # a forked process would not have its threads
            use((root / name).parent)  # is read; and modules are imported before the processes fork
    return root


def put(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"special_tokens": ["<|endoftext|>"], "show_progress": False}
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=300, **settings)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def split(weights: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    weight_map = {}
    for n, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        shard = f"model-0000{n}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    put(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


# Damage


DEEP = "[" * 100_000 + "]" * 100_000
NASTY = [  # replacements of a JSON value, not all of them valid
    *("null", "true", "false", "0", "-1", "1", "3", "-0.0", "0.5", "1e308", "1e999", "NaN"),
    *("-Infinity", "2147483648", "9223372036854775808", "18446744073709551616", "9" * 5000),
    *('""', '"x"', '"\\ud800"', '"\\u0000"', '"../x"', '"/dev/zero"', '"\\u001b[2J\\n"'),
    *("[]", "{}", "[[]]", '{"a": null}', "[1, 1]", '["x", 3]', DEEP, '{"":' * 9999, "", "[,]"),
    json.dumps("a" * 100_000),
]


def damage(data: bytes, name: str, rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        inner, rewrap = unwrap(data, name)
        return rewrap(damage_json(inner, name, rng) or damage_bytes(inner, rng))
    return damage_bytes(data, rng)


def unwrap(data: bytes, name: str) -> tuple[bytes, Callable[[bytes], bytes]]:
    """The part of a container that describes its content, and a function that puts it back."""
    if name.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
        return data[8:end], lambda new: len(new).to_bytes(8, "little") + new + data[end:]
    if name.endswith(".bin"):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        pickled = next(entry for entry in entries if entry.endswith("data.pkl"))
        return entries[pickled], lambda new: zip_entries(entries | {pickled: new})
    return data, lambda new: new


def zip_entries(entries: dict[str, bytes]) -> bytes:
    output = BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return output.getvalue()


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(start + rng.choice((1, 2, 8, 100)), len(data))
    some = rng.choice((rng.randbytes(end - start), b"\xff" * 8, b"\0" * 8, b"\n", b'"', b"9" * 9))
    return rng.choice(
        (
            data[:start] + some + data[end:],
            data[:start] + some + data[start:],
            data[:start] + data[end:],
            data[:start],
            data[:end] + data[start:],
            b"",
            b"\xef\xbb\xbf" + data,
            data.decode("latin-1").encode("utf-16"),
        )
    )


def damage_json(data: bytes, name: str, rng: random.Random) -> bytes | None:
    """Change a value, a key or a name somewhere; None if the data is not JSON."""
    lines = data.split(b"\n") if name.endswith(".jsonl") else [data]
    at = rng.randrange(len([line for line in lines if line.strip()]) or 1)
    try:
        value = json.loads(lines[at])
    except ValueError:
        return None
    parents = [[value]]
    parents += [found for found in containers(value) if found]
    parent = rng.choice(parents)
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    change = rng.choice(("replace", "replace", "replace", "delete", "repeat", "rename"))
    if change == "replace":
        parent[key] = "@@"
    elif change == "delete":
        del parent[key]
    elif isinstance(parent, list):
        parent[key] = [parent[key]] * 2
    else:
        parent["@@" if change == "repeat" else rng.choice(("", "x", "\n", "-1"))] = parent.pop(key)
    text = json.dumps(parents[0][0] if parents[0] else "@@")
    nasty = f"{json.dumps(key)}: 1, {json.dumps(key)}" if change == "repeat" else rng.choice(NASTY)
    lines[at] = text.replace('"@@"', nasty, 1).encode()
    return b"\n".join(lines)


def containers(value: object) -> list:
    if not isinstance(value, (dict, list)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return [value, *(found for one in inner for found in containers(one))]


# One case


def find_failure(use: Callable[[Path], object], folder: Path, size: int) -> str | None:
    """Read a folder in a new process; what goes wrong there, or None."""
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            os._exit(run_child(use, folder, size, output.fileno()))
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        text = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}\n{text}"
    return text or "failed" if code or "panicked" in text else None


def run_child(use: Callable[[Path], object], folder: Path, size: int, output: int) -> int:
    try:
        faulthandler.disable()  # pytest's would write to the terminal
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * size + MEMORY,) * 2)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends a process that computes
        signal.alarm(600)  # ends a process that waits
        use(folder)
    except UserError as error:
        if len(printable(str(error))) > 1000:
            print("an error message of", len(str(error)), "characters", flush=True)
            return 1
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def find_failures(name: str, seeds: range, undamaged: Path, folder: Path) -> list[str]:
    source = undamaged / name
    copy = folder / source.parent.name
    copy.mkdir()
    for path in source.parent.iterdir():
        (copy / path.name).symlink_to(path)
    data, found = source.read_bytes(), []
    for seed in seeds:
        changed = damage(data, name, random.Random(seed)) if seed else data
        (copy / source.name).unlink()
        (copy / source.name).write_bytes(changed)
        failure = find_failure(TARGETS[name], copy, len(changed))
        if failure:
            found.append(f"{name} {seed}: {failure}")
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_read_or_refused(name, undamaged, tmp_path):
    found = find_failures(name, range(CASES), undamaged, tmp_path)
    assert not found, f"{len(found)} of {CASES}\n" + "\n".join(found[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_damaged_files_are_read_or_refused(name, undamaged, tmp_path):
    found = find_failures(name, range(CASES, 101 * CASES), undamaged, tmp_path)
    assert not found, f"{len(found)}\n" + "\n".join(found[:3])


@pytest.mark.parametrize(
    "use, expected",
    [
        (lambda folder: 1 / 0, "ZeroDivisionError"),
        (lambda folder: bytearray(2 * MEMORY), "MemoryError"),
        (lambda folder: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
        (lambda folder: print("thread panicked", file=sys.stderr, flush=True), "panicked"),
    ],
    ids=["error", "memory", "crash", "panic"],
)
def test_failures_are_found(use, expected, tmp_path):
    assert expected in find_failure(use, tmp_path, 0)
