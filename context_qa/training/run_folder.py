"""The folder of a training run: what it was asked to do, whether it has, and what goes with it."""

import argparse
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerState

from common.atomic_files import MODEL_FILES, report_write_errors, try_lock, write_atomically
from common.errors import UserError, printable, warn
from common.json_text import json_text, read_json
from common.output_files import check_inputs_not_overwritten, check_output, require_writable
from common.processes import broadcast, is_true_on_all_ranks
from common.provenance import describe_run, differences, hash_or_name, sha256
from context_qa.training.data_report import DataReport
from context_qa.training.model_card import MODEL_CARD, model_card
from context_qa.training.scores import SCORES
from mamba_lm.checkpoint import NOTE, files_read, model_hashes, read_config, read_model_weights
from mamba_lm.folders import RECORD
from mamba_lm.tokenizer import SAVED_FILES
from mamba_lm.training.checkpoints import (
    checkpoints,
    describe_files,
    find_change,
    newest_checkpoint,
)
from mamba_lm.training.progress import LOG, PLOT

CARD = "README.md"
NAMED = ("model", "tokenizer", "data_path", "eval_data")  # arguments that name what is read
_WITHOUT_EFFECT = (  # on the weights: fields of --trainer that may change when a run goes on
    *("save_steps", "save_total_limit", "disable_tqdm", "ddp_timeout"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("report_to", "run_name", "project", "log_level"),
)
_OURS = (  # what a run leaves; what tells that it is a run's comes last
    *MODEL_FILES,
    *SAVED_FILES,
    *(f"{name}.*.partial" for name in (CARD, LOG, RECORD)),
    *(f".{PLOT}.partial", ".checkpoint.partial", NOTE, CARD, LOG, PLOT, RECORD),
)


class TrainingRun:
    """A run at an output folder, which goes on where it was cut off.

    args: those of the training script. The folder of a run with others is refused by a UserError
    that says what differs, as are a folder of other things, one that cannot be written and one that
    another run is writing.
    """

    def __init__(self, args: argparse.Namespace):
        """In every process of the run; the first one alone reads and writes."""
        self.args, self.folder = args, Path(args.output)
        self.processes = PartialState()
        self._lock: int | None = None
        self.is_complete = False
        self.checkpoint: Path | None = None  # what it goes on from
        self.warnings: list[str] = []  # on its data

    def __enter__(self) -> "TrainingRun":
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
        args = self.args
        record = describe_run(vars(args)) | model_hashes(args.model, args.tokenizer)
        record |= {"data_sha256": sha256(args.data_path)}
        self.record = {"settings": settings(self.args, record, self.processes.num_processes)}
        self.record |= record
        with report_write_errors(self.folder):
            self._is_new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            require_writable(self.folder)  # or the run would fail by that later
            self._lock = os.open(self.folder, os.O_RDONLY)
            if not try_lock(self._lock):
                raise UserError(f"{self.folder}: another run is writing it; give another folder")
            before = self._before()
            self._check_card()
        if self.args.overwrite or not before:
            self._keep_inputs()
            return False, None
        self._compare(before)
        is_complete = before.get("complete") is True
        change = self._change(before) if is_complete else None
        missing = [name for name in (LOG, PLOT, CARD) if not (self.folder / name).exists()]
        if is_complete and change is None and not missing:
            return True, None
        checkpoint = newest_checkpoint(self.folder)
        if is_complete and change is None:
            change = f"{missing[0]} is missing"
            if checkpoint is None:
                warn(f"{self.folder}: {change}, and no checkpoint is left to write it from")
                return True, None
        self._compare_code(before)
        if change is not None and checkpoint is None:
            raise UserError(
                f"{self.folder}: {change}, and no checkpoint is left to write the model from; "
                "--overwrite trains it again from the start"
            )
        if change is not None:
            said = f"{change}; the model is written again from {checkpoint.name}"
            warn(f"{self.folder}: {said}")
        return False, checkpoint

    def _check_card(self) -> None:
        """UserError where a text of the user's own is what the card would replace."""
        check_output(self.folder / CARD, MODEL_CARD, overwrite=True)

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

    def _keep_inputs(self) -> None:
        """UserError where something that is read stands in the folder that is written anew."""
        given = [override.partition("resume_from_checkpoint=")[2] for override in self.args.trainer]
        read = (getattr(self.args, name) for name in NAMED)
        check_inputs_not_overwritten([self.folder], [*read, *given], are_folders=True)

    def warn(self, warnings: Iterable[str]) -> None:
        """Print lines on the data, and keep them for the record."""
        new = list(warnings)
        self.warnings += new
        for warning in new:
            self.processes.print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)

    def begin(self) -> None:
        """Write down what is to be done, now that nothing more can be wrong with it. With
        args.overwrite, what a run or a model has left there goes now."""
        if self.processes.is_main_process:
            with report_write_errors(self.folder):
                if self.args.overwrite:
                    self._remove()
                self._write(complete=False)

    def finish(self, report: DataReport, state: TrainerState, step: int) -> None:
        """Write what goes with the model, that of this step: the card, and the record with what was
        found."""
        if not self.processes.is_main_process:
            return
        steps = {"steps": state.global_step, "epochs": state.epoch, "step_of_model": step}
        scores = scores_at(state, step)
        card = model_card(self.args, report, steps, scores)
        write_atomically(self.folder / CARD, card, self._check_card)
        found = {"data": dataclasses.asdict(report), "scores": scores}
        files = describe_files(self._model_files())
        self._write(complete=True, **steps, **found, files=files)

    def _model_files(self) -> list[Path]:
        """The files of the finished model, and of its tokenizer."""
        return files_read(str(self.folder))[0]

    def _change(self, before: Mapping) -> str | None:
        """What is no longer as the finished run left it, in words; None if all of its model is."""
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
            return f"its model is not whole ({error})"
        return f"{min(others)} is not of the run, but loading reads it" if others else None

    def _write(self, **more: object) -> None:
        record = self.record | {"warnings": self.warnings} | more
        write_atomically(self.folder / RECORD, json_text(record, indent=2) + "\n")

    def _before(self) -> dict:
        """The record of the run that is there, without settings if it cannot be read; empty in an
        empty folder. UserError where there is what no run has left."""
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
        if RECORD in names and _holds_card(self.folder):
            return {"settings": None}
        raise UserError(f"{self.folder}: holds other things ({min(names)}); give another folder")

    def _compare(self, before: Mapping) -> None:
        if not isinstance(before.get("settings"), dict):
            what = "a model already, of which it is not known how it was made"
        elif different := differences(before["settings"], self.record["settings"]):
            what = f"another run ({'; '.join(different)})"
        else:
            return
        raise UserError(f"{self.folder}: holds {what}; give another folder or --overwrite")

    def _compare_code(self, before: Mapping) -> None:
        """Say, and write down, if other code began the run: its bits may be others."""
        begun_with = before.get("begun_with")
        begun_with = begun_with if isinstance(begun_with, dict) else _code(before)
        if different := differences(begun_with, _code(self.record)):
            said = f"was begun with other code ({'; '.join(different)})"
            warn(f"{self.folder}: {said}")
            self.record["begun_with"] = begun_with

    def _remove(self) -> None:
        ours = [path for pattern in _OURS for path in self.folder.glob(pattern)]
        for path in [*checkpoints(self.folder), *ours]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _code(record: Mapping) -> dict:
    """What ran, of a record: commit and versions."""
    versions = record.get("packages")
    versions = versions if isinstance(versions, dict) else {}
    return {name: record.get(name) for name in ("git_commit", "python")} | versions


