"""Ctrl-C, SIGTERM and SIGHUP end every script with one line, at any moment."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
ENDINGS = {  # the exit code and the line for each signal
    signal.SIGINT: (130, "interrupted"),
    signal.SIGTERM: (143, "terminated"),
    signal.SIGHUP: (129, "terminated"),
}
LIMIT = 60  # seconds after which a script counts as hanging

# At any moment

MODEL, DATA = "models/demo", "data/demo/validation.jsonl"
QUESTION = ("--question", "Who owns it?")
ENDLESS = "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t"
RUNS = {  # {} is replaced by a folder for outputs
    "prompt_mamba.py": [MODEL, *QUESTION],
    "prompt_mamba_with_context.py": [
        *(MODEL, "--context_file", "data/demo/passage.txt", "--explain", *QUESTION),
    ],
    "eval_n_shot_mamba.py": [MODEL, DATA, "{}/out.jsonl", "--limit", "50"],
    "eval_mamba_with_context.py": [
        *(MODEL, DATA, "{}/out.jsonl", "--limit", "200", "--max_new_tokens", "8"),
    ],
    "train_mamba_with_context.py": [
        *("--model", MODEL, "--data_path", DATA, "--output", "{}/new", "--max_steps", "6"),
    ],
    "compare_results.py": ["{}/results.jsonl", "{}/results.jsonl"],
    "report_results.py": ["{}/results.jsonl", "--output", "{}/report.html"],
    "query_results.py": ["{}/results.jsonl", "SELECT AVG(f1) FROM df"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("results") / "results.jsonl"
    command = [sys.executable, "eval_mamba_with_context.py", "sliding-window", DATA, str(path)]
    command += ["--limit", "100"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    return path


def start(script: str, folder: Path, results: Path) -> subprocess.Popen:
    folder.mkdir()
    (folder / "results.jsonl").write_bytes(results.read_bytes())
    arguments = [argument.replace("{}", str(folder)) for argument in RUNS[script]]
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_ended(process: subprocess.Popen, sent: signal.Signals) -> None:
    """Check that a script ended with one line because of the signal, or normally before it.

    Before the first line of a script and after its last one, Python itself handles the signal."""
    _, err = process.communicate(timeout=LIMIT)
    code, word = ENDINGS[sent]
    if "Traceback" in err:
        lines = re.findall(r'File "(.+?)", line (\d+)', err)
        own = [(Path(path).name, int(line)) for path, line in lines if path.startswith(str(ROOT))]
        own = [(name, line) for name, line in own if ".venv" not in name]
        assert "KeyboardInterrupt" in err, err
        assert {name for name, _ in own} <= {Path(process.args[1]).name, "script.py", "guard.py"}
        assert all("import" in line_of(name, line) for name, line in own), err
    elif process.returncode == code:
        assert err.splitlines()[-1] == word
    else:
        assert process.returncode in (0, -sent), err


def line_of(name: str, line: int) -> str:
    return (ROOT / name).read_text().splitlines()[line - 1]


def stop_at_moments(script: str, folder: Path, results: Path, moments: int) -> list[float]:
    """Stop a script at moments between its first millisecond and its end, with Ctrl-C and SIGTERM
    in turn. Returns the seconds that it took to end each time."""
    process = start(script, folder / "complete", results)
    started = time.monotonic()
    assert process.wait(timeout=600) == 0, process.communicate()[1]
    duration = time.monotonic() - started
    process.communicate()
    seconds = []
    for number in range(moments):
        sent = (signal.SIGINT, signal.SIGTERM)[number % 2]
        process = start(script, folder / str(number), results)
        time.sleep(0.001 + duration * number / moments)
        sent_at = time.monotonic()
        process.send_signal(sent)
        check_ended(process, sent)
        seconds.append(time.monotonic() - sent_at)
    return seconds


SLOW = {  # two end as the scripts with a context do; signals in training have tests of their own
    *("eval_n_shot_mamba.py", "prompt_mamba.py", "train_mamba_with_context.py"),
}


@pytest.mark.parametrize("script", [script for script in RUNS if script not in SLOW])
def test_a_script_is_stopped_at_some_moments(script, results, tmp_path):
    stop_at_moments(script, tmp_path, results, moments=2)


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_a_script_is_stopped_at_forty_moments(script, results, tmp_path):
    seconds = stop_at_moments(script, tmp_path, results, moments=40)
    print(f"{script}: at most {max(seconds):.2f} s, {sorted(seconds)[len(seconds) // 2]:.2f} s")


@pytest.mark.parametrize("sent, form", [*zip(ENDINGS, ["table", "csv", "json"], strict=True)])
def test_an_endless_query_is_stopped(sent, form, results):
    command = [sys.executable, "query_results.py", str(results), ENDLESS, "--format", form]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    tasks = Path(f"/proc/{process.pid}/task")
    while process.poll() is None and not is_computing(tasks):
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=LIMIT)
    code, word = ENDINGS[sent]
    assert (process.returncode, err) == (code, f"{word}\n")


def is_computing(tasks: Path) -> bool:
    """Whether a process has used two seconds of processor time, more than its start needs."""
    fields = [(task / "stat").read_text().rpartition(")")[2].split() for task in tasks.iterdir()]
    ticks = sum(int(row[11]) + int(row[12]) for row in fields)
    return ticks > 2 * os.sysconf("SC_CLK_TCK")


# Where Python or a library would ignore an exception

BEGIN = """
from common.script import exit_on_signal, exit_on_signal_in_c, loading, run_script
import ctypes, os, signal, sys, time
def main(args):
    try:
        work()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        print("cleaned", flush=True)
