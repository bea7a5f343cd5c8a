"""What is expected of each model beside a pass: every exception of the zoo, with its reason."""

from collections.abc import Mapping

# By the check: why it says nothing of the models of a library, or of one model.
ABSENT: Mapping[str, Mapping[str, str]] = {
    check: dict.fromkeys(("Haiku", "Keras", "Equinox"), reason)
    for check, reason in {
        "ours": "`replace_norms` puts our norms in the place of Flax's",
        "recalibrate": "measures norms of Flax and of this package",
        "audit": "examines norms of Flax and of this package",
        "freeze": "freezes norms of Flax and of this package",
        "remat": "the moments of other norms have no names that a policy could keep",
    }.items()
}

# Faults of this package, by the check: the models, or their libraries, and what is wrong.
FAULTS: Mapping[str, Mapping[str, str]] = {}

# Which norms `fold` leaves: how many for each reason, by a part of it.
LEFT: Mapping[str, Mapping[str, int]] = {
    # After the activation: nothing linear before them, and what follows adds, pads or pools.
    "flaim ConvMixer": {
        "with padding, which would lack the bias": 2,
        "`add`": 2,
        "`reduce_sum`": 1,
    },
    # Before a sum, after a norm whose output goes on beside them.
    "flaim VAN": {"is used elsewhere too, and its output goes to `add`": 2},
    # `nn.vmap` gives all members one input, which a norm is the first to make several of.
    "sbx-rl CrossQ critics": {"It broadcasts its input against its parameters": 1},
    # Before the activation, and after what no norm goes into.
    "Haiku ResNet v2": {"comes from `add`": 4, "comes from `reduce_window_max`": 1},
    "Keras DenseNet": {
        "comes from `concatenate`": 5,
        "comes from `reduce_window_sum`": 3,
        "comes from `reduce_window_max`": 1,
    },
}

# What `audit` finds rightly: the paths of the norms by the kind.
FINDINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "flaim VAN": {
        # Convolutions with `bias_force=True`.
        "bias without effect": ("ConvBNAct_0/BatchNorm_0", "VANStage_1/ConvBNAct_0/BatchNorm_0"),
        # Before the first convolution of the MLP.
        "redundant scale": (
            "VANStage_0/VANBlock_0/BatchNorm_1",
            "VANStage_1/VANBlock_0/BatchNorm_1",
        ),
    },
    # The last norm of a block without a shortcut: the next block begins with a convolution.
    "flaim EfficientNetV2": {
        "redundant scale": ("EfficientNetV2Stage_1/FusedMBConv_0/ConvBNAct_1/BatchNorm_0",)
    },
    # After the activation, before a dense layer.
    "sbx-rl CrossQ critics": {
        "redundant scale": ("VmapCritic_0/BatchRenorm_1", "VmapCritic_0/BatchRenorm_2")
    },
    # Linear layers with a bias.
    "jaxkit FullyConnected": {
        "bias without effect": ("layers/0/batchnorm1", "layers/0/batchnorm2", "layers/1/batchnorm1")
    },
}


def exception(table: Mapping[str, Mapping[str, str]], check: str, *names: str) -> str | None:
    """Returns the reason that a table has for a check, by the name of a model or its library."""
    reasons = table.get(check, {})
    return next((reasons[name] for name in names if name in reasons), None)
