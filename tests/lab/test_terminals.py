"""The command on odd terminals: it prints its results or one line, and never a traceback."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import COMMAND, TRAIN, environment, run_process

from bn_jax import training
from bn_jax.lab import runs
from bn_jax.lab.commands import findings
from bn_jax.lab.console import progress, tables
from bn_jax.lab.experiments import EXPERIMENTS
from bn_jax.lab.training import results

if sys.platform == "win32":
    pytest.skip("descriptors and terminals are those of POSIX", allow_module_level=True)

# Variables of an odd terminal; None unsets one.
TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1, 20 columns": {"PYTHONIOENCODING": "latin-1", "COLUMNS": "20"},
    "cp1252, one column": {"PYTHONIOENCODING": "cp1252", "COLUMNS": "1", "LINES": "1"},
    "POSIX": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "C": {"LANG": "C", "LC_ALL": None},
    "no number": {"COLUMNS": "²", "LINES": "²"},
    "negative": {"COLUMNS": "-5", "LINES": "0"},
    "huge": {"COLUMNS": "9" * 30, "LINES": "9" * 5000},
    "dumb": {"TERM": "dumb", "NO_COLOR": "1"},
    "none": {"TERM": None, "HOME": None, "COLUMNS": ""},
    "colors": {"FORCE_COLOR": "1", "TERM": "xterm-256color"},
}


def run_in_shell(arguments, redirections, folder, **variables):
    """Runs the command with redirections that only a shell can make."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", *COMMAND, *map(str, arguments)],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        timeout=300,
    )


def assert_clean(stderr, lines):
    """Nothing but so many lines of the command's own."""
    printed = stderr.splitlines()
    assert len(printed) == lines and all(line.startswith(b"bn-jax: ") for line in printed), stderr


@pytest.mark.parametrize("variables", TERMINALS.values(), ids=TERMINALS)
def test_any_terminal_gets_help_and_errors(tmp_path, variables):
    finished = run_in_shell(("train", "--help"), "", tmp_path, **variables)
    assert finished.returncode == 0 and b"--learning-rate" in finished.stdout
    assert_clean(finished.stderr, 0)
    # A name that no terminal can show: Greek, and bytes that are no text.
    odd = b"\xce\xb1\xff".decode("utf-8", "surrogateescape")
    finished = run_in_shell(("train", "--log", odd), "", tmp_path, **variables)
    assert (finished.returncode, finished.stdout) == (2, b"")
    assert_clean(finished.stderr, 1)
    assert b"expected tensorboard" in finished.stderr


SPELLING = """
import sys
from bn_jax.lab.console import terminal
terminal.prepare()
print(sys.argv[1])
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_text_is_spelled_out_where_an_encoding_lacks_it(encoding):
    odd = "a\u03b1\u2026" + b"\xff".decode("utf-8", "surrogateescape")
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", SPELLING, odd],
        env=environment(PYTHONIOENCODING=encoding),
        capture_output=True,
        check=True,
    )
    spelled = odd.encode(encoding, "backslashreplace") + b"\n"
    assert (finished.stdout, finished.stderr) == (spelled, b"")


# How a stream fails, the status of a command that has something to print, and the lines of errors
# that arrive; then the same of a command that has an error to print.
STREAMS = {
    ">&-": (0, 0, 2, 1),
    "2>&-": (0, 0, 2, 0),
    ">&- 2>&-": (0, 0, 2, 0),
    "<&- >&- 2>&-": (0, 0, 2, 0),
    ">/dev/full": (1, 1, 2, 1),
    "2>/dev/full": (0, 0, 2, 0),
    ">/dev/full 2>/dev/full": (1, 0, 2, 0),
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
@pytest.mark.parametrize("redirections", STREAMS)
def test_streams_that_are_closed_or_full(tmp_path, redirections):
    status, lines, status_of_error, lines_of_error = STREAMS[redirections]
    finished = run_in_shell(("train", "--help"), redirections, tmp_path)
    assert finished.returncode == status
    assert_clean(finished.stderr, lines)
    finished = run_in_shell(("train", "--log", "x"), redirections, tmp_path)
    assert finished.returncode == status_of_error
    assert_clean(finished.stderr, lines_of_error)
    assert list(tmp_path.iterdir()) == []


def run_without_reader(arguments, folder, first_lines=0):
    """Runs the command into a pipe whose reader ends after some lines."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for _ in range(first_lines):
        process.stdout.readline()
    process.stdout.close()
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


