"""Damaged runs: each ends in the right result, in a fallback with a warning, or in one line.

Most cases ask for what a command would compute with: a run's model and images, or the positions
that a training would continue from. Some run the command.
"""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from support import bars, copy_of, flip, make_small_resnet, numbers_of, run_command

from bn_jax import training
from bn_jax.lab import checkpoints, fitting, runs
from bn_jax.lab.errors import CommandError
from bn_jax.lab.files import records
from bn_jax.lab.files.reading import sha256_of_folder
from bn_jax.lab.training import unfinished

EPOCHS = 4
ARMS = (runs.NO_NORM, runs.SYNCHRONIZED)


@pytest.fixture(scope="module")
def home(tmp_path_factory, compile_quickly):
    """Data, a run that was interrupted in its second arm, and the same, resumed and finished."""
    home = tmp_path_factory.mktemp("damage")
    np.savez(home / "bars.npz", **bars())
    save, saved = checkpoints.save_position, []

    def interrupted_save(folder, position, origin):
        save(folder, position, origin)
        saved.append(position)
        if len(saved) == 2 * EPOCHS - 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_model", make_small_resnet)
        patch.setattr(runs, "ARMS", ARMS)
        with pytest.MonkeyPatch.context() as once:
            once.setattr(checkpoints, "save_position", interrupted_save)
            options = ("--epochs", EPOCHS, "--batch-size", 8, "--data", home / "bars.npz")
            code, _, err = run_command("train", *options, "--out", home / "begun")
        assert code == 130, err
        code, _, err = run_command("train", "--resume", copy_of(home / "begun", home / "finished"))
        assert (code, err) == (0, "")
        yield home


@functools.cache
def initial_states():
    """A state of each arm, as a training has it before it restores a position."""
    mesh = training.make_mesh(jax.devices()[:2])
    optimizer = fitting.make_optimizer(0.1, 6 * EPOCHS)
    return {
        arm: training.create_state(make_small_resnet(arm, 3), optimizer, (4, 4, 1), 0, mesh)
        for arm in ARMS
    }


def contents(tree):
    """A tree as something that compares by all its bytes."""
    leaves, structure = jax.tree.flatten(tree)
    return str(structure), tuple(np.asarray(leaf).tobytes() for leaf in leaves)


def used_of_begun(folder):
    """How a resumed training goes on: from which configuration and positions."""
    started = unfinished.read(folder)
    used: dict[str, tuple | None] = {}
    for arm in started.config.arms:
        arm_folder = unfinished.checkpoints_of(folder, arm)
        path = unfinished.newest_usable(arm_folder, records.Origin(run=started, arm=arm))
        if path is None:
            used[arm] = None
        else:
            position = checkpoints.restore_position(path, initial_states()[arm])
            state = {
                name: getattr(position.state, name) for name in ("params", "opt_state", "step")
            }
            used[arm] = (
                path.name,
                contents(state),
                repr(position.rng.bit_generator.state),
                (repr(position.reports)),
            )
    return started, used


def used_of_finished(folder):
    """What a command uses of a finished run."""
    saved = runs.read_run(folder)
    state = runs.restore(saved, training.make_mesh(jax.devices()[:1]))
    images = runs.load_like(saved, None)
    return (
        saved._replace(folder=Path()),
        contents(checkpoints.variables_of(state)),
        contents(images),
    )


USED = {"begun": used_of_begun, "finished": used_of_finished}


def outcome(kind, folder, capsys):
    """What is used of a run, or None and the line that refuses it; and the warnings."""
    capsys.readouterr()
    signal.alarm(60)
    try:
        used, line = USED[kind](folder), None
    except CommandError as error:
        used, line = None, str(error)
        assert error.code == 2 and line and len(line) < 2000
    signal.alarm(0)
    out, err = capsys.readouterr()
    assert out == ""
    warnings = err.splitlines()
    assert all(warning.startswith("bn-jax: warning: ") for warning in warnings), err
    return used, line, warnings


@pytest.fixture(scope="module")
def whole(home):
    """What is used of the runs as they were saved; of the begun one also after fallbacks."""
    started, newest = used_of_begun(home / "begun")
    older = copy_of(home / "begun", home / "older")
    allowed = {arm: [newest[arm]] for arm in ARMS}
    for _ in range(checkpoints.KEPT):
        for arm in ARMS:
            arm_folder = unfinished.checkpoints_of(older, arm)
            for path in checkpoints.positions(arm_folder)[:1]:
                checkpoints._delete(path)
        for arm, used in used_of_begun(older)[1].items():
            allowed[arm].append(used)
    assert all(len(kept) == 3 and kept[-1] is None for kept in allowed.values())
    return {"begun": (started, allowed), "finished": used_of_finished(home / "finished")}


