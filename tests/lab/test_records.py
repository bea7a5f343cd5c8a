"""The JSON files of runs: each value that they must not hold, and each file that is none."""

import copy
import json
import os
import re
import signal
from typing import Any

import pytest

from bn_jax.lab.files import reading, records
from bn_jax.lab.files.records import Config, Metrics, Origin, SavedPosition, Started

CONFIG = {
    "data": "images.npz",
    "devices": 2,
    "epochs": 3,
    "batch_size": 64,
    "learning_rate": 0.1,
    "seed": 0,
    "arms": list(records.ARMS),
    "model": "small",
}
STARTED = {"config": CONFIG, "data_file": "/images.npz", "data_sha256": "0" * 64}
CURVES = {
    "step": [5, 6],
    "loss": [0.5, None],
    "accuracy": [0.5, 1.0],
    "validation_loss": [1.0, 2.0],
    "validation_accuracy": [0.0, 1.0],
}
ARM = {
    "test_accuracy": 0.9,
    "test_correct": 9,
    "steps_to_90_percent_validation_accuracy": None,
    "examples_per_second": 100.0,
    "curves": CURVES,
}
METRICS: dict[str, Any] = {
    "config": CONFIG,
    "data": {
        "examples": {"train": 100, "validation": 10, "test": 20},
        "image_shape": [8, 8, 1],
        "num_classes": 10,
        "mean": 4.0,
        "std": 6.0,
    },
    "arms": {arm: ARM for arm in records.ARMS},
    "best_arm": records.SYNCHRONIZED,
    "checkpoint_sha256": "1" * 64,
    "test_sha256": "2" * 64,
}
EVALUATION = [0.5, 1.0, 3, 3]
POSITION = {
    "origin": {"run": STARTED, "arm": records.NO_NORM},
    "rng": {
        "bit_generator": "PCG64",
        "state": {"state": 2**127, "inc": 1},
        "has_uint32": 0,
        "uinteger": 0,
    },
    "reports": [[5, 1, EVALUATION, [float("nan"), 0.0, 0, 3], 40, 0.5]],
}
HUGE = 10**12

