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
from bn_jax._audit.model import Attributes, Model, attributes_of, model_of
from bn_jax._audit.sites import Site, find_sites
from bn_jax._core.types import Measured
from bn_jax._program import Program, evaluate, in_double, inputs_of, trace
from bn_jax.linen.patching import norms_replaced

# How exactly a mean must be moved by 1, relative to the values; less exactly in half precision.
MOVED_BY_ONE = 1e-4

# Without a new context, a forward function that is compiled already would not be traced again, and
# `_record` would see no calls of its modules.
_observing = jax.make_user_context(None)


class Measurement(NamedTuple):
    """What one norm measured in the batch: `bn_jax.Measured` on the host, features flattened.

    Attributes:
        values: the number of values, [F].
        mean: their mean, [F].
        var: their variance, [F].
        by_running: how often the norm normalized by running statistics, [F].
        by_batch: how often it normalized by statistics of the batch, [F].
    """

    values: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    by_running: np.ndarray
    by_batch: np.ndarray

    @property
    def is_called(self) -> bool:
        """Whether the model calls the norm."""
        return bool(self.values.any() or self.by_running.any())


class Observations(NamedTuple):
    """What `observe` returns.

    Attributes:
        model: the model.
        sites: the calls of batch norms in the program of evaluation, in its order.
        trained: measurements in training, by path.
        evaluated: measurements in evaluation, by path.
        calls: inputs and outputs of the calls in evaluation, by path.
        attributes: attributes of the norms, by path, where they are known.
        examples: the number of examples in the batch.
    """

    model: Model
    sites: tuple[Site, ...]
    trained: dict[str, Measurement]
    evaluated: dict[str, Measurement]
    calls: dict[str, Calls]
    attributes: dict[str, Attributes]
    examples: int


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
    attributes = dict(model.attributes)
    recording = nn.intercept_methods(_record(attributes))
    with norms_replaced(), recording, _observing(object()):
        program = trace(model.evaluate, model.variables, batch)
        statistics = model.evaluation.statistics(model.variables)
        sites = find_sites(program, model.norms, statistics)
        run = _run(program, model, batch, sites)
    trained, shifted = _on_host(run.trained), _on_host(run.shifted)
    return Observations(
        model=model,
        sites=tuple(_with_bias_checked(program, site, trained, shifted) for site in sites),
        trained=trained,
        evaluated=_on_host(run.evaluated),
        calls=gather(sites, run.summaries),
        attributes=attributes,
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


def _record(attributes: dict[str, Attributes]) -> Callable[..., Any]:
    """Returns an interceptor of Linen's calls that notes the attributes of batch norms."""

    def note(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            attributes["/".join(context.module.path)] = attributes_of(context.module)
        return next_call(*args, **kwargs)

    return note


def _run(program: Program, model: Model, batch: Any, sites: Sequence[Site]) -> _Run:
    """Computes all that is observed in one compiled function, so that nothing is computed twice."""
    biases = {program.paths.index(site.bias) for site in sites if site.bias is not None}

    @jax.jit
    def run(variables: Any, batch: Any) -> _Run:
        leaves = jax.tree.leaves(variables)
        inputs = inputs_of(program, leaves, jax.tree.leaves(batch))
        values = evaluate(program, inputs, wanted_values(sites))
        moved = [leaf + 1 if index in biases else leaf for index, leaf in enumerate(leaves)]
        shifted = jax.tree.unflatten(jax.tree.structure(variables), moved)
        return _Run(
            trained=model.measure(variables, batch, train=True),
            evaluated=model.measure(variables, batch, train=False),
            shifted=model.measure(shifted, batch, train=True) if biases else {},
            summaries=[summarize(program, site, values) for site in sites],
        )

    return jax.device_get(run(model.variables, batch))


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