def test_a_reader_that_has_ended_is_no_error(tmp_path):
    assert run_without_reader(("train", "--help"), tmp_path) == (0, b"")
    code, stderr = run_without_reader(("train", "--log", "x"), tmp_path)
    assert code == 2
    assert_clean(stderr, 1)


# Occupies what a closed standard output leaves free, and prints there.
DESCRIPTORS = """
from bn_jax.lab.console import terminal
terminal.prepare()
with open("file", "w") as file:
    print("to standard output", flush=True)
    import os; os.write(1, b"by another library")
"""


def test_a_file_does_not_become_the_standard_output(tmp_path):
    subprocess.run(
        ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", sys.executable, "-c", DESCRIPTORS],
        cwd=tmp_path,
        env=environment(),
        check=True,
    )
    assert (tmp_path / "file").read_bytes() == b""


# Descriptors of processes that this one starts are those of its own.
NON_BLOCKING = """
import os, sys
from bn_jax.lab.console import terminal
os.set_blocking(1, False)
terminal.prepare()
print("x" * 1_000_000)
sys.exit(terminal.check_written(0))
"""


def test_a_pipe_that_does_not_block_gets_everything(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", NON_BLOCKING], env=environment(), capture_output=True, check=True
    )
    assert finished.stdout == b"x" * 1_000_000 + b"\n"


WITHOUT_HOME = """
from bn_jax.lab.console import terminal
terminal.prepare()
import matplotlib.figure
matplotlib.figure.Figure().savefig("figure.png")
"""


@pytest.mark.parametrize("home", [None, "/dev/null/home"])
def test_a_picture_needs_no_home(tmp_path, home):
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_HOME],
        cwd=tmp_path,
        env=environment(HOME=home, XDG_CACHE_HOME=home, XDG_CONFIG_HOME=home, MPLCONFIGDIR=None),
        capture_output=True,
        check=True,
    )
    assert finished.stderr == b"" and (tmp_path / "figure.png").exists()


# --- tables -------------------------------------------------------------------------------------


def evaluation(loss=0.25):
    return training.Evaluation(loss, accuracy=0.98765, correct=1234, examples=1249)


def print_arms():
    reports = [SimpleNamespace(step=5, examples=98765, seconds=0.01, validation=evaluation())]
    tables.print_arms({arm: results.Result(reports, None, evaluation()) for arm in runs.ARMS})


def print_change():
    figures = runs.Figures(evaluation(4e18), milliseconds=12345.678, parameters=987654321)
    tables.print_change(runs.Change(figures, figures))


def print_claims():
    tables.print_claims(EXPERIMENTS.values())


