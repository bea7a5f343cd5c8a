"""What a training can be told to train, by name."""

__all__ = ["ARMS", "ARM_NAMES", "MODELS", "MODEL_NAMES", "NO_NORM", "PER_DEVICE", "SYNCHRONIZED"]

NO_NORM = "no normalization"
"""The arm whose model has no norms."""
PER_DEVICE = "per-device batch norm"
"""The arm whose norms use the statistics of each device's part of the batch."""
SYNCHRONIZED = "synchronized batch norm"
"""The arm whose norms use the statistics of the whole batch."""
# By the names that the command line takes.
ARM_NAMES = {"none": NO_NORM, "per-device": PER_DEVICE, "synchronized": SYNCHRONIZED}
ARMS = tuple(ARM_NAMES.values())
"""The arms of a training: the same model, with its norms in three ways."""
# How a picture names them, by the names that the command line takes.
MODEL_NAMES = {
    "small": "Small ResNet",
    "tiny": "Tiny ResNet",
    "resnet18": "ResNet-18",
    "mlp": "MLP",
}
MODELS = tuple(MODEL_NAMES)
