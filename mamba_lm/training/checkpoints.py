"""Checkpoints of a training run: each is whole, and is known to be, or it is not taken.

A checkpoint is written under another name and renamed when all of it is on the disk, with a
manifest of its files' sizes and hashes. What a crash, a full disk or a copy that broke off has left
is thus never taken for a state to go on from.
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


def seal(folder: Path, checkpoint: Path) -> None:
    """Make the files of a folder the checkpoint of this name, in one step. Raises UserError."""
    with report_write_errors(checkpoint):
        files = describe_files(sorted(folder.iterdir()))
        for name in files:
            _to_disk(folder / name)
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps({"files": files}, indent=2) + "\n")
        _to_disk(manifest)
        old = folder.with_name("old")  # of the same step, should there be one
        if checkpoint.exists():
            checkpoint.rename(old)
        folder.rename(checkpoint)
        _to_disk(checkpoint.parent)
        shutil.rmtree(old, ignore_errors=True)


def describe_files(paths: Iterable[Path]) -> dict[str, dict]:
    """Size and hash of each file, by its name: what `find_change` compares it with later."""
    return {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in paths}


def find_change(folder: Path, files: object) -> str | None:
    """The first of these files that is missing or not what was written, in words; None if each is
    as `describe_files` described it. Also in words what is no such description."""
    if not isinstance(files, dict) or not all(map(_is_description, files.items())):
        return "what is written down of its files cannot be read"
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


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if a run can go on from it."""
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
            return f"it holds no {missing[0]}"
        read_state(checkpoint)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoints of an output folder, whole or not, the newest first."""
    found = {}
    for path in Path(output).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and path.is_dir():
            found[int(step)] = path
    return [path for _, path in sorted(found.items(), reverse=True)]


def rotate(written: Path, limit: int | None, best: Path | None) -> None:
    """Remove checkpoints until `limit` are left: first those after the one just written, which a
    run did not go on from, then the oldest; never that one or the best."""
    found = checkpoints(written.parent)
    step = found.index(written)
    candidates = [path for path in found[:step] + found[:step:-1] if path != best]
    for path in candidates[: max(len(found) - limit, 0) if limit else 0]:
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(output: str | Path) -> Path | None:
    """The newest whole one; a line on stderr tells of each that is not and is skipped."""
    for checkpoint in checkpoints(output):
        complaint = fault(checkpoint)
        if complaint is None:
            return checkpoint
        warn(f"{checkpoint} is skipped: {complaint}")
    return None


def require_whole(checkpoint: str | Path) -> None:
    """UserError unless a run can go on from it."""
    complaint = fault(Path(checkpoint))
    if complaint is not None:
        raise UserError(f"{checkpoint}: cannot be gone on from: {complaint}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
