"""The provenance of a result: arguments, git commit, versions, hashes."""

import hashlib
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

_MOST_CHARACTERS = 200  # of a value in a message
_PACKAGES = ("torch", "transformers", "tokenizers", "numba", "triton", "mamba-ssm", "causal-conv1d")


def describe_run(arguments: Mapping[str, object]) -> dict:
    """All arguments, the git commit and the versions, ready for JSON."""
    return {
        "arguments": dict(arguments),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def hash_or_name(name: str | None) -> str | None:
    """The hash of a local data file; the name of one on the Hub."""
    return name and (sha256(name) or name)


def differences(before: Mapping, now: Mapping) -> list[str]:
    """The settings in which two runs differ, each in words, such as "limit: 5 there, 8 now"."""
    return [
        f"{name.replace('_', ' ')}: {_show(before.get(name))} there, {_show(now.get(name))} now"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    ]


def _show(value: object) -> str:
    """A value for a message; a hash is shortened to its first digits."""
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return f"content {value[:8]}" if is_hash else _shorten(value)


def _shorten(value: object) -> str:
    """A value for a message; records can be edited, so that it can have any length."""
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."


def sha256(name: str) -> str | None:
    """Hash of a local file; None for what is not one."""
    return sha256_of([Path(name)]) if Path(name).is_file() else None


def sha256_of(files: Sequence[Path]) -> str | None:
    """Hash of the contents of files, in their order; None where there are none."""
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _git_commit() -> str | None:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
