"""The zoo: models of other packages, and what the tools of bn_jax do with each of them.

``python -m benchmarks.zoo`` makes every check of `checks` on every model of `flax_models` and
`other_models`. ``make zoo`` asserts the same in the tests. The packages are in the extra `zoo` and
in the dependency group `zoo-alone`.
"""

from benchmarks.zoo.table import tables

__all__ = ["tables"]