"""
END = """
run_script(main, lambda: None)
"""
IN_CALLBACK = """
def work():
    ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal({}))()
    print("returned", flush=True)
"""
IN_IMPORT = """
def work():
    import swallows
"""
IN_DEL = """
class Held:
    def __del__(self):
        signal.raise_signal({})
def work():
    Held()
"""
IN_WORK = """
def work():
    signal.raise_signal({})
"""


AT_THE_END = """
from common.script import run_script
import atexit, time
def main(args):
    import swallows
atexit.register(time.sleep, 0.2)
run_script(main, lambda: None)
"""


def test_a_signal_in_a_last_import_lets_the_script_end(tmp_path):
    """The alarm that raises the signal again does not kill the interpreter while it ends."""
    (tmp_path / "swallows.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    script = tmp_path / "script_of_test.py"
    script.write_text(AT_THE_END)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


def run_work(tmp_path: Path, work: str, **settings) -> subprocess.CompletedProcess:
    """Run a script whose main calls this `work`, to its end."""
    script = tmp_path / "script_of_test.py"
    script.write_text(BEGIN + work + END)
    (tmp_path / "swallows.py").write_text(
        "import os, signal\n"
        "try:\n    signal.raise_signal(int(os.environ['SENT']))\n    sum(range(1000))\n"
        "except BaseException:\n    raise ImportError('not installed')\n"
    )
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=LIMIT, **settings
    )


@pytest.mark.parametrize("sent", ENDINGS)
@pytest.mark.parametrize("work", [IN_CALLBACK, IN_IMPORT, IN_DEL, IN_WORK])
def test_an_ignored_signal_is_raised_again(work, sent, tmp_path):
    environment = ENVIRONMENT | {"SENT": str(int(sent))}
    process = run_work(tmp_path, work.replace("{}", str(int(sent))), env=environment)
    code, word = ENDINGS[sent]
    assert (process.returncode, process.stderr) == (code, f"{word}\n")
    assert process.stdout.endswith("cleaned\n")


@pytest.mark.parametrize("block", ["exit_on_signal()", "loading('x')", "exit_on_signal_in_c()"])
@pytest.mark.parametrize("sent", ENDINGS)
def test_blocks_that_exit_on_a_signal(block, sent, tmp_path):
    work = f"""
def work():
    with {block}:
        ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal({int(sent)}))()
        time.sleep(60)
"""
    process = run_work(tmp_path, work, env=ENVIRONMENT)
    code, word = ENDINGS[sent]
    assert (process.returncode, process.stdout, process.stderr) == (code, "", f"{word}\n")


@pytest.mark.parametrize("block", ["exit_on_signal()", "loading('x')", "exit_on_signal_in_c()"])
def test_the_line_is_printed_while_standard_error_is_silenced(block, tmp_path):
    work = f"""
def work():
    with {block}:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.raise_signal(2)
        time.sleep(60)
"""
    process = run_work(tmp_path, work, env=ENVIRONMENT)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("block", ["exit_on_signal()", "loading('x')", "exit_on_signal_in_c()"])
def test_after_such_a_block_a_signal_runs_finally_blocks(block, tmp_path):
    work = f"def work():\n    with {block}:\n        pass\n    signal.raise_signal(15)\n"
    process = run_work(tmp_path, work, env=ENVIRONMENT)
    assert (process.returncode, process.stdout, process.stderr) == (
        143,
        "cleaned\n",
        "terminated\n",
    )


def test_a_second_signal_while_cleaning_up_gives_no_traceback(tmp_path):
    work = """
def work():
    try:
        signal.raise_signal(2)
    finally:
        signal.raise_signal(2)
"""
    process = run_work(tmp_path, work, env=ENVIRONMENT)
    assert (process.returncode, process.stdout, process.stderr) == (
        130,
        "cleaned\n",
        "interrupted\n",
    )


def test_a_signal_at_the_exit_gives_no_traceback(tmp_path):
    work = """
import atexit
atexit.register(lambda: (signal.raise_signal(2), time.sleep(60)))
def work():
    raise SystemExit
"""
    process = run_work(tmp_path, work, env=ENVIRONMENT)
    assert (process.returncode, process.stderr) == (130, "interrupted\n")


def test_a_forked_process_prints_nothing(tmp_path):
    work = """
def work():
    child = os.fork()
    while child == 0:
        time.sleep(1)
    ended = 0
    while not ended:  # Python drops a signal that comes just after the fork
        os.kill(child, 2)
        time.sleep(0.1)
        ended, status = os.waitpid(child, os.WNOHANG)
    print(os.waitstatus_to_exitcode(status))
    sys.exit()
"""
    process = run_work(tmp_path, work, env=ENVIRONMENT)
    assert (process.stdout, process.stderr) == ("130\ncleaned\n", "")


def test_a_signal_that_a_shell_ignores_stays_ignored(tmp_path):
    work = "def work():\n    signal.raise_signal(2)\n    sys.exit(7)\n"
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    process = run_work(tmp_path, work, env=ENVIRONMENT, **ignore)
    assert (process.returncode, process.stderr) == (7, "")


def test_an_error_in_a_callback_is_still_reported(tmp_path):
    work = "def work():\n    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()\n    sys.exit(7)\n"
    process = run_work(tmp_path, work, env=ENVIRONMENT)
    assert process.returncode == 7 and "ZeroDivisionError" in process.stderr
