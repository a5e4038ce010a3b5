"""The benchmarks run, on shapes that take no time, and say what they measured."""

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from benchmarks import (
    bench_console,
    bench_decode,
    bench_eval,
    bench_growth,
    bench_memory,
    bench_model,
    bench_train,
    gpu,
    gpu_models,
    gpu_parity,
    timing,
    workloads,
)
from common.errors import UserError
from mamba_lm.models import mamba as model
from mamba_lm.models.mamba import MambaConfig, MambaLM
from mamba_lm.selective_scan import reference
from mamba_lm.training import trainer as training
from mamba_lm.training.prefix_suffix import Item
from squad_utils import read_examples
from studies.shared_contexts import learning, same_answers
from tests.contenders import a_contender, fail_when_called, kill_this_process, no_contender

ROOT = Path(__file__).parents[1]
TRAIN, VALIDATION = "data/demo/train.jsonl", "data/demo/validation.jsonl"


def run(module, monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    module.main(module.parse_args())


def rows_of(path: Path) -> dict[str, dict]:
    rows = {row["name"]: row for row in json.loads(path.read_text())}
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in rows.values())
    return rows


@pytest.fixture
def in_process(monkeypatch):
    """Workers without a process of their own, which would import everything again."""

    class Worker:
        def __init__(self, prepare, *args):
            self.contender = prepare(*args)
            self.items, self.tokens = self.contender.items, self.contender.tokens
            self.time = self.contender.time

        def peak_growth(self) -> int:
            return 3_000_000

    for module in (bench_model, bench_train, bench_eval, bench_decode, bench_console):
        monkeypatch.setattr(module, "Worker", Worker)


def test_bench_model(in_process, monkeypatch, tmp_path, capsys):
    path = tmp_path / "new" / "rows.json"
    shape = ("--d_model", 32, "--batch", 1, "--length", 9, "--n_layer", 2, "--rounds", 3)
    run(bench_model, monkeypatch, *shape, "--json", path)
    rows = rows_of(path)
    for name in ("torch's products", "our products", "ours", "transformers"):
        assert {f"{name}, forward", f"{name}, forward + backward"} <= rows.keys()
    assert rows["torch's products, forward"]["ratio"] == 1.0
    assert rows["ours, forward + backward"]["memory_MB"] == 3.0
    assert "ours, forward + backward" in capsys.readouterr().out


def test_bench_train(in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_train, "WIDTH", 16)
    path = tmp_path / "rows.json"
    run(bench_train, monkeypatch, "--n_layer", 1, "--rounds", 1, "--batch_size", 8, "--json", path)
    rows = rows_of(path)
    assert rows["ours, shared"]["ratio"] == 1.0
    assert rows["ours, shared"]["tokens"] < rows["ours, unshared"]["tokens"]