# Where, which value, and what the line says of it.
BAD_CONFIGS = [
    ("devices", 0, "received 0, expected a value greater than or equal to 1"),
    ("devices", 3, "expected a batch size, 64, that the number of devices, 3, divides"),
    ("devices", True, "received True, expected a valid integer"),
    ("devices", 2.0, "received 2.0, expected a valid integer"),
    ("devices", "2", "received '2', expected a valid integer"),
    ("devices", HUGE, f"received {HUGE}, expected a value less than or equal to 2147483647"),
    ("epochs", -1, "received -1, expected a value greater than"),
    ("epochs", None, "received None, expected a valid integer"),
    ("batch_size", -4, "received -4, expected a value greater than"),
    ("batch_size", 1e12, "received 1000000000000.0, expected a valid integer"),
    ("learning_rate", 0.0, "received 0.0, expected a value greater than 0"),
    ("learning_rate", float("inf"), "received inf, expected a finite number"),
    ("learning_rate", float("nan"), "received nan, expected a finite number"),
    ("learning_rate", [0.1], "received [0.1], expected a valid number"),
    ("seed", 2**32, "received 4294967296, expected a value less than or equal to 4294967295"),
    ("seed", 10**400, "expected a value less than or equal to 4294967295"),
    ("arms", [], "received [], expected some of no normalization, per-device batch norm"),
    ("arms", ["no norm"], "received ['no norm'], expected some of no normalization"),
    ("arms", [records.NO_NORM] * 2, "expected some of no normalization"),
    ("arms", list(records.ARMS[::-1]), "in this order"),
    ("arms", records.NO_NORM, "received 'no normalization', expected a valid tuple"),
    ("model", "big", "received 'big', expected one of small, tiny, resnet18, mlp"),
    ("model", {"a": "b"}, "received {'a': 'b'}, expected a valid string"),
    ("data", 5, "received 5, expected a valid string"),
    ("momentum", 0.9, "received 0.9, expected no such key; another version of bn-jax may have"),
]
BAD_METRICS = [
    ("data.std", 0, "received 0, expected a value greater than 0"),
    ("data.std", float("nan"), "received nan, expected a finite number"),
    ("data.mean", float("-inf"), "received -inf, expected a finite number"),
    ("data.num_classes", 1, "received 1, expected a value greater than or equal to 2"),
    ("data.num_classes", HUGE, "expected num_classes, 1000000000000, to be at most the number of"),
    ("data.image_shape", [8, 8], "data.image_shape.2 is missing"),
    ("data.image_shape", [8, 0, 1], "received [8, 0, 1], expected [H, W, C] of at most"),
    ("data.image_shape", [HUGE, HUGE, 1], "expected [H, W, C] of at most 268,435,456 numbers"),
    ("data.image_shape", [8, 8, 1.5], "received 1.5, expected a valid integer"),
    ("data.examples.train", 0, "received 0, expected a value greater than"),
    ("data.examples", 130, "received 130, expected a valid dictionary"),
    ("config.batch_size", 128, "expected config.batch_size, 128, to be from 4 to 100 for 100"),
    ("best_arm", "none", "received 'none', expected one of no normalization, per-device"),
    ("best_arm", None, "received None, expected a valid string"),
    ("config.arms", [records.NO_NORM], "expected best_arm, 'synchronized batch norm', to be one"),
    ("checkpoint_sha256", "1" * 63, "expected 64 hexadecimal digits"),
    ("test_sha256", "G" * 64, "expected 64 hexadecimal digits"),
    ("folded", "yes", "received 'yes', expected a valid dictionary"),
    ("arms.no normalization.test_accuracy", 1.5, "received 1.5, expected a value less than or"),
    ("arms.no normalization.curves.loss", [1.0, "a"], "received 'a', expected a valid number"),
    ("arms.no normalization.curves.step", [5], "expected curves of the same length"),
    ("arms.no normalization.examples_per_second", 0.0, "received 0.0, expected a value greater"),
    ("arms.another", ARM, "received 'another', expected one of no normalization"),
]
BAD_POSITIONS = [
    ("origin.arm", "another", "received 'another', expected one of no normalization"),
    ("origin.run.config.devices", 0, "received 0, expected a value greater"),
    ("rng.bit_generator", "MT19937", "received 'MT19937', expected 'PCG64'"),
    ("rng.state.state", 2**128, "expected a value less than"),
    ("rng.state.inc", -1, "received -1, expected a value greater than or equal to 0"),
    ("rng.has_uint32", 2, "received 2, expected a value less than or equal to 1"),
    ("reports", [], "received [], List should have at least 1 item"),
    ("reports", [[0, 1, EVALUATION, EVALUATION, 1, 1.0]], "received 0, expected a value greater"),
    ("reports", [[5, 1, EVALUATION, EVALUATION, 1]], "reports.0.5 is missing"),
    ("reports", [[5, 1, [0.5, 2.0, 3, 3], EVALUATION, 1, 1.0]], "received 2.0, expected a value"),
]


def put(values, path, value):
    """A copy of JSON with another value at a path; a list that is given as it is a key."""
    changed = copy.deepcopy(values)
    *around, name = path.split(".")
    inside = changed
    for key in around:
        inside = inside[key]
    inside[name] = value
    return changed


def started_with(path, changes):
    values = STARTED | {"config": CONFIG | changes}
    path.write_text(json.dumps(values | {"sha256": records._digest(values)}, indent=2) + "\n")


