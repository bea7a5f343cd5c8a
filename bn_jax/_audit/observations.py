"""What one batch shows of every batch norm of a model, in training and in evaluation.

`observe` measures the statistics of the batch in both modes, finds the calls of batch norms in the
program of evaluation, and summarizes their inputs, their outputs and the activations after them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bn_jax._audit.calls import Calls, gather, summarize, wanted_values
from bn_jax._audit.model import LINE, Attributes, Model, model_of, note_attributes, noted_attributes
from bn_jax._audit.sites import Site, find_sites
from bn_jax._core.types import Measured
from bn_jax._program import Program, evaluate, in_double, inputs_of, trace
from bn_jax._recalibrate.measuring import measure
from bn_jax._transfers import devices_of, put
from bn_jax.linen.patching import norms_replaced

# How exactly a mean must be moved by 1, relative to the values; less exactly in half precision.
MOVED_BY_ONE = 1e-4

# JAX compiles again what it has compiled outside, where the model noted no attributes.
_observing = jax.make_user_context(False)


class Measurement(NamedTuple):
    """What one norm measured in the batch: `bn_jax.Measured` on the host, features flattened."""

    values: np.ndarray  # the number of values, [F]
    mean: np.ndarray  # their mean, [F]
    var: np.ndarray  # their variance, [F]
    by_running: np.ndarray  # how often the norm normalized by running statistics, [F]
    by_batch: np.ndarray  # how often it normalized by statistics of the batch, [F]

    @property
    def is_called(self) -> bool:
        """Whether the model calls the norm."""
        return bool(self.values.any() or self.by_running.any())


class Observations(NamedTuple):
    """What `observe` returns."""

    model: Model
    attributes: dict[str, Attributes]  # those of the norms that are layers, by path
    sites: tuple[Site, ...]  # the calls of batch norms in the program of evaluation, in its order
    trained: dict[str, Measurement]  # measurements in training, by path
    evaluated: dict[str, Measurement]  # measurements in evaluation, by path
    calls: dict[str, Calls]  # inputs and outputs of the calls in evaluation, by path
    examples: int  # the number of examples in the batch


class _Run(NamedTuple):
    """What the norms measure in a run of the model, by path, and a summary of each site.

    `shifted` is measured in training with the biases of the sites larger by 1.
    """

    trained: dict[str, Measured]
    evaluated: dict[str, Measured]
    shifted: dict[str, Measured]
    summaries: list[Calls]


def observe(forward: Callable[..., Any], variables: Any, batch: Any) -> Observations:
    """Runs a model once in training and once in evaluation on one batch, and reads its program.

    Arguments and errors are those of `bn_jax.audit`.
    """
    examples = _number_of_examples(batch)
    model = model_of(forward, variables)
    # The first interceptor is called first; ours in the place of Flax's calls no other.
    noting = nn.intercept_methods(note_attributes)
    with noting, norms_replaced(), _observing(True):
        program = trace(model.evaluate, model.variables, batch)
        statistics = model.evaluation.statistics(model.variables)
        sites = find_sites(program, model.norms, statistics)
        compute = _computation(program, model, sites)
        devices = devices_of(model.variables)
        inputs = put(model.variables, devices), put(batch, devices)
        attributes = noted_attributes(compute.trace(*inputs).jaxpr.jaxpr)
        run = jax.device_get(compute(*inputs))
    trained, shifted = _on_host(run.trained), _on_host(run.shifted)
    return Observations(
        model=model,
        attributes=model.attributes | attributes,
        sites=tuple(_with_bias_checked(program, site, trained, shifted) for site in sites),
        trained=trained,
        evaluated=_on_host(run.evaluated),
        calls=gather(sites, run.summaries),
        examples=examples,
    )


def flat(values: Any) -> np.ndarray:
    """Returns an array of features as a vector in double precision."""
    return in_double(values).reshape(-1)


def _number_of_examples(batch: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batch)]
    sizes = [shape[0] for shape in shapes if shape]
    if not sizes or 0 in sizes:
        raise ValueError(
            f"batch has no examples, its arrays have the shapes {shapes}: pass one batch as in "
            "training, examples along the first axis."
        )
    return int(sizes[0])


def _computation(program: Program, model: Model, sites: Sequence[Site]) -> jax.stages.Wrapped:
    """Returns one compiled function of all that is observed, so that nothing is computed twice."""
    biases = {program.paths.index(site.bias) for site in sites if site.bias is not None}

    @jax.jit
    def run(variables: Any, batch: Any) -> _Run:
        leaves = jax.tree.leaves(variables)
        inputs = inputs_of(program, leaves, jax.tree.leaves(batch))
        values = evaluate(program, inputs, wanted_values(sites))
        moved = [leaf + 1 if index in biases else leaf for index, leaf in enumerate(leaves)]
        shifted = jax.tree.unflatten(jax.tree.structure(variables), moved)
        return _Run(
            trained=measure(model.training, variables, batch, line=LINE),
            evaluated=measure(model.evaluation, variables, batch, line=LINE),
            shifted=measure(model.training, shifted, batch, line=LINE) if biases else {},
            summaries=[summarize(program, site, values) for site in sites],
        )

    return run


def _on_host(measured: Mapping[str, Measured]) -> dict[str, Measurement]:
    return {
        path: Measurement(
            values=flat(norm.count),
            mean=flat(norm.mean) + flat(norm.residue),
            var=flat(norm.var),
            by_running=flat(norm.by_running),
            by_batch=flat(norm.by_batch),
        )
        for path, norm in measured.items()
    }


def _with_bias_checked(
    program: Program,
    site: Site,
    trained: Mapping[str, Measurement],
    shifted: Mapping[str, Measurement],
) -> Site:
    """Forgets a bias that does more in training than move the mean, as before dropout."""
    if site.bias is None or site.path not in trained or site.path not in shifted:
        return site._replace(bias=None)
    before, after = trained[site.path], shifted[site.path]
    dtype = jnp.promote_types(program.avals[site.input].dtype, jnp.bfloat16)
    deviation = np.sqrt(before.var)
    # The rounding errors of sums are relative to the values that are added.
    relative = max(MOVED_BY_ONE, 4 * float(jnp.finfo(dtype).eps))
    tolerance = relative * (1 + np.abs(before.mean) + deviation)
    is_moved = np.abs(np.abs(after.mean - before.mean) - 1) <= tolerance
    is_same = np.abs(np.sqrt(after.var) - deviation) <= tolerance
    if np.all((is_moved & is_same) | (before.values == 0)):
        return site
    return site._replace(bias=None)
