"""The JSON files of runs: what they may hold, read without trust, and sealed.

A seal is the key `sha256` of a file: a digest of what decides. It reveals damage. It is no
signature: who changes a file on purpose can also seal it again.
"""

import hashlib
import json
import math
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
from pydantic import AfterValidator, ConfigDict, Field

from bn_jax.lab.console.arguments import are_distinct_names
from bn_jax.lab.console.choices import ARMS, MODELS, NO_NORM, PER_DEVICE, SYNCHRONIZED
from bn_jax.lab.files.reading import read_bytes, read_json

__all__ = [
    "ARMS",
    "MODELS",
    "NO_NORM",
    "PER_DEVICE",
    "SYNCHRONIZED",
    "Config",
    "Metrics",
    "Origin",
    "SavedPosition",
    "Started",
    "batch_sizes",
    "read_metrics",
    "read_position",
    "read_started",
    "seal_metrics",
    "write_started",
]

SEAL = "sha256"
# A report takes some 200 bytes, and every fifth step makes one.
MOST_BYTES_OF_REPORTS = 2**28
MOST_BYTES_OF_CONFIG = 2**16
MOST_PIXELS = 2**28


def _check_arms(arms: tuple[str, ...]) -> tuple[str, ...]:
    if not arms or arms != tuple(arm for arm in ARMS if arm in arms):
        raise ValueError(f"expected some of {', '.join(ARMS)}, in this order")
    return arms


def _check_model(model: str) -> str:
    if model not in MODELS:
        raise ValueError(f"expected one of {', '.join(MODELS)}")
    return model


def _check_arm(arm: str) -> str:
    if arm not in ARMS:
        raise ValueError(f"expected one of {', '.join(ARMS)}")
    return arm


def _check_sha256(digest: str) -> str:
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError("expected 64 hexadecimal digits")
    return digest


def _check_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if not 1 <= min(shape) <= math.prod(shape) <= MOST_PIXELS:
        raise ValueError(f"expected [H, W, C] of at most {MOST_PIXELS:,} numbers")
    return shape


def _check_names(names: tuple[str, ...]) -> tuple[str, ...]:
    if not are_distinct_names(names):
        raise ValueError("expected different names without control characters")
    return names


