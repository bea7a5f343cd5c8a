"""Batch normalization for JAX and Flax: right where others are wrong, over a norm's whole life.

`import bn_jax as bn` imports nothing else until a name is used. So `bn_jax._core` needs JAX alone,
and the `bn-jax` command starts before JAX does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bn_jax import convert, lab, linen, nnx, optim, remat, training
    from bn_jax._audit import Audit, Finding, Layer, audit
    from bn_jax._core.batch_norm import (
        batch_norm,
        identity_params,
        init_params,
        normalize_by_batch,
    )
    from bn_jax._core.batch_renorm import batch_renorm
    from bn_jax._core.domain_batch_norm import domain_batch_norm
    from bn_jax._core.feature_norms import group_norm, instance_norm, layer_norm, rms_norm
    from bn_jax._core.merging import merge_moments
    from bn_jax._core.moments import moments
    from bn_jax._core.running import (
        init_batch_stats,
        promote_batch_stats,
        start_measuring,
        update_batch_stats,
    )
    from bn_jax._core.types import BatchStats, Measured, Moments, Params, WhiteningStats
    from bn_jax._core.whitening import init_whitening_stats, whitening_norm
    from bn_jax._export import ExportedModel, export_model, load_exported
    from bn_jax._fold import Folded, FoldedNorm, FoldReport, absorb_scale, as_affine, fold
    from bn_jax._recalibrate import LayerChange, Recalibration, recalibrate
    from bn_jax.remat import remat_policy

    __version__: str

__all__ = [
    "Audit",
    "BatchStats",
    "ExportedModel",
    "Finding",
    "FoldReport",
    "Folded",
    "FoldedNorm",
    "Layer",
    "LayerChange",
    "Measured",
    "Moments",
    "Params",
    "Recalibration",
    "WhiteningStats",
    "__version__",
    "absorb_scale",
    "as_affine",
    "audit",
    "batch_norm",
    "batch_renorm",
    "convert",
    "domain_batch_norm",
    "export_model",
    "fold",
    "group_norm",
    "identity_params",
    "init_batch_stats",
    "init_params",
    "init_whitening_stats",
    "instance_norm",
    "lab",
    "layer_norm",
    "linen",
    "load_exported",
    "merge_moments",
    "moments",
    "nnx",
    "normalize_by_batch",
    "optim",
    "promote_batch_stats",
    "recalibrate",
    "remat",
    "remat_policy",
    "rms_norm",
    "start_measuring",
    "training",
    "update_batch_stats",
    "whitening_norm",
]

# Where the public names live. A name that is missing here is a module of its own.
_HOMES = {
    "_audit": ("Audit", "Finding", "Layer", "audit"),
    "_core.batch_norm": ("batch_norm", "identity_params", "init_params", "normalize_by_batch"),
    "_core.batch_renorm": ("batch_renorm",),
    "_core.domain_batch_norm": ("domain_batch_norm",),
    "_core.feature_norms": ("group_norm", "instance_norm", "layer_norm", "rms_norm"),
    "_core.merging": ("merge_moments",),
    "_core.moments": ("moments",),
    "_core.running": (
        "init_batch_stats",
        "promote_batch_stats",
        "start_measuring",
        "update_batch_stats",
    ),
    "_core.types": ("BatchStats", "Measured", "Moments", "Params", "WhiteningStats"),
    "_core.whitening": ("init_whitening_stats", "whitening_norm"),
    "_export": ("ExportedModel", "export_model", "load_exported"),
    "_fold": ("FoldReport", "Folded", "FoldedNorm", "absorb_scale", "as_affine", "fold"),
    "_recalibrate": ("LayerChange", "Recalibration", "recalibrate"),
    "remat": ("remat_policy",),
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("bn-jax")
    elif name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        homes = [home for home, names in _HOMES.items() if name in names]
        if homes:
            value = getattr(import_module(f"{__name__}.{homes[0]}"), name)
        else:
            value = import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