def assert_right(kind, whole, used, line, warnings):
    """Right, a fallback with a warning for each position passed over, or one line."""
    if line is not None:
        assert used is None
        return
    if kind == "finished":
        assert used == whole and warnings == []
        return
    started, allowed = whole
    assert used[0] == started
    passed_over = sum(allowed[arm].index(used[1][arm]) for arm in ARMS)
    assert len(warnings) == passed_over <= 1, warnings


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def few_or_all(few, every):
    return pytest.mark.parametrize(
        "cases", [few, pytest.param(every, marks=pytest.mark.exhaustive)], ids=["few", "all"]
    )


@few_or_all(14, 150)
@pytest.mark.parametrize("kind", USED)
def test_flipped_bits(home, whole, tmp_path, capsys, kind, cases):
    rng = np.random.default_rng(0)
    original = files_of(home / kind)
    outcomes = set()
    # Every file in turn: most bits are in the largest.
    for case in range(max(cases, len(original))):
        path = original[case % len(original)]
        damaged = copy_of(home / kind, tmp_path / "run")
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(damaged / path.relative_to(home / kind), bit)
        found = outcome(kind, damaged, capsys)
        try:
            assert_right(kind, whole[kind], *found)
        except AssertionError as error:
            raise AssertionError(f"bit {bit} of {path}") from error
        outcomes.add("refused" if found[1] else "warned" if found[2] else "right")
        shutil.rmtree(damaged)
    assert outcomes == {"refused", "right", *(["warned"] if kind == "begun" else [])}


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 6))]
)
def test_flipped_bits_and_the_command(home, tmp_path, seed):
    rng = np.random.default_rng(seed)
    for kind, arguments in {"begun": ("train", "--resume"), "finished": ("eval",)}.items():
        path = rng.choice(files_of(home / kind))
        damaged = copy_of(home / kind, tmp_path / kind)
        flip(damaged / path.relative_to(home / kind), int(rng.integers(8 * path.stat().st_size)))
        code, _, err = run_command(*arguments, damaged)
        lines = err.splitlines()
        if code == 0:
            assert all(line.startswith("bn-jax: warning: ") for line in lines) and len(lines) <= 1
            assert kind == "finished" or numbers_of(damaged) == numbers_of(home / "finished")
        else:
            assert (code, len(lines)) == (2, 1) and lines[0].startswith("bn-jax: error: "), err


ODD: list[object] = [
    0, -4, 1, 2, 3, 1.5, 1e-300, 1e300, 10**12, 2**200, -(10**30), True, False, None,
    float("inf"), float("nan"), "", "2", "text", "\x00", "\x1b[2J", "../../etc/passwd", "\ud800",
    [], [[]], [1, 2, 3], [None] * 5, {}, {"a": {"b": []}}, {"": 0}, "x" * 3000, [0] * 3000,
    runs.NO_NORM, runs.PER_DEVICE, "0" * 64,
]  # fmt: skip


def paths_in(values, path=()):
    """The places in JSON at which a value can be put."""
    inside = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in inside:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths_in(value, (*path, key))


def put(values, path, value):
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value


def seal_again(path, values):
    """Seals a file with its odd value, as only somebody who means it does."""
    if path.name == "config.json":
        values.pop("sha256", None)
        path.write_bytes(records._as_text(values | {"sha256": records._digest(values)}))
    elif path.name == "metrics.json":
        path.write_text(json.dumps(records.seal_metrics(values)))
    elif path.name == "position.json":
        path.parent.with_suffix(".sha256").write_text(sha256_of_folder(path.parent))
    else:
        metrics = path.parents[1] / "metrics.json"
        facts = json.loads(metrics.read_text())
        facts["checkpoint_sha256"] = sha256_of_folder(path.parent)
        metrics.write_text(json.dumps(records.seal_metrics(facts)))


@few_or_all(14, 100)
@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("sealed", [False, True], ids=["damaged", "on purpose"])
def test_odd_values(home, whole, tmp_path, capsys, kind, sealed, cases):
    rng = np.random.default_rng(1)
    original = [path for path in files_of(home / kind) if path.read_bytes()[:1] == b"{"]
    assert len(original) == (5 if kind == "begun" else 3)
    for case in range(cases):
        path = original[case % len(original)]
        damaged = copy_of(home / kind, tmp_path / "run") / path.relative_to(home / kind)
        values = json.loads(damaged.read_text())
        places = list(paths_in(values))
        # Those near the root decide more.
        place = min((places[index] for index in rng.integers(len(places), size=3)), key=len)
        value = ODD[rng.integers(len(ODD))]
        put(values, place, value)
        damaged.write_text(json.dumps(values))
        if sealed:
            seal_again(damaged, values)
        try:
            found = outcome(kind, tmp_path / "run", capsys)
            if not sealed:
                assert_right(kind, whole[kind], *found)
        except Exception as error:
            raise AssertionError(f"{value!r} at {place} of {path}") from error
        shutil.rmtree(tmp_path / "run")