def problem_of(read, path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(path)
    message = str(caught.value)
    assert len(message) < 500 and "\n" not in message, message
    return message


@pytest.mark.parametrize(("key", "value", "message"), BAD_CONFIGS)
def test_a_bad_value_of_a_configuration_is_named(tmp_path, key, value, message):
    path = tmp_path / "config.json"
    # Sealed, so that it is the value which is refused.
    started_with(path, {key: value})
    assert "config" in (said := problem_of(records.read_started, path)) and message in said
    assert key in said or "divides" in said
    metrics = METRICS | {"config": CONFIG | {key: value}}
    (tmp_path / "metrics.json").write_text(json.dumps(records.seal_metrics(metrics)))
    with pytest.raises(ValueError, match=re.escape(message)):
        records.read_metrics(tmp_path)


@pytest.mark.parametrize(("key", "value", "message"), BAD_METRICS)
def test_a_bad_value_of_metrics_is_named(tmp_path, key, value, message):
    metrics = records.seal_metrics(put(METRICS, key, value))
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    said = problem_of(lambda path: records.read_metrics(tmp_path), tmp_path / "metrics.json")
    assert message in said
    assert key.split(".")[-1] in said or "curves" in said


@pytest.mark.parametrize(("key", "value", "message"), BAD_POSITIONS)
def test_a_bad_value_of_a_position_is_named(tmp_path, key, value, message):
    path = tmp_path / "position.json"
    path.write_text(json.dumps(put(POSITION, key, value)))
    said = problem_of(records.read_position, path)
    assert message in said and key.split(".")[0] in said


def keys_of(values, path=()):
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*path, key))


OPTIONAL = {"arms", "model", "test_sha256", *records.ARMS}


@pytest.mark.parametrize(
    ("record", "values"), [(Started, STARTED), (Metrics, METRICS), (SavedPosition, POSITION)]
)
def test_every_key_is_needed(tmp_path, record, values):
    assert record.model_validate(values)
    for path in keys_of(values):
        changed = json.loads(json.dumps(values))
        inside = changed
        for key in path[:-1]:
            inside = inside[key]
        del inside[path[-1]]
        if path[-1] in OPTIONAL and path != ("arms",):
            assert record.model_validate(changed)
        else:
            with pytest.raises(ValueError, match=re.escape(f"{'.'.join(path)} is missing")):
                records._validate(record, changed, tmp_path)


def test_what_is_written_is_read(tmp_path):
    started = Started.model_validate(STARTED)
    records.write_started(tmp_path / "config.json", started)
    assert records.read_started(tmp_path / "config.json") == started
    assert started.config == Config.model_validate(CONFIG)
    position = records._validate(SavedPosition, POSITION, tmp_path)
    assert position.origin == Origin(run=started, arm=records.NO_NORM)
    assert position.rng.model_dump() == POSITION["rng"]


def test_a_run_of_the_first_version_is_read(tmp_path):
    old = copy.deepcopy(METRICS)
    del old["test_sha256"], old["config"]["arms"], old["config"]["model"]
    (tmp_path / "metrics.json").write_text(json.dumps(old | {"versions": {"jax": "0.9.0"}}))
    metrics, values = records.read_metrics(tmp_path)
    assert (metrics.config.arms, metrics.config.model) == (records.ARMS, "small")
    assert metrics.test_sha256 is None and values["versions"] == {"jax": "0.9.0"}


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_bit_of_a_configuration_is_sealed(tmp_path, every):
    path = tmp_path / "config.json"
    # In its shortest form the learning rate has a letter, of which a flipped bit is the capital.
    config = Config.model_validate(CONFIG | {"learning_rate": 1e-05})
    started = Started.model_validate(STARTED | {"config": config})
    records.write_started(path, started)
    whole = path.read_bytes()
    assert b"1e-05" in whole
    for bit in range(0, 8 * len(whole), every):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        problem_of(records.read_started, path)


