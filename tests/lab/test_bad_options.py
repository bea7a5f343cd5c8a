"""Bad options: one line, exit 2, before anything is imported or left behind."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import small_disk

from bn_jax.lab import command
from bn_jax.lab.console import arguments
from bn_jax.lab.distributed import launchers
from bn_jax.lab.errors import CommandError

LINUX = pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is that of Linux")


def refusal(action, *given):
    """The one line about an argument, which is bad input."""
    with pytest.raises(CommandError) as caught:
        action(*given)
    assert caught.value.code == 2
    return str(caught.value)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full/file").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("/nonexistent/folder")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


NO_FOLDERS = {
    "file": "is a file, expected a new folder; choose another name",
    "file/in": "cannot be made (Not a directory); choose another folder",
    "full": "exists and is not empty; choose another name or remove it",
    "dangling": "is a link to nothing, expected a new folder; choose another name or remove it",
    "dangling/in/it": "dangling is a link to nothing",
    "loop": "is a link to nothing",
    "loop/in": "loop is a link to nothing",
    "n" * 300: "cannot be made (File name too long)",
    "missing/" + "n" * 300: "cannot be made (File name too long)",
    ".": "received ., the current folder, expected a new one; choose a name",
    "": "received ., the current folder",
    "empty/..": "received empty/.., the current folder",
    "nul\0": "cannot be made (embedded null",
    "\udcff": "cannot be made ('utf-8' codec can't encode",
    "\udcff/in": "cannot be made ('utf-8' codec can't encode",
}


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_folder_that_cannot_be_made(here, name):
    before = names(here)
    line = refusal(arguments.new_folder, Path(name))
    assert line.startswith("--out: ") and NO_FOLDERS[name] in line
    assert names(here) == before


@LINUX
@pytest.mark.parametrize("name", ["/proc/run", "/proc/self/run/a", "/sys/run"])
def test_a_folder_that_the_system_does_not_make(name):
    # Root may write there, as os.access says; the system makes no folders there all the same.
    line = refusal(arguments.new_folder, Path(name))
    assert line.startswith(f"--out: {name} cannot be made (")
    line = refusal(arguments.new_picture, Path(f"{name}.png"))
    assert line.startswith(f"--plot: {name}.png cannot be made (")


def test_a_disk_that_cannot_be_written(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as remount:
        remount("ro")
        for name in ("disk/run", "disk/a/b"):
            line = refusal(arguments.new_folder, tmp_path / name)
            assert line.endswith("cannot be made (Read-only file system); choose another folder")
        line = refusal(arguments.new_file, tmp_path / "disk/file", tmp_path)
        assert "cannot be made (Read-only file system), expected a new file in a folder" in line


@pytest.mark.parametrize("name", ["new", "a/b/c", "empty", "missing/../new", "ordner-ß", "n" * 250])
def test_a_folder_that_can_be_made_is_not_made_yet(here, name):
    before = names(here)
    assert arguments.new_folder(Path(name)) == Path(name)
    assert names(here) == before
    Path(name).mkdir(parents=True, exist_ok=True)


NO_FILES = {
    "file": "file exists; choose another name or remove it",
    "full": "full exists",
    "dangling": "dangling exists",
    "loop": "loop exists",
    "file/in": "cannot be made (Not a directory), expected a new file in a folder that exists",
    "missing/in": "cannot be made (No such file or directory), expected",
    "n" * 300: "cannot be made (File name too long), expected",
    "nul\0": "cannot be made (embedded null",
    "\udcff": "cannot be made ('utf-8' codec can't encode",
}


@pytest.mark.parametrize("name", NO_FILES)
def test_a_file_that_cannot_be_made(here, name):
    before = names(here)
    line = refusal(arguments.new_file, Path(name), here)
    assert line.startswith("--out: ") and NO_FILES[name] in line
    assert names(here) == before
    assert arguments.new_file(Path("full/new"), here) == Path("full/new")
    assert names(here) == before


@pytest.mark.parametrize("rate", [1e300, 1e39, 1e-300, 1e-39, 0.0, -0.1, float("nan")])
def test_a_learning_rate_that_float32_does_not_hold(rate):
    line = refusal(arguments.check_learning_rate, rate)
    assert line.startswith(f"--learning-rate: received {rate}, expected a positive number that fl")
    arguments.check_learning_rate(1e-30)
    arguments.check_learning_rate(1e30)


# --- processes ----------------------------------------------------------------------------------

ADDRESSES = {
    "127.0.0.1:٣٤٥٦": "expected HOST:PORT, in ASCII, with a port from 1 to 65535; give the address",
    "127.0.0.1:+345": "expected HOST:PORT",
    "127.0.0.1: 345": "expected HOST:PORT",
    "127.0.0.1:3_45": "expected HOST:PORT",
    "127.0.0.1:345\n": "expected HOST:PORT",
    "127.0.0.1:" + "0" * 5000 + "1": "expected HOST:PORT",
    "127.0.0.1:0": "expected HOST:PORT",
    "127.0.0.1:65536": "expected HOST:PORT",
    "::1:1234": "expected HOST:PORT",
    "[::1:1234": "expected HOST:PORT",
    "[]:1234": "expected HOST:PORT",
    "bücher:1234": "expected HOST:PORT",
    "two words:1234": "expected HOST:PORT",
    "nowhere.invalid:1234": "whose host nowhere.invalid cannot be found (",
    "http://127.0.0.1:1234": "expected HOST:PORT",
    "a..b:1234": "whose host a..b cannot be found (",
    "[::zz]:1234": "whose host ::zz cannot be found (",
    "x" * 300 + ":1234": "cannot be found (",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_no_process_can_have(address):
    line = refusal(launchers.check_launch, address, 2, 1)
    assert line.startswith(f"--coordinator: received {address}") and ADDRESSES[address] in line


@pytest.mark.parametrize("address", ["127.0.0.1:1234", "localhost:1", "[::1]:65535"])
def test_an_address_of_process_0(address):
    assert launchers.check_launch(address, 2, 1) == launchers.Launch(2, address, 1)


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_a_port_in_use_is_refused(host):
    with socket.create_server((host, 0)) as used:
        address = f"127.0.0.1:{used.getsockname()[1]}"
        line = refusal(launchers.check_launch, address, 2, 0)
        assert line.startswith(f"--coordinator: received {address}, but process 0 cannot listen at")
        assert line.endswith("ddress already in use), expected a free port; choose another")
        # Where the port is in use by process 0.
        assert launchers.check_launch(address, 2, 1).processes == 2
    assert launchers.check_launch(address, 2, 0).processes == 2


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": ""}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4"}, 4),
        ({"SLURM_NTASKS": "4"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1,c:1", "TPU_WORKER_HOSTNAMES": "a,b"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4),
        ({"PMI_SIZE": "1"}, 1),
    ],
)
def test_launchers_that_jax_recognizes(variables, number):
    assert launchers.launched_processes(variables) == number


@pytest.mark.parametrize("count", ["two", "0", "-1", " 2", "2_0", "٢", "9" * 5000, "4294967296"])
@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"])
def test_launchers_that_set_no_number(variable, count):
    line = refusal(launchers.launched_processes, {variable: count})
    assert line.startswith(
        f"{variable}: received {count!r}, expected a number from 1 to 2147483647"
    )


def test_a_launcher_that_jax_does_not_recognize():
    assert refusal(launchers.launched_processes, {"PMI_SIZE": "2"}) == (
        "PMI_SIZE is 2, set by a launcher that JAX does not recognize; give --coordinator, "
        "--num-processes and --process-id, or unset it to train with one process"
    )


@pytest.mark.parametrize("variable", ["JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"])
def test_addresses_in_the_environment(monkeypatch, variable):
    monkeypatch.setenv(variable, "127.0.0.1:٣")
    line = refusal(launchers.check_launch, "127.0.0.1:1234", 2, 1)
    assert line.startswith(f"{variable}: received 127.0.0.1:")


# --- the command --------------------------------------------------------------------------------

HEAVY = ("jax", "numpy", "orbax", "sklearn")
PROGRAM = f"""
import sys
from bn_jax.lab.command import main
try:
    main()
finally:
    print(sorted(set({HEAVY!r}) & sys.modules.keys()))
"""
MANY = "1" + 30 * "0"
AT_ONCE = [
    ("--epochs", MANY),
    ("--batch-size", MANY),
    ("--devices", MANY),
    ("--seed", MANY),
    ("--learning-rate", "1e-300"),
    ("--out", "dangling"),
    ("--coordinator", "127.0.0.1:٣٤٥٦", "--num-processes", "1", "--process-id", "0"),
    ("--num-processes", MANY, "--process-id", "1", "--coordinator", "127.0.0.1:3456"),
]


@pytest.mark.parametrize("options", AT_ONCE)
def test_bad_options_are_refused_at_once(here, options):
    before = names(here)
    root = Path(command.__file__).parents[2]
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, "train", *options],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert (finished.returncode, finished.stdout) == (2, "[]\n"), finished.stderr
    assert finished.stderr.startswith(f"bn-jax: error: {options[0]}: ")
    assert finished.stderr.count("\n") == 1
    assert names(here) == before