TABLES = {
    "arms": (print_arms, [*runs.ARMS, "98.77%", "9,876,500", "test accuracy", "per second"]),
    "change": (
        print_change,
        ["milliseconds per batch", "12345.68", "987,654,321", "4e+18", "before", "after"],
    ),
    "claims": (print_claims, [name for name in EXPERIMENTS]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_shows_its_values_at_any_width(monkeypatch, capsys, name):
    show, values = TABLES[name]
    is_table = {}
    for width in (1, 5, 20, 39, *range(40, 121, 4), 10_000):
        monkeypatch.setenv("COLUMNS", str(width))
        show()
        out, err = capsys.readouterr()
        assert err == "" and "…" not in out
        lost = [value for value in values if value not in out]
        assert lost == [], (width, out)
        is_table[width] = "│" in out
        assert not is_table[width] or max(map(len, out.splitlines())) <= width
    assert is_table[80] and not is_table[20]


def test_a_verdict_shows_its_values_at_any_width(monkeypatch, capsys):
    measured = {"estimate": 0.0123456, "low": -0.0234567, "high": 0.987654}
    part = {
        "key": "8a",
        "label": "largest stable rate",
        "bound": {"kind": "above", "text": "> 0, size 10"},
        "verdict": "inconclusive",
        "agree": True,
        "decisive": "",
        "settings": {"": {"measured": measured, "seeds_needed": "about 30"}},
    }
    record = {"number": 8, "sub_claims": [part], "seeds": [0, 1], "rates": {}}
    for width in (1, 20, 40, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        findings.print_findings([record])
        out, _ = capsys.readouterr()
        for value in ("8a", "> 0, size 10", "0.0123", "-0.0235", "0.988", "inconclusive"):
            assert value in out, (width, out)
        assert "8a about 30" in out


LOSSES = {
    0.0: "0.0000",
    0.25: "0.2500",
    12.34567: "12.3457",
    123456.0: "123456.0000",
    4e18: "4e+18",
    -4e18: "-4e+18",
    1.23456e-7: "1.235e-07",
    float("inf"): "inf",
    float("nan"): "nan",
}


def test_losses_of_any_size_are_short(monkeypatch, capsys):
    for loss, text in LOSSES.items():
        assert tables.format_loss(loss) == text
    experiment = next(iter(EXPERIMENTS.values()))
    report = SimpleNamespace(
        step=2, epoch=1, training=evaluation(4e18), validation=evaluation(4e18)
    )
    monkeypatch.setenv("TERM", "dumb")
    with progress.show_training(("arm",), 2, 1) as show:
        show("arm", [report])
    with progress.show_claims([experiment], is_wanted=False) as show_nothing:
        show_nothing(experiment, 1.0, {"sub_claims": [{"verdict": "exact"}]})
    assert capsys.readouterr().out == (
        "arm: epoch 1 of 1, loss 4e+18, validation accuracy 98.77%\n"
    )


# --- bars ---------------------------------------------------------------------------------------

BARS = """
from bn_jax.lab.console import progress, terminal

class Record:
    def __init__(self, **fields):
        vars(self).update(fields)

def report(step, loss):
    return Record(
        step=step, epoch=step, training=Record(loss=loss), validation=Record(accuracy=0.5)
    )

terminal.prepare()
arms = ("no normalization", "per-device batch norm", "synchronized batch norm")
with progress.show_training(arms, 1, 100) as show:
    show(arms[0], [report(40, 0.25)])
    show(arms[2], [report(100, 4e18)])
claims = [Record(name="scale_and_bias_alone", number=15), Record(name="hessian", number=16)]
with progress.show_claims(claims, is_wanted=True) as show:
    show(claims[0], 0.5, {"sub_claims": [{"verdict": "inconclusive"}]})
print("done")
"""


def run_on_terminal(program, columns, **variables):
    """Runs a program on a terminal of its own, and returns what it printed there."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    unset = {"COLUMNS": None, "LINES": None, "TERM": "xterm", "NO_COLOR": None}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program],
        stdin=its, stdout=its, stderr=its, env=environment(**(unset | variables)),
    )  # fmt: skip
    os.close(its)
    printed = b""
    # A terminal without processes ends in an error instead of an end.
    with contextlib.suppress(OSError):
        while data := os.read(ours, 65536):
            printed += data
    os.close(ours)
    assert process.wait(timeout=60) == 0, printed
    return printed


@pytest.mark.parametrize(
    ("columns", "variables", "has_bars"),
    [
        (80, {}, True),
        (80, {"PYTHONIOENCODING": "ascii"}, True),
        (80, {"NO_COLOR": "1"}, True),
        (20, {}, False),
        (1, {"PYTHONIOENCODING": "latin-1"}, False),
        (80, {"TERM": "dumb"}, False),
        (80, {"TERM": None}, False),
    ],
)
def test_bars_fit_their_terminal_or_are_lines(columns, variables, has_bars):
    printed = run_on_terminal(BARS, columns, **variables)
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", printed).decode()
    assert (b"\x1b[" in printed) == has_bars
    assert "…" not in text and "\\u" not in text
    assert "loss 4e+18, val" in text and "50.00%" in text and "0 of 1 reproduced" in text
    assert text.endswith("done\r\n")
    if has_bars:
        assert "loss 0.2500, val. accuracy 50.00%" in text
        assert max(map(len, re.split(r"[\r\n]+", text))) <= columns
    colored = re.search(rb"\x1b\[[0-9;]*3[0-9;]*m", printed)
    assert bool(colored) == (has_bars and "NO_COLOR" not in variables)


# --- every command ------------------------------------------------------------------------------


def run_folded(trained, folder, **variables):
    return run_process(["fold", trained[0] / "a/run", "--out", "folded"], folder, **variables)


def test_fold_on_a_terminal_of_20_columns_in_latin_1(trained, tmp_path):
    finished = run_folded(trained, tmp_path, COLUMNS="20", PYTHONIOENCODING="latin-1")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "accuracy\n  before: 100.00%\n  after: 100.00%\n" in finished.stdout
    assert finished.stdout.endswith("Saved in folded; evaluate it with bn-jax eval folded\n")
    assert (tmp_path / "folded/metrics.json").exists()


@pytest.fixture
def read_only(tmp_path):
    """A folder where nobody can write; to root, permissions mean nothing."""
    folder = tmp_path / "read only"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode and os.geteuid() == 0:
        pytest.skip("root may not mount a file system here")
    folder.chmod(0o555) if mounted.returncode else None
    yield folder
    if not mounted.returncode:
        subprocess.run(["umount", folder], check=True)


def commands(trained, out):
    """Every command with something to print, and its results."""
    run = trained[0] / "a/run"
    weights = out / "weights.safetensors"
    out.mkdir()
    save_file({"bn.weight": np.ones(3, "float32"), "bn.bias": np.zeros(3, "float32")}, weights)
    save_file({"params/bn/scale": np.ones(3, "f4"), "params/bn/bias": np.ones(3, "f4")}, out / "l")
    return {
        "eval": (["eval", run], None),
        "fold": (["fold", run, "--out", out / "fold"], "metrics.json"),
        "recalibrate": (
            [
                *("recalibrate", run, "--data", trained[0] / "bars.npz", "--progress"),
                "--out",
                out / "recalibrate",
            ],
            "recalibration.png",
        ),
        "audit": (["audit", run, "--out", out / "audit"], "audit.png"),
        "export": (["export", run, "--out", out / "export"], "model.json"),
        "convert": (["convert", weights, "--like", out / "l", "--out", out / "convert"], None),
        "list": (["reproduce", "--list"], None),
    }


ODD = [
    ("", TERMINALS["cp1252, one column"] | {"HOME": None, "TERM": None}),
    ("", TERMINALS["POSIX"] | {"COLUMNS": "20", "HOME": "/dev/null/home"}),
    (">&- 2>&-", TERMINALS["no number"]),
    (">/dev/full", {}),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("eval", (0, 2, 3)),
        ("fold", (1, 3)),
        ("recalibrate", (0, 1)),
        ("audit", (1, 2)),
        ("export", (0, 3)),
        ("convert", (1, 2)),
    ],
)
def test_every_command_on_an_odd_terminal(trained, tmp_path, read_only, name, chosen):
    for number in chosen:
        redirections, variables = ODD[number]
        out = tmp_path / str(number)
        arguments, result = commands(trained, out)[name]
        finished = run_in_shell(arguments, redirections, read_only, **variables)
        is_full = redirections == ">/dev/full"
        assert finished.returncode == is_full, finished.stderr
        # A bar, which one column cuts into spaces.
        lines = finished.stderr.splitlines()
        shown = [line for line in lines if line.strip() and b"100%" not in line]
        assert_clean(b"\n".join(shown), is_full)
        assert bool(finished.stdout) == (redirections == "")
        assert result is None or (out / name / result).exists()


@pytest.mark.exhaustive
def test_a_training_whose_reader_ends_is_finished(trained, tmp_path, read_only):
    arguments = [*TRAIN, "--data", trained[0] / "bars.npz", "--out", tmp_path / "run"]
    assert run_without_reader(arguments, read_only, first_lines=1) == (0, b"")
    assert (tmp_path / "run/metrics.json").exists()