# JSON has lists for tuples. Everything else must have the type that is written here.
Arm = Annotated[str, AfterValidator(_check_arm)]
Arms = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_arms)]
Model = Annotated[str, AfterValidator(_check_model)]
Shape = Annotated[tuple[int, int, int], Field(strict=False), AfterValidator(_check_shape)]
ClassNames = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_names)]
Sha256 = Annotated[str, AfterValidator(_check_sha256)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegative = Annotated[int, Field(ge=0, le=2**63 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
# That of an arm that diverged is no finite number.
Loss = Annotated[float, Field(allow_inf_nan=True)]
Seconds = Annotated[float, Field(ge=0)]
Part128 = Annotated[int, Field(ge=0, le=2**128 - 1)]

# The fields of `bn_jax.training.Evaluation` and `fitting.Report`, in their order.
EvaluationFields = Annotated[tuple[Loss, Share, NotNegative, NotNegative], Field(strict=False)]
ReportFields = Annotated[
    tuple[Count, Count, EvaluationFields, EvaluationFields, NotNegative, Seconds],
    Field(strict=False),
]


class _Record(pydantic.BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class Config(_Record):
    """The options of a run, with their defaults filled in.

    A key that is not listed here is an error: it may be an option of another version, which
    decides about the run.

    Attributes:
        data: the user's file as given; None for scikit-learn's digits.
        devices: in all processes.
        epochs: passes over the training part.
        batch_size: examples in a step, over all devices.
        learning_rate: the highest rate of SGD.
        seed: of the split, the parameters and the order of the examples.
        arms: what is trained, of `ARMS` and in their order.
        model: one of `MODELS`.
    """

    model_config = ConfigDict(extra="forbid")

    data: str | None
    devices: Count
    epochs: Count
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0)]
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    arms: Arms = ARMS
    model: Model = "small"

    @pydantic.model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.batch_size % self.devices:
            raise ValueError(
                f"expected a batch size, {self.batch_size}, that the number of devices, "
                f"{self.devices}, divides"
            )
        return self

    def as_json(self) -> dict[str, Any]:
        """Returns the options as JSON holds them."""
        return self.model_dump(mode="json")


class Started(_Record):
    """How a run was started: what decides each of its steps.

    Attributes:
        config: the options.
        data_file: the absolute path of its data; None for scikit-learn's digits.
        data_sha256: of its data.
    """

    model_config = ConfigDict(extra="forbid")

    config: Config
    data_file: str | None
    data_sha256: Sha256


class Origin(_Record):
    """Where a position comes from; it resumes nothing else.

    Attributes:
        run: how its run was started.
        arm: which is trained.
    """

    run: Started
    arm: Arm


class _Pcg64(_Record):
    state: Part128
    inc: Part128


class _Generator(_Record):
    bit_generator: Literal["PCG64"]
    state: _Pcg64
    has_uint32: Annotated[int, Field(ge=0, le=1)]
    uinteger: Annotated[int, Field(ge=0, le=2**32 - 1)]


class SavedPosition(_Record):
    """What a position holds beside its arrays.

    Attributes:
        origin: the run and the arm.
        rng: the state of the generator of the order of examples.
        reports: all reports so far, at least one.
    """

    origin: Origin
    rng: _Generator
    reports: Annotated[list[ReportFields], Field(min_length=1)]


class _Examples(_Record):
    train: Count
    validation: Count
    test: Count


class _Data(_Record):
    examples: _Examples
    image_shape: Shape
    num_classes: Annotated[int, Field(ge=2)]
    class_names: ClassNames | None = None
    mean: float
    std: Annotated[float, Field(gt=0)]

    @pydantic.model_validator(mode="after")
    def _check_classes(self) -> Self:
        present = self.examples.train + self.examples.validation + self.examples.test
        if self.num_classes > present:
            raise ValueError(
                f"expected num_classes, {self.num_classes}, to be at most the number of examples, "
                f"{present}"
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"expected as many class_names, {len(self.class_names)}, as num_classes, "
                f"{self.num_classes}"
            )
        return self


class _Curves(_Record):
    step: list[Count]
    loss: list[float | None]
    accuracy: list[Share]
    validation_loss: list[float | None]
    validation_accuracy: list[Share]

    @pydantic.model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len({len(values) for _, values in self}) > 1:
            raise ValueError("expected curves of the same length")
        return self


class _ArmMetrics(_Record):
    test_accuracy: Share
    test_correct: NotNegative
    steps_to_90_percent_validation_accuracy: Count | None
    examples_per_second: Annotated[float, Field(gt=0)]
    curves: _Curves


class Metrics(_Record):
    """What commands read of `metrics.json`. Other keys are ignored: who reads a run may add some.

    Attributes:
        config: the options.
        data: facts about the data.
        best_arm: whose model is saved.
        checkpoint_sha256: of the folder `checkpoint`.
        test_sha256: of `test.npz`; None in runs of version 0.2.0.
        arms: the results of each arm.
        folded: what `bn-jax fold` adds; None for other models.
    """

    config: Config
    data: _Data
    best_arm: Arm
    checkpoint_sha256: Sha256
    test_sha256: Sha256 | None = None
    arms: dict[Arm, _ArmMetrics]
    folded: dict[str, Any] | None = None

    @pydantic.model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.best_arm not in self.config.arms:
            raise ValueError(
                f"expected best_arm, {self.best_arm!r}, to be one of config.arms, "
                f"{', '.join(self.config.arms)}"
            )
        least, most = batch_sizes(self.config.devices, self.data.examples.train)
        if not least <= self.config.batch_size <= most:
            raise ValueError(
                f"expected config.batch_size, {self.config.batch_size}, to be from {least} to "
                f"{most} for {self.data.examples.train} training examples"
            )
        return self


def batch_sizes(devices: int, examples: int) -> tuple[int, int]:
    """Returns the least and the greatest batch size.

    Args:
        devices: which share a batch.
        examples: of the training part.
    """
    # A device with one example of 1x1 positions would have no variance to normalize by.
    least = 2 * devices
    return least, max(least, math.ceil(examples / devices) * devices)


def write_started(path: Path, started: Started) -> None:
    """Writes `checkpoints/config.json`, sealed.

    Args:
        path: of the file.
        started: how the run was started.
    """
    values = started.model_dump(mode="json")
    path.write_bytes(_as_text(values | {SEAL: _digest(values)}))


def read_started(path: Path) -> Started:
    """Reads what `write_started` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not as it was written; the message says where.
    """
    values = read_json(path, MOST_BYTES_OF_CONFIG)
    seal = values.pop(SEAL, None) if isinstance(values, dict) else None
    started = _validate(Started, values, path)
    sealed = _as_text(values | {SEAL: seal})
    # Every byte of it is ours: in a number, E for e is damage, too.
    if seal != _digest(values) or read_bytes(path, MOST_BYTES_OF_CONFIG) != sealed:
        raise ValueError(
            f"{path} is damaged or was edited (its values do not have the SHA-256 that was written "
            f"with them, {_shortened(seal)})"
        )
    return started


def seal_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns metrics with a seal over what decides how a model is used.

    Args:
        metrics: the contents of `metrics.json`. What is only for readers, such as curves and
            versions, is not sealed.
    """
    return metrics | {SEAL: _digest(_deciding(metrics))}


def read_metrics(folder: Path) -> tuple[Metrics, dict[str, Any]]:
    """Reads `metrics.json` of a finished run.

    Args:
        folder: of the run.

    Returns:
        What commands need, and all that the file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: a value is not what it must be, or not what it was when it was sealed.
    """
    path = folder / "metrics.json"
    values = read_json(path, MOST_BYTES_OF_REPORTS)
    metrics = _validate(Metrics, values, path)
    # Version 0.2.0 sealed nothing.
    if SEAL in values and values[SEAL] != _digest(_deciding(values)):
        raise ValueError(
            f"{path} is damaged or was edited (config, data, best_arm and the sha256 of checkpoint "
            f"and test.npz do not have the SHA-256 that was written with them, "
            f"{_shortened(values[SEAL])})"
        )
    return metrics, values


def read_position(path: Path) -> SavedPosition:
    """Reads `position.json`, which is sealed with the arrays next to it.

    Raises:
        OSError: the file cannot be read.
        ValueError: a value is not what it must be.
    """
    return _validate(SavedPosition, read_json(path, MOST_BYTES_OF_REPORTS), path)


def _deciding(metrics: dict[str, Any]) -> dict[str, Any]:
    names = ("config", "data", "best_arm", "checkpoint_sha256", "test_sha256")
    return {name: metrics.get(name) for name in names} | {
        "is_folded": metrics.get("folded") is not None
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _as_text(values: dict[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=2)}\n".encode()


Record = TypeVar("Record", bound=_Record)


def _validate(record: type[Record], values: Any, path: Path) -> Record:
    try:
        return record.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: pydantic.ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) if str(part).isprintable() else repr(part) for part in first["loc"])
    expected = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "extra_forbidden":
        expected = "expected no such key; another version of bn-jax may have written it"
    for word in ("greater", "less"):
        expected = expected.replace(f"expected {word}", f"expected a value {word}")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        return f"{key}: {expected}" if key else expected
    return f"{key or 'the file'}: received {_shortened(first['input'])}, {expected}"


def _shortened(value: object) -> str:
    return reprlib.repr(value)
