"""A run resumes only from an intact checkpoint; damage is reported in words."""

import json

import pytest

from common.errors import UserError
from mamba_lm.training.checkpoints import (
    MANIFEST,
    find_damage,
    find_newest_checkpoint,
    list_checkpoints,
    partial_folder,
    publish_checkpoint,
    require_intact,
)

STATE = json.dumps(
    {
        "global_step": 7,
        "max_steps": 9,
        "num_train_epochs": 1,
        "train_batch_size": 4,
        "num_input_tokens_seen": 0,
        "logging_steps": 1,
        "eval_steps": 1,
        "save_steps": 1,
        "epoch": 0.5,
        "total_flos": 0,
        "log_history": [{"step": 7, "loss": 2.5}],
        "stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": False}}},
    }
).encode()
FILES = {"model.safetensors": b"weights", "optimizer.pt": b"moments", "scheduler.pt": b"rate",
         "trainer_state.json": STATE, "rng_state.pth": b"random"}  # fmt: skip


def write(output, step, files=FILES):
    written = partial_folder(output) / f"checkpoint-{step}"
    written.mkdir(parents=True)
    for name, data in files.items():
        (written / name).write_bytes(data)
    publish_checkpoint(written, output / written.name)
    return output / written.name


def test_a_published_checkpoint_is_intact(tmp_path):
    checkpoint = write(tmp_path, 7)
    assert find_damage(checkpoint) is None
    require_intact(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {*FILES, MANIFEST}
    assert list(partial_folder(tmp_path).iterdir()) == []


def test_a_checkpoint_takes_the_place_of_one_of_its_step(tmp_path):
    write(tmp_path, 7)
    again = write(tmp_path, 7, FILES | {"optimizer.pt": b"other"})
    assert find_damage(again) is None and (again / "optimizer.pt").read_bytes() == b"other"
    assert list(partial_folder(tmp_path).iterdir()) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def change(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage, said",
    [
        (truncate, r"{} has \d+ bytes instead of \d+"),
        (change, "{} is not what was written"),
        (lambda path: path.unlink(), "{} is missing"),
    ],
    ids=["truncated", "changed", "missing"],
)
def test_any_damage_is_named(name, damage, said, tmp_path):
    checkpoint = write(tmp_path, 7)
    damage(checkpoint / name)
    with pytest.raises(
        UserError, match=f"checkpoint-7: a run cannot resume from it: {said.format(name)}"
    ):
        require_intact(checkpoint)


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_named(manifest, tmp_path):
    checkpoint = write(tmp_path, 7)
    (checkpoint / MANIFEST).write_text(manifest)
    assert find_damage(checkpoint)
    (checkpoint / MANIFEST).unlink()
    assert find_damage(checkpoint) == f"{MANIFEST} is missing"


@pytest.mark.parametrize("name", ["bytes", "sha256"])
def test_a_manifest_without_sizes_or_hashes_is_named(name, tmp_path):
    checkpoint = write(tmp_path, 7)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for description in manifest["files"].values():
        del description[name]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert "cannot be read" in find_damage(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_weights_alone_are_not_resumed_from(name, tmp_path):
    """As save_only_model leaves them: the Trainer would silently resume with a new optimizer."""
    checkpoint = write(tmp_path, 7, {n: data for n, data in FILES.items() if n != name})
    assert find_damage(checkpoint) == f"{name} is missing in {MANIFEST}"


def test_the_newest_intact_one_is_found_and_others_are_reported(tmp_path, capsys):
    assert find_newest_checkpoint(tmp_path) is None
    for step in (9, 10, 100):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-100", "checkpoint-10", "checkpoint-9"
    ]  # fmt: skip
    assert find_newest_checkpoint(tmp_path).name == "checkpoint-100"
    assert capsys.readouterr().err == ""
    truncate(tmp_path / "checkpoint-100/optimizer.pt")
    (tmp_path / "checkpoint-10" / MANIFEST).unlink()
    assert find_newest_checkpoint(tmp_path).name == "checkpoint-9"
    first, second = capsys.readouterr().err.splitlines()
    assert "checkpoint-100 is skipped: optimizer.pt has 6 bytes instead of 7" in first
    assert f"checkpoint-10 is skipped: {MANIFEST} is missing" in second


def test_an_error_at_the_end_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    before = write(tmp_path, 7)
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, 8)
    assert list_checkpoints(tmp_path) == [before] and find_damage(before) is None
