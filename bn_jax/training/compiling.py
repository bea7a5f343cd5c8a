"""What XLA is told about the programs of a training on CPUs."""

from collections.abc import Iterable

import jax

__all__ = ["convolution_options", "is_on_cpus"]


def is_on_cpus(devices: Iterable[jax.Device]) -> bool:
    """Tells whether all devices are CPUs."""
    return all(device.platform == "cpu" for device in devices)


def convolution_options(on_cpus: bool) -> dict[str, str | bool | int | float] | None:
    """Returns the compiler options for a model that may convolve images smaller than its kernels.

    XLA's algebraic simplifier makes the kernel of such a convolution its image. On a GPU or a TPU,
    that helps. On a CPU, the result misses the fast routine: 3x3 kernels on images of 2x2, as in
    the last stage of a ResNet for images of 8x8, take ten times as long.

    Args:
        on_cpus: whether the program is for CPUs.

    Returns:
        The argument `compiler_options` of `jax.jit`.
    """
    return {"xla_disable_hlo_passes": "algsimp"} if on_cpus else None