@pytest.mark.slow
def test_gpu_in_a_dry_run(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    path = tmp_path / "gpu.json"
    run(gpu, monkeypatch, "--dry_run", "--json", path)
    found = json.loads(path.read_text())
    assert len(found["errors"]) == 11 and all(row["ok"] for row in found["errors"])
    rows = {row["name"]: row for row in found["speed"]}
    assert {name.split()[0] for name in rows} == {"scan", "prefill", "decode", "train", "answer"}
    assert all(row["seconds"] > 0 and row["items/s"] > 0 for row in rows.values())
    assert rows["decode tiny, 2 rows: transformers"]["ratio"] == 1.0
    assert "skipped: the cuda selective scan is not installed" in capsys.readouterr().err


@pytest.fixture
def dry_gpu():
    return gpu.GPU(dry_run=True, rounds=1, minutes=1.0)


def test_a_contender_that_fails_is_a_row_with_the_reason(dry_gpu):
    def fails() -> timing.Contender:
        raise RuntimeError("no memory\nand so on")

    works = timing.Contender(lambda: None, items=3)
    first, second = dry_gpu.rows("x", {"a": fails, "b": lambda: works})
    assert first["name"] == "x: a (RuntimeError: no memory)" and first["seconds"] is None
    assert second["name"] == "x: b" and second["ratio"] == 1.0
    dry_gpu.deadline = 0.0
    (late,) = dry_gpu.rows("x", {"b": lambda: works})
    assert late["name"] == "x: b (TimeoutError: no time left)"


def test_the_share_of_the_limit(dry_gpu, monkeypatch):
    monkeypatch.setattr(dry_gpu, "flop_rate", 100.0)
    monkeypatch.setattr(dry_gpu, "byte_rate", 10.0)
    monkeypatch.setattr(dry_gpu, "measure", lambda contender: (4.0, 2_000_000_000))
    (row,) = dry_gpu.rows(
        "x", {"a": lambda: timing.Contender(lambda: None, 8, flop=100.0, num_bytes=10.0)}
    )
    assert row | {"name": ""} == {
        "name": "", "seconds": 4.0, "ratio": 1.0, "items/s": 2.0, "of_limit": 0.5, "peak_GB": 2.0,
    }  # fmt: skip


def test_gpu_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here; --dry_run needs none"):
        run(gpu, monkeypatch)


@pytest.mark.parametrize("wrong, right", [(1.0, True), (1.001, False), (float("nan"), False)])
@pytest.mark.parametrize("part", [0, 1])
def test_parity_sees_a_wrong_result(monkeypatch, part, wrong, right):
    def scan(*args, **kwargs):
        results = list(reference.selective_scan(*args, **kwargs))
        if results[part] is not None:
            results[part] = results[part] * wrong
        return results

    backend = SimpleNamespace(selective_scan=scan)
    monkeypatch.setattr(gpu_parity, "load_backend", lambda name: backend)
    rows = list(gpu_parity.parity(["cuda"], torch.device("cpu"), (1, 3), 4))
    for row in rows:
        if "float32" in row["name"] and not ("none kept" in row["name"] and part == 1):
            assert row["ok"] == right, row


def test_a_backend_that_fails_is_a_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(gpu_parity, "load_backend", Mock(side_effect=UserError("none")))
    rows = list(gpu_parity.parity(["triton"], torch.device("cpu"), (1,), 4))
    assert len(rows) == 10 and not any(row["ok"] for row in rows)
    assert all("(UserError: none)" in row["name"] for row in rows)
    (row,) = gpu_parity.model_parity(["cpu"], torch.device("cpu"), Mock(side_effect=MemoryError))
    assert row["name"].endswith("(MemoryError: )") and not row["ok"]


def test_parity_sees_a_wrong_model(monkeypatch):
    """One whose fused step is a little off, and whose gradients are."""

    def parity_of_the_model() -> dict:
        rows = gpu_parity.model_parity(["cpu"], torch.device("cpu"), lambda name: nullcontext())
        return next(iter(rows))

    assert parity_of_the_model()["ok"]
    step, backward = model.MambaLM.stepper, training.PrefixSuffixLM.token_losses

    def off(self):
        stepped = step(self)
        is_exact = self.lm_head.weight.dtype == torch.float64
        return stepped if is_exact else lambda ids, state: stepped((ids + 1) % 96, state)

    monkeypatch.setattr(model.MambaLM, "stepper", off)
    row = parity_of_the_model()
    assert row["output"] == math.inf and row["state"] > 1 >= row["gradient"] and not row["ok"]
    monkeypatch.setattr(model.MambaLM, "stepper", step)

    def scaled(self, **batch):
        losses, index = backward(self, **batch)
        return losses * (1 if losses.dtype == torch.float64 else 1.001), index

    monkeypatch.setattr(training.PrefixSuffixLM, "token_losses", scaled)
    row = parity_of_the_model()
    assert row["gradient"] > 1 >= row["state"] and not row["ok"]


def test_mamba_ssms_own_model_is_run_as_its_interface_says(monkeypatch):
    """By a stand-in of the same interface."""

    class MambaLMHeadModel(torch.nn.Module):
        def __init__(self, config, initializer_cfg=None, device=None, dtype=None):
            super().__init__()
            d_model, _, n_layer, vocab_size = config
            self.inner = MambaLM(MambaConfig(vocab_size, d_model, n_layer))
            self.lm_head = self.inner.lm_head

        def backbone(self, input_ids, inference_params=None):
            return self.inner.encode(input_ids)[0]

        def generate(self, input_ids, max_length, top_k=1, cg=False):
            assert cg and input_ids.shape == (2, 3) and max_length == 5

    names = ("mamba_ssm", "mamba_ssm.models")
    for name in (*names, f"{names[1]}.config_mamba", f"{names[1]}.mixer_seq_simple"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["mamba_ssm.models.config_mamba"].MambaConfig = lambda *shape: shape
    sys.modules["mamba_ssm.models.mixer_seq_simple"].MambaLMHeadModel = MambaLMHeadModel
    model = gpu_models.Model("mamba-ssm", 16, 1, torch.device("cpu"))
    assert model.product_flop() == 2 * (16 * 64 + 32 * (1 + 32) + 1 * 32 + 32 * 16)
    model.generation(2, 3, 2)()
    model.prefill(2, 3)()
    examples = [Item.with_target([1, 2], [3], [4, 5]), Item.with_target([1, 2], [6, 7], [8])]
    before = model.module.lm_head.weight.detach().clone()
    model.training_step(examples, forked=False)()
    assert not torch.equal(model.module.lm_head.weight, before)


def test_bench_eval(in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_eval, "WIDTH", 16)
    path = tmp_path / "rows.json"
    shape = ("--n_layer", 1, "--rounds", 1, "--passages", 2, "--max_new_tokens", 2)
    run(bench_eval, monkeypatch, *shape, "--json", path)
    rows = rows_of(path)
    assert rows["ours, shared"]["tokens"] < rows["ours, unshared"]["tokens"]
    assert "transformers, batches of 8" in rows


def test_bench_eval_asks_as_many_questions_a_passage_as_the_data():
    examples = read_examples(VALIDATION)
    passages = workloads.sample_passages(examples, 15)
    assert len(passages) == 15 and all(len({e.context for e in p}) == 1 for p in passages)
    of_data = len(examples) / len({e.context for e in examples})
    assert sum(map(len, passages)) / 15 == pytest.approx(of_data, rel=0.02)
    assert workloads.sample_passages(examples, 15) == passages


def test_bench_decode(in_process, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_decode, "WIDTH", 64)
    path = tmp_path / "rows.json"
    shape = ("--n_layer", 1, "--rounds", 1, "--max_new_tokens", 2)
    run(bench_decode, monkeypatch, *shape, "--json", path)
    rows = rows_of(path)
    for dtype in ("float32", "bfloat16"):
        assert rows[f"weights read once, {dtype}"]["ratio"] == 1.0
        assert rows[f"ours, {dtype}"]["tokens"] == 1


def test_bench_console(in_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_console, "WIDTH", 32)
    path = tmp_path / "rows.json"
    shape = ("--n_layer", 1, "--tokens", 60, "--questions", 3, "--max_new_tokens", 2)
    run(bench_console, monkeypatch, *shape, "--rounds", 1, "--json", path)
    rows = rows_of(path)
    assert rows["ours: one question"]["ratio"] == 1.0
    tasks = ("first token of the first question", "first token of a later one", "one question",
             "all questions", "all questions, the context read for each")  # fmt: skip
    assert {f"ours: {task}" for task in tasks} | {"transformers: one question"} <= rows.keys()
    assert "3 of 3 answers from the saved state equal those of whole prompts" in (
        capsys.readouterr().out
    )
    with pytest.raises(UserError, match="too little for --tokens and --questions"):
        run(bench_console, monkeypatch, "--tokens", 10**9)


def test_bench_growth(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_growth, "WIDTH", 16)
    monkeypatch.setattr(bench_growth, "BY_QUESTIONS", [(4, 1, 9), (2, 2, 9)])
    monkeypatch.setattr(bench_growth, "BY_LENGTH", [(1, 2, 8), (1, 2, 32)])
    path, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    drawn = ("--plot", plot) if importlib.util.find_spec("matplotlib") else ()
    run(bench_growth, monkeypatch, "--n_layer", 1, "--rounds", 1, "--json", path, *drawn)
    rows = rows_of(path)
    assert rows["1 x 9, shared"]["tokens"] == rows["1 x 9, unshared"]["tokens"] == 9 + 20 + 16
    assert rows["2 x 32, shared"]["tokens"] == 16 + 20 + 16
    assert rows["2 x 32, unshared"]["tokens"] == 32 + 20 + 16
    assert not drawn or plot.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        run(bench_growth, monkeypatch, "--plot", "x.png")


def test_a_worker_measures_in_a_process_of_its_own():
    worker = timing.Worker(a_contender, 20_000_000)
    assert (worker.items, worker.tokens) == (3, 20_000_000)
    assert 70e6 < worker.peak_growth() < 100e6
    assert worker.time() > 0


def test_an_error_in_a_worker_is_reported():
    worker = timing.Worker(no_contender)
    with pytest.raises(UserError, match="nosuch: no tokenizer"):
        worker.items  # noqa: B018


def test_a_killed_worker_is_reported():
    worker = timing.Worker(kill_this_process)
    with pytest.raises(UserError, match="was killed: is the memory enough"):
        worker.items  # noqa: B018


def test_a_bug_in_a_worker_is_one_with_its_place():
    worker = timing.Worker(fail_when_called)
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        worker.time()
    assert "in fail_when_called" not in caught.value.__notes__[0]
    assert "in fail\n" in caught.value.__notes__[0]


ENDLESS = """
import sys, time
from benchmarks.timing import Contender, Worker
from common.script import run_script

def endless():
    print("begun", flush=True)
    return Contender(lambda: time.sleep(3600))

def main(args):
    workers = [Worker(endless), Worker(endless)]
    print("started", flush=True)
    for worker in workers:
        worker.time()

if __name__ == "__main__":
    run_script(main, lambda: None)
"""


@pytest.mark.parametrize(  # while a worker imports, and computes
    "line", ["started", pytest.param("begun", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("sent", "to_all", "code"),
    [(signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143), (signal.SIGINT, True, 130)],
    ids=["terminated", "all terminated", "Ctrl-C"],
)
def test_a_benchmark_ends_with_its_workers_in_one_line(tmp_path, line, sent, to_all, code):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    process = subprocess.Popen(
        [sys.executable, script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.stdout.readline() != f"{line}\n":
        assert process.poll() is None
    (os.killpg if to_all else os.kill)(process.pid, sent)
    err = process.communicate(timeout=600)[1]  # comes to its end when the last worker is gone
    assert process.returncode == code
    assert err == ("interrupted\n" if code == 130 else "terminated\n")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "llama_cpp")),
    reason="gguf and llama-cpp-python are not installed (requirements-benchmarks.txt)",
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_llama_cpp_computes_the_same(dtype, tolerance, tmp_path):
    from benchmarks.llama_cpp_peer import LlamaCpp, write_gguf

    torch.manual_seed(0)
    model = MambaLM(MambaConfig(vocab_size=60, d_model=64, n_layer=2)).eval()
    with torch.no_grad():  # at their start, weights of several kinds hardly matter
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (0.02 if "proj" in name else 0.1)
    write_gguf(model, tmp_path / "model.gguf", dtype)
    peer = LlamaCpp(tmp_path / "model.gguf", context=64)
    ids = torch.randint(60, (1, 20))
    peer.read(ids[0].tolist())
    with torch.no_grad():
        logits, _ = model(ids)
    got, wanted = torch.tensor(peer.logits().copy()), logits[0, -1]
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    peer.read(ids[0].tolist())
    alone = peer.decode(3)
    assert peer.answer(ids[0, :12].tolist(), [ids[0, 12:].tolist()] * 2, 3) == [alone, alone]


def test_forked_states_give_the_demo_checkpoints_guesses(monkeypatch, capsys):
    run(same_answers, monkeypatch, "models/demo", VALIDATION, "--limit", 40)
    out = capsys.readouterr().out
    assert re.search(r"^40 questions, \d\d distinct guesses, 0 differ$", out, re.MULTILINE)


def test_learning_measures_both_kinds_of_batches(monkeypatch, tmp_path, capsys):
    for name, source in (("train", TRAIN), ("held_out", VALIDATION)):
        lines = Path(source).read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:24]))
    output = tmp_path / "learning.jsonl"
    arguments = [
        tmp_path / "train.jsonl", tmp_path / "held_out.jsonl", output, "--model", "models/demo",
        "--num_epochs", "1", "--learning_rate", "1e-4",
    ]  # fmt: skip
    monkeypatch.setenv("LEARNING_RUN", "1")
    for condition in ("shuffled:8", "grouped:8"):
        run(learning, monkeypatch, *arguments, "--conditions", condition, "--seeds", "0")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["condition"] for row in rows} == {"shuffled:8", "grouped:8"}
    assert all(0 < row["loss"] < 2 and row["seconds"] > 0 for row in rows)
    learning.print_table(rows)
    table = capsys.readouterr().out
    assert re.search(r"^grouped:8 +1 +\d", table, re.MULTILINE)
    with pytest.raises(UserError, match="give shuffled:N or grouped:N"):
        run(learning, monkeypatch, *arguments, "--conditions", "sorted:8")


