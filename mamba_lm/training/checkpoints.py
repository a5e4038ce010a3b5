"""Checkpoints of a training run: a run is resumed only from one that is known to be intact.

A checkpoint is written under another name and renamed when all of it is on the disk, with a
manifest of its files' sizes and hashes. What a crash, a full disk or an interrupted copy has left
is thus never taken for a checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from common.atomic_files import report_write_errors
from common.errors import UserError, warn
from common.json_text import read_json
from mamba_lm.training.trainer_state import STATE, read_state

MANIFEST = "manifest.json"
_NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", STATE)


def partial_folder(output: str | Path) -> Path:
    """Where a checkpoint is written before it is one."""
    return Path(output) / ".checkpoint.partial"


def publish_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Add a manifest to the files in a folder and rename it to this checkpoint, in one step.
    UserError where that cannot be written."""
    with report_write_errors(checkpoint):
        files = describe_files(sorted(folder.iterdir()))
        for name in files:
            _flush_to_disk(folder / name)
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
        _flush_to_disk(manifest)
        old = folder.with_name("old")  # of the same step, should there be one
        if checkpoint.exists():
            checkpoint.rename(old)
        folder.rename(checkpoint)
        _flush_to_disk(checkpoint.parent)
        shutil.rmtree(old, ignore_errors=True)


def describe_files(paths: Iterable[Path]) -> dict[str, dict]:
    """Size and hash of each file, by its name, for `find_change`."""
    return {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}


def find_change(folder: Path, files: object) -> str | None:
    """In words, the first of these files that is missing or has changed since `describe_files`
    described it, or that the description is malformed; None if nothing has changed."""
    if not isinstance(files, dict) or not all(map(_is_description, files.items())):
        return "the record of its files cannot be read"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if _sha256(folder / name) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def _is_description(item: tuple[str, object]) -> bool:
    name, expected = item
    is_in_folder = name not in ("", "..") and Path(name).name == name and "\0" not in name
    if not is_in_folder or not isinstance(expected, dict):
        return False
    return type(expected.get("bytes")) is int and type(expected.get("sha256")) is str


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if a run can resume from it."""
    if not (checkpoint / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(checkpoint / MANIFEST)
        files = manifest.get("files") if isinstance(manifest, dict) else None
        change = find_change(checkpoint, files)
        if change is not None:
            return change
        missing = [name for name in _NEEDED if name not in files]
        if missing:
            return f"{missing[0]} is missing in {MANIFEST}"
        read_state(checkpoint)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def list_checkpoints(output: str | Path) -> list[Path]:
    """The checkpoints in an output folder, intact or not, the newest first."""
    found = {}
    for path in Path(output).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    return [path for _, path in sorted(found.items(), reverse=True)]


def remove_old_checkpoints(written: Path, limit: int | None, best: Path | None) -> None:
    """Remove checkpoints until `limit` are left (None: no limit): first those of later steps than
    the one just written, from which the run was not resumed, then the oldest; never that one or the
    best."""
    found = list_checkpoints(written.parent)
    step = found.index(written)
    candidates = [path for path in found[:step] + found[:step:-1] if path != best]
    for path in candidates[: max(len(found) - limit, 0) if limit else 0]:
        shutil.rmtree(path, ignore_errors=True)


def find_newest_checkpoint(output: str | Path) -> Path | None:
    """The newest intact checkpoint; warns of each damaged one that is skipped."""
    for checkpoint in list_checkpoints(output):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        warn(f"{checkpoint} is skipped: {damage}")
    return None


def require_intact(checkpoint: str | Path) -> None:
    """UserError unless a run can resume from it."""
    damage = find_damage(Path(checkpoint))
    if damage is not None:
        raise UserError(f"{checkpoint}: a run cannot resume from it: {damage}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