def _holds_card(folder: Path) -> bool:
    try:
        with open(folder / CARD, "rb") as stream:
            return MODEL_CARD.is_ours(stream)
    except OSError:
        return False


def settings(args: argparse.Namespace, record: Mapping, num_processes: int) -> dict:
    """What decides the weights, in words: the arguments, files by their hashes; record has those of
    the model and the data."""
    others = {n: v for n, v in vars(args).items() if n not in (*NAMED, "output", "overwrite")}
    hashes = {
        "model": record["model_sha256"] or args.model,
        "tokenizer": record["tokenizer_sha256"],
        "data_path": record["data_sha256"] or args.data_path,
        "eval_data": hash_or_name(args.eval_data),
    }
    overrides = dict(override.split("=", 1) for override in args.trainer)
    effective = {k: v for k, v in overrides.items() if k not in _WITHOUT_EFFECT}
    return hashes | others | {"trainer": effective, "processes": num_processes}


def scores_at(state: TrainerState, step: int) -> dict[str, float]:
    """The scores of the model as it was after a step; empty if it was not scored then."""
    at_step: dict[str, float] = {}
    for row in state.log_history:
        if row["step"] == step:
            at_step |= row
    return {name: at_step[f"eval_{name}"] for name in SCORES if f"eval_{name}" in at_step}
