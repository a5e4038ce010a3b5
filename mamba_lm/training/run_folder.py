"""The folder of a training run: its record, which says whether the run is complete, and its files.

A run is what its settings say. The same run, started again, resumes from its newest checkpoint or
is found to be complete; a folder with anything else is refused.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import PartialState

from common.atomic_files import MODEL_FILES, report_write_errors, try_lock, write_atomically
from common.errors import UserError, printable, warn
from common.json_text import json_text, read_json
from common.output_files import Kind, check_inputs_not_overwritten, check_output, require_writable
from common.processes import broadcast, is_true_on_all_ranks
from common.provenance import differences
from mamba_lm.checkpoint import NOTE, files_read, read_config, read_model_weights
from mamba_lm.folders import RECORD
from mamba_lm.tokenizer import SAVED_FILES
from mamba_lm.training.checkpoints import (
    describe_files,
    find_change,
    find_newest_checkpoint,
    list_checkpoints,
)
from mamba_lm.training.progress import LOG, PLOT

CARD = "README.md"
_OURS = (  # the files of a run; the record, by which a folder is known to be a run's, comes last
    *MODEL_FILES,
    *SAVED_FILES,
    *(f"{name}.*.partial" for name in (CARD, LOG, RECORD)),
    *(f".{PLOT}.partial", ".checkpoint.partial", NOTE, CARD, LOG, PLOT, RECORD),
)


class RunFolder:
    """The folder of one run, locked while the `with` block runs.

    Entering it finds out whether the run is complete (`is_complete`) or from which checkpoint it
    resumes (`checkpoint`, None: from the start). UserError where the folder is of another run, with
    what differs; where it contains other things, cannot be written, is not shared by all processes,
    or another run is writing it.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, object],
        description: Mapping[str, object],
        inputs: Iterable[str | None],
        card: Kind,
        overwrite: bool = False,
    ):
        """In every process of the run; only the first one reads and writes.

        settings: what decides the weights; two runs with equal ones are the same run.
        description: more for the record: arguments, git commit, versions, hashes
        (`describe_run`, `model_hashes`).
        inputs: files and folders that the run reads, which must not be in a new run's folder.
        card: the kind of README.md that is written; one of another kind is never replaced.
        overwrite: restart the run, removing what it, or another one, has left in the folder.
        """
        self.folder, self.card, self.inputs = Path(folder), card, list(inputs)
        self.overwrite = overwrite
        self.processes = PartialState()
        self.record = {"settings": dict(settings), **description}
        self.warnings: list[str] = []  # on the data
        self.is_complete = False
        self.checkpoint: Path | None = None
        self._lock: int | None = None

    def __enter__(self) -> "RunFolder":
        try:
            found = self._open() if self.processes.is_main_process else None
            self.is_complete, self.checkpoint = broadcast(found)
            self._require_shared_folder()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if self._lock is not None:
            os.close(self._lock)
            if self._is_new and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _open(self) -> tuple[bool, Path | None]:
        with report_write_errors(self.folder):
            self._is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            require_writable(self.folder)  # rather than fail later
            self._lock = os.open(self.folder, os.O_RDONLY)
            if not try_lock(self._lock):
                raise UserError(f"{self.folder}: another run is writing it; give another folder")
            before = self._read_record()
            self._check_card()
        if self.overwrite or not before:
            check_inputs_not_overwritten([self.folder], self.inputs, are_folders=True)
            return False, None
        self._require_same_settings(before)
        is_complete = before.get("complete") is True
        change = self._find_change(before) if is_complete else None
        missing = [name for name in (LOG, PLOT, CARD) if not (self.folder / name).exists()]
        if is_complete and change is None and not missing:
            return True, None
        checkpoint = find_newest_checkpoint(self.folder)
        if is_complete and change is None:
            change = f"{missing[0]} is missing"
            if checkpoint is None:
                warn(f"{self.folder}: {change}, and no checkpoint is left to write it from")
                return True, None
        self._note_other_code(before)
        if change is not None and checkpoint is None:
            raise UserError(
                f"{self.folder}: {change}, and no checkpoint is left to write the model from; "
                "set overwrite to train it again from the start"
            )
        if change is not None:
            action = f"{change}; the model is written again from {checkpoint.name}"
            warn(f"{self.folder}: {action}")
        return False, checkpoint

    def _check_card(self) -> None:
        """UserError where the card would replace a text of the user's own."""
        check_output(self.folder / CARD, self.card, overwrite=True)

    def _require_shared_folder(self) -> None:
        """UserError where a process, on another machine, does not see what the first one writes."""
        with contextlib.ExitStack() as stack:
            name = None
            if self.processes.is_main_process:
                probe = stack.enter_context(
                    tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", suffix=".partial")
                )
                name = Path(probe.name).name
            is_seen = is_true_on_all_ranks((self.folder / broadcast(name)).exists())
        if not is_seen:
            raise UserError(f"{self.folder}: not all processes see it; give a folder they share")

    def warn(self, warnings: Iterable[str]) -> None:
        """Print warnings on the data, and keep them for the record."""
        new = list(warnings)
        self.warnings += new
        for warning in new:
            self.processes.print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)

    def begin(self) -> None:
        """Write the record of a run that is not complete; with `overwrite`, first remove the files
        that a run has left. To be called when nothing more can be wrong with the settings."""
        if self.processes.is_main_process:
            with report_write_errors(self.folder):
                if self.overwrite:
                    self._remove_files()
                self._write_record(complete=False)

    def finish(self, card: str, **figures: object) -> None:
        """Write the card, and the record of a complete run with these figures of it."""
        if not self.processes.is_main_process:
            return
        write_atomically(self.folder / CARD, card, self._check_card)
        self._write_record(complete=True, **figures, files=describe_files(self._model_files()))

    def _model_files(self) -> list[Path]:
        """The files of the finished model, and of its tokenizer."""
        return files_read(str(self.folder))[0]

    def _find_change(self, before: Mapping) -> str | None:
        """What has changed in the finished run's model, in words; None if nothing has."""
        files = before.get("files")
        try:
            if not files:  # of earlier versions
                self._model_files()
                read_model_weights(self.folder, read_config(self.folder / "config.json"))
                return None
            change = find_change(self.folder, files)
            if change is not None:
                return change
            others = {path.name for path in self._model_files()} - files.keys()
        except (UserError, OSError) as error:
            return f"its model is damaged ({error})"
        return f"{min(others)} is not of the run, but loading reads it" if others else None

    def _write_record(self, **more: object) -> None:
        record = self.record | {"warnings": self.warnings} | more
        write_atomically(self.folder / RECORD, json_text(record, indent=2) + "\n")

    def _read_record(self) -> dict:
        """The record of the run in the folder, without settings if it cannot be read; empty for an
        empty folder. UserError where the folder contains what no run has written."""
        names = {path.name for path in self.folder.iterdir()}
        names = {n for n in names if not n.startswith(".") and not n.endswith(".partial")}
        if not names:
            return {}
        try:
            record = read_json(self.folder / RECORD)
        except UserError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("arguments"), dict):
            return record
        if RECORD in names and self._has_our_card():
            return {"settings": None}
        raise UserError(f"{self.folder}: contains other things ({min(names)}); give another folder")

    def _has_our_card(self) -> bool:
        try:
            with open(self.folder / CARD, "rb") as stream:
                return self.card.is_ours(stream)
        except OSError:
            return False

    def _require_same_settings(self, before: Mapping) -> None:
        if not isinstance(before.get("settings"), dict):
            what = "a model whose settings are not known"
        elif different := differences(before["settings"], self.record["settings"]):
            what = f"another run ({'; '.join(different)})"
        else:
            return
        raise UserError(f"{self.folder}: contains {what}; give another folder or set overwrite")

    def _note_other_code(self, before: Mapping) -> None:
        """Warn, and add to the record, if other code started the run: its bits may differ."""
        begun_with = before.get("begun_with")
        begun_with = begun_with if isinstance(begun_with, dict) else _describe_code(before)
        if different := differences(begun_with, _describe_code(self.record)):
            warn(f"{self.folder}: was started with other code ({'; '.join(different)})")
            self.record["begun_with"] = begun_with

    def _remove_files(self) -> None:
        ours = [path for pattern in _OURS for path in self.folder.glob(pattern)]
        for path in [*list_checkpoints(self.folder), *ours]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _describe_code(record: Mapping) -> dict:
    """The code that ran, in a record: commit and versions."""
    versions = record.get("packages")
    versions = versions if isinstance(versions, dict) else {}
    return {name: record.get(name) for name in ("git_commit", "python")} | versions