def test_learning_ends_with_its_runs(monkeypatch, tmp_path):
    """What interrupts it is not kept waiting by what has been started."""

    def interrupt(*args):
        raise KeyboardInterrupt

    started = []

    class Endless(subprocess.Popen):
        def __init__(self, command, **kwargs):
            super().__init__([sys.executable, "-c", "import time; time.sleep(3600)"], **kwargs)
            started.append(self)
            if len(started) == 2:
                signal.setitimer(signal.ITIMER_REAL, 0.2)

    monkeypatch.setattr(subprocess, "Popen", Endless)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(learning, monkeypatch, TRAIN, VALIDATION, tmp_path / "rows.jsonl", "--model", "m")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [process.wait() for process in started] == [-signal.SIGTERM] * 2


def test_a_contender_that_takes_too_long_is_called_once():
    calls = []

    class Waiting(timing.Worker):
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def time(self) -> float:
            calls.append(self.name)
            return self.seconds

    workers = {"fast": Waiting("fast", 1.0), "slow": Waiting("slow", 9.0)}
    seconds = timing.alternate(workers, rounds=2, patience=5.0)
    assert calls == ["fast", "slow", "fast", "fast"]
    assert seconds == {"fast": [1.0, 1.0], "slow": [9.0]}


def test_ratio_pairs_the_rounds():
    """Where the machine slowed down for both, the ratio does not show it."""
    assert timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert timing.ratio([30.0], [10.0, 5.0, 20.0]) == 3.0


def test_expected_memory_is_what_is_measured(tmp_path, monkeypatch):
    shape = {"d_model": 64, "n_layer": 3, "vocab_size": 500, "ssm_cfg": {"d_state": 8}}
    (tmp_path / "small.json").write_text(json.dumps(shape))
    monkeypatch.setattr(bench_memory, "CONFIGS", tmp_path)
    path = tmp_path / "rows.json"
    run(bench_memory, monkeypatch, "--json", path)
    saved, checkpointed = json.loads(path.read_text())
    assert 0.9 < saved["ratio"] < 1.1 and 0.9 < checkpointed["ratio"] < 1.1
    assert checkpointed["MB measured"] < 0.2 * saved["MB measured"]