def test_readers_may_add_to_metrics_and_not_change_what_decides(tmp_path):
    path = tmp_path / "metrics.json"
    sealed = records.seal_metrics(METRICS)
    path.write_text(json.dumps(sealed | {"note": "the third attempt"}, indent=1))
    assert records.read_metrics(tmp_path)[1]["note"] == "the third attempt"
    for key, value in {
        "config.seed": 8,
        "config.learning_rate": 8.1,
        "data.mean": 4.5,
        "data.image_shape": [8, 9, 1],
        "data.num_classes": 11,
        "best_arm": records.PER_DEVICE,
        "checkpoint_sha256": "3" * 64,
        "test_sha256": None,
        "folded": {},
        "sha256": "0" * 64,
    }.items():
        path.write_text(json.dumps(put(sealed, key, value)))
        said = problem_of(lambda _: records.read_metrics(tmp_path), path)
        assert "is damaged or was edited" in said


def make_terabyte(path):
    path.touch()
    os.truncate(path, 2**40)


# What may be there instead of a JSON file, and what is said of it.
NO_JSON = {
    "a pipe": (os.mkfifo, "is a pipe, expected a regular file"),
    "a folder": (os.mkdir, "is a folder, expected a regular file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, expected"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "nothing": (lambda path: None, "No such file"),
    "an empty file": (lambda path: path.touch(), "cannot be read as JSON (Expecting value"),
    "a terabyte": (make_terabyte, "has more than "),
    "no UTF-8": (lambda path: path.write_bytes(b'"\xff"'), "cannot be read as JSON ('utf-8' codec"),
    "UTF-16": (lambda path: path.write_text("{}", "utf-16"), "cannot be read as JSON ('utf-8' co"),
    "a mark": (lambda path: path.write_text("{}", "utf-8-sig"), "cannot be read as JSON (Unexpec"),
    "a list": (lambda path: path.write_text("[]"), "expected a valid dictionary"),
    "a number": (lambda path: path.write_text("1"), "received 1, expected a valid dictionary"),
    "many digits": (lambda path: path.write_text("1" * 5000), "cannot be read as JSON (Exceeds"),
    "a key twice": (
        lambda path: path.write_text('{"config": 1, "config": 1}'),
        "cannot be read as JSON (key 'config' is given twice)",
    ),
    "deep": (lambda path: path.write_text("[" * 30000), "cannot be read as JSON (it is nested"),
    "torn": (lambda path: path.write_text(json.dumps(METRICS)[:-40]), "cannot be read as JSON ("),
    "an escape": (lambda path: path.write_text('{"\\u001b[2J": 1}'), "is missing"),
}


@pytest.mark.skipif(os.name == "nt", reason="the files are those of POSIX")
@pytest.mark.parametrize(("make", "message"), NO_JSON.values(), ids=NO_JSON)
@pytest.mark.parametrize("reader", ["started", "metrics", "position"])
def test_a_file_that_is_no_json_is_named_at_once(tmp_path, make, message, reader):
    read = {
        "started": records.read_started,
        "metrics": lambda path: records.read_metrics(path.parent),
        "position": records.read_position,
    }[reader]
    make(tmp_path / "metrics.json")
    signal.alarm(20)
    with pytest.raises((ValueError, OSError)) as caught:
        read(tmp_path / "metrics.json")
    signal.alarm(0)
    assert message in str(caught.value)
    assert "metrics.json" in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_folder_with_links_has_no_digest(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside/file").write_bytes(b"1")
    (tmp_path / ".hidden").symlink_to("/dev/zero")
    digest = reading.sha256_of_folder(tmp_path)
    assert digest == reading.sha256_of_folder(tmp_path) != reading.sha256_of_folder(tmp_path / "no")
    for kind, make in {
        "link": lambda path: path.symlink_to("inside/file"),
        "folder": lambda path: path.symlink_to("/proc"),
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
    }.items():
        make(tmp_path / kind)
        with pytest.raises(ValueError, match=f"{kind} is a (link|pipe), expected a regular file"):
            reading.sha256_of_folder(tmp_path)
        (tmp_path / kind).unlink()
    os.truncate(tmp_path / "inside/file", 2**33)
    with pytest.raises(ValueError, match="file has more than 4,294,967,296 bytes"):
        reading.sha256_of_folder(tmp_path)