def replace(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


KINDS = {
    "a pipe": replace(os.mkfifo),
    "a folder": replace(os.mkdir),
    "a link to a device": replace(lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": replace(lambda path: path.symlink_to("nothing")),
    "a link to itself": replace(lambda path: path.symlink_to(path.name)),
    "a terabyte": lambda path: os.truncate(path, 2**40),
    "nothing": replace(lambda path: None),
    "an empty file": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.skipif(os.name == "nt", reason="the files are those of POSIX")
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage, id=name, marks=[pytest.mark.exhaustive] if position % 3 else [])
        for position, (name, damage) in enumerate(KINDS.items())
    ],
)
@pytest.mark.parametrize("kind", USED)
def test_odd_files(home, whole, tmp_path, capsys, kind, damage):
    for path in files_of(home / kind):
        damaged = copy_of(home / kind, tmp_path / "run")
        damage(damaged / path.relative_to(home / kind))
        found = outcome(kind, damaged, capsys)
        missing = "config.json is missing; the run continues with the copy of it in"
        if path.name == "config.json" and found[2] and missing in found[2][0]:
            found = (*found[:2], found[2][1:])
        try:
            assert_right(kind, whole[kind], *found)
        except AssertionError as error:
            raise AssertionError(str(path)) from error
        shutil.rmtree(damaged)


def test_the_test_part_of_another_run_is_refused(home, tmp_path, capsys):
    damaged = copy_of(home / "finished", tmp_path / "run")
    with np.load(damaged / "test.npz") as arrays:
        np.savez_compressed(damaged / "test.npz", x=arrays["x"], y=arrays["y"][::-1])
    _, line, _ = outcome("finished", damaged, capsys)
    assert "test.npz is damaged (its SHA-256 is not the one in metrics.json)" in line


def test_a_checkpoint_of_another_model_is_named(home, tmp_path, capsys):
    """What metrics of version 0.2.0, which are not sealed, may say of it."""
    damaged = copy_of(home / "finished", tmp_path / "run")
    whole = json.loads((damaged / "metrics.json").read_text())
    del whole["sha256"], whole["test_sha256"]
    other = ({"synchronized batch norm", "no normalization"} - {whole["best_arm"]}).pop()
    for change, message in {
        ("data", "num_classes", 4): "(3,) at ['params']['classifier']['bias'], expected float32 (4",
        ("data", "image_shape", (4, 4, 2)): "expected float32 (3, 3, 2, 4)",
        ("best_arm", other): " at ['",
    }.items():
        metrics = json.loads(json.dumps(whole))
        put(metrics, change[:-1], change[-1])
        (damaged / "metrics.json").write_text(json.dumps(metrics))
        _, line, _ = outcome("finished", damaged, capsys)
        assert "checkpoint does not hold the model that metrics.json describes" in line
        assert message in line, line


def copy_position(path, copied):
    for old in (copied, copied.with_suffix(".sha256")):
        if old.is_dir():
            shutil.rmtree(old)
    shutil.copytree(path, copied)
    shutil.copyfile(path.with_suffix(".sha256"), copied.with_suffix(".sha256"))


def change_seed(path):
    values = json.loads((path / "position.json").read_text())
    values["origin"]["run"]["config"]["seed"] += 1
    (path / "position.json").write_text(json.dumps(values))
    seal_again(path / "position.json", values)


# Where a position is put in place of the newest one of the second arm, and what is said of it.
ELSEWHERE = {
    "arm": (lambda arm: copy_position(arm.parent / "no-normalization/4", arm / "4"), "another arm"),
    "run": (lambda arm: change_seed(arm / "3"), "another run"),
    "epoch": (lambda arm: copy_position(arm / "3", arm / "9"), "another epoch"),
}


@pytest.mark.parametrize(("put_there", "message"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_position_of_elsewhere_is_passed_over(home, whole, tmp_path, capsys, put_there, message):
    damaged = copy_of(home / "begun", tmp_path / "run")
    put_there(unfinished.checkpoints_of(damaged, runs.SYNCHRONIZED))
    (started, used), line, (warning,) = outcome("begun", damaged, capsys)
    assert line is None and started == whole["begun"][0]
    assert f"is of {message}" in warning
    assert used[runs.SYNCHRONIZED] in whole["begun"][1][runs.SYNCHRONIZED]


def test_a_configuration_is_restored_only_if_all_checkpoints_agree(home, whole, tmp_path, capsys):
    damaged = copy_of(home / "begun", tmp_path / "run")
    config = damaged / "checkpoints/config.json"
    flip(config, 8 * config.read_bytes().index(b'"seed": 0') + 8 * 8)
    _, line, _ = outcome("begun", damaged, capsys)
    assert "config.json is damaged or was edited" in line
    assert "remove the file to continue with the copy of it in " in line
    # The advice, followed.
    config.unlink()
    (started, _), _, (warning,) = outcome("begun", damaged, capsys)
    assert started == whole["begun"][0] and "continues with the copy of it in" in warning
    change_seed(unfinished.checkpoints_of(damaged, runs.SYNCHRONIZED) / "3")
    _, line, _ = outcome("begun", damaged, capsys)
    assert "is not an unfinished run (FileNotFoundError" in line
