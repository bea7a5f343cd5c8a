"""The JSON files of runs: what they may hold."""

from typing import Annotated, Any, Self

import pydantic
from pydantic import AfterValidator, ConfigDict, Field

__all__ = [
    "ARMS",
    "MODELS",
    "NO_NORM",
    "PER_DEVICE",
    "SYNCHRONIZED",
    "Config",
    "Started",
]

NO_NORM = "no normalization"
PER_DEVICE = "per-device batch norm"
SYNCHRONIZED = "synchronized batch norm"
ARMS = (NO_NORM, PER_DEVICE, SYNCHRONIZED)
MODELS = ("small", "resnet18", "mlp")


def _check_arms(arms: tuple[str, ...]) -> tuple[str, ...]:
    if not arms or arms != tuple(arm for arm in ARMS if arm in arms):
        raise ValueError(f"expected some of {', '.join(ARMS)}, in this order")
    return arms


def _check_model(model: str) -> str:
    if model not in MODELS:
        raise ValueError(f"expected one of {', '.join(MODELS)}")
    return model


# JSON has lists for tuples. Everything else must have the type that is written here.
Arms = Annotated[tuple[str, ...], Field(strict=False), AfterValidator(_check_arms)]
Model = Annotated[str, AfterValidator(_check_model)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


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
