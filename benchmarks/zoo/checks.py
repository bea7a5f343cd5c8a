"""The checks of the zoo: each takes a specimen, and returns what it found as a short text.

A check raises an `AssertionError` that says what is wrong.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

import bn_jax as bn
from benchmarks.zoo.conversion import convert
from benchmarks.zoo.errors import relative_error, require
from benchmarks.zoo.expected import FINDINGS, LEFT
from benchmarks.zoo.specimens import Functional, Specimen, in_double, path_of

# The largest relative errors: of one computation in two orders in float64, and of float32.
DOUBLE, SINGLE = 1e-9, 1e-5
# How much larger an error may become by another order of the same operations.
WORSE = 3
# The number of members of an ensemble, and examples that an exported program did not know of.
MEMBERS, OTHER_BATCH = 2, 3


# --- what several checks compute ----------------------------------------------------------------


def _loss(model: Functional, params: Any, statistics: Any, batch: Any) -> tuple[Any, Any]:
    y, updated = model.train(params, statistics, batch)
    return jnp.mean(jnp.sin(3 * y)), (y, _moments_in(updated))


def _moments_in(statistics: Any) -> dict[str, Any]:
    """Returns means and variances by their paths, without what else a norm keeps."""
    leaves = ((path_of(keys), leaf) for keys, leaf in jax.tree.leaves_with_path(statistics))
    return {path: leaf for path, leaf in leaves if path.split("/")[-1] in ("mean", "var")}


def _ours(specimen: Specimen) -> Functional:
    assert specimen.ours is not None, f"our norms are not in {specimen.name}"
    return specimen.ours


def _with_statistics(specimen: Specimen, statistics: Any) -> Any:
    """Returns what the tools for models of Flax take as variables."""
    if specimen.library == "Linen":
        return {"params": specimen.model.params, "batch_stats": statistics}
    module = nnx.clone(specimen.native)
    nnx.update(module, statistics)
    return module


@cache
def _folded(specimen: Specimen) -> bn.Folded:
    return bn.fold(specimen.forward, specimen.variables, specimen.data)


@cache
def _evaluated(specimen: Specimen) -> Any:
    """Returns the output in evaluation of the model as it is, in float64 where it can."""
    given = (specimen.model.params, specimen.model.statistics, specimen.data)
    if specimen.double is None:
        return jax.jit(specimen.model.evaluate)(*given)
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(specimen.double.evaluate)(*in_double(given)))


def _disturbed(statistics: Any) -> Any:
    """Returns running statistics that are far from those of the data."""

    def disturb(keys: tuple[Any, ...], leaf: Any) -> Any:
        name = path_of(keys).split("/")[-1]
        return leaf + 0.5 if name == "mean" else 2 * leaf if name == "var" else leaf

    return jax.tree.map_with_path(disturb, statistics)


# --- the checks ---------------------------------------------------------------------------------


def ours(specimen: Specimen) -> str:
    """Compares output, statistics and gradients with our norms and with theirs, in float64."""
    found: list[Any] = []
    assert specimen.double is not None, f"{specimen.name} has no float64"
    # Statistics of the batch itself would stay as they are under any momentum.
    statistics = _disturbed(specimen.model.statistics)
    with jax.enable_x64(True):
        given = in_double((specimen.model.params, statistics, specimen.data))
        for model in (specimen.double, _ours(specimen)):
            step = jax.jit(jax.value_and_grad(partial(_loss, model), has_aux=True))
            found.append(jax.device_get(step(*given)))
    (theirs, their_gradients), (mine, my_gradients) = found
    errors = [
        require(relative_error(mine[0], theirs[0]), DOUBLE, "the losses"),
        require(relative_error(mine[1], theirs[1]), DOUBLE, "outputs or statistics"),
        # A gradient that is zero by the definition has rounding alone.
        require(relative_error(my_gradients, their_gradients, whole=True), DOUBLE, "gradients"),
    ]
    return f"{max(errors):.0e}"


def fold(specimen: Specimen) -> str:
    """Compares the folded model with float64, and which norms it left for which reason."""
    folded, exact = _folded(specimen), _evaluated(specimen)
    error = relative_error(folded.apply(folded.params, specimen.data), exact)
    # Where float32 is no more exact before the fold either, the fold may not make it worse.
    own = _own_error(specimen, exact) if error > SINGLE else 0.0
    require(error, max(SINGLE, WORSE * own), "outputs")
    reported = [norm for norm in folded.report if norm.path not in specimen.other_norms]
    assert len(reported) == len(specimen.norms), f"{len(reported)} norms of {len(specimen.norms)}"
    left = [norm.reason for norm in reported if norm.reason is not None]
    expected = LEFT.get(specimen.name, {})
    counts = {part: sum(part in reason for reason in left) for part in expected}
    assert counts == expected, f"left {left}, expected {expected}"
    assert len(left) == sum(expected.values()), f"left {left}, expected {expected}"
    before = f" (before: {own:.0e})" if own else ""
    return f"{len(reported) - len(left)} of {len(reported)}, {error:.0e}{before}"


def _own_error(specimen: Specimen, exact: Any) -> float:
    """Returns the error of the model as it is, in float32."""
    model = specimen.model
    y = jax.jit(model.evaluate)(model.params, model.statistics, specimen.data)
    return relative_error(y, exact)


def names(specimen: Specimen) -> str:
    """Compares the paths of the norms in the report of the fold."""
    reported = {norm.path for norm in _folded(specimen).report} - specimen.other_norms
    assert reported == specimen.norms, f"{sorted(reported)}, expected {sorted(specimen.norms)}"
    return "pass"


def recalibrate(specimen: Specimen) -> str:
    """Compares the statistics of every layer with those of float64, from disturbed ones."""
    variables = _with_statistics(specimen, _disturbed(specimen.model.statistics))
    if specimen.library == "NNX":
        variables.eval()
        found = bn.recalibrate(lambda module, batch: module(*batch), variables, specimen.batches)
    else:
        found = bn.recalibrate(
            lambda variables, batch: specimen.native(
                variables, batch, specimen.trains_where_mutable
            ),
            variables,
            [specimen.data] if specimen.trains_where_mutable else specimen.batches,
        )
    assert found.settled, "the statistics have not settled"
    exact, statistics = _moments_in(specimen.exact), _moments_in(found.batch_stats)
    worst = 0.0
    for path, mean in exact.items():
        if path.endswith("mean"):
            var, norm = exact[path.removesuffix("mean") + "var"], path.removesuffix("/mean")
            errors = (
                np.abs(statistics[path] - mean) / np.sqrt(var),
                np.abs(statistics[f"{norm}/var"] / var - 1),
            )
            worst = max(worst, *(require(float(error.max()), SINGLE, norm) for error in errors))
    assert len(exact) == 2 * len(specimen.norms)
    return f"{worst:.0e}"


def audit(specimen: Specimen) -> str:
    """Compares the findings with those that are true."""
    variables = _with_statistics(specimen, specimen.model.statistics)
    if specimen.library == "NNX":
        found = bn.audit(lambda module, batch: module(*batch), variables, specimen.data)
    else:
        found = bn.audit(specimen.native, variables, specimen.data)
    assert {layer.path for layer in found.layers} == specimen.norms, "other norms"
    by_kind: dict[str, list[str]] = defaultdict(list)
    for finding in found.findings:
        by_kind[finding.kind].append(finding.path)
    kinds = {kind: tuple(sorted(paths)) for kind, paths in by_kind.items()}
    expected = FINDINGS.get(specimen.name, {})
    assert kinds == expected, f"found {kinds}, expected {expected}"
    removed = {
        bias
        for finding in found.findings
        if finding.kind == "bias without effect"
        for bias in re.findall(r"'(\S*/bias)'", finding.message)
    }
    without_effect = _biases_without_effect(specimen)
    assert removed == without_effect, f"biases {removed}, expected {without_effect}"
    return f"{len(found.findings)} true" if found.findings else "none"


def _biases_without_effect(specimen: Specimen) -> set[str]:
    """Returns the biases of other layers than norms that change no output in training."""
    model = specimen.model
    train = jax.jit(lambda params: model.train(params, model.statistics, specimen.data)[0])
    expected, without = train(model.params), set()
    leaves, tree = jax.tree.flatten_with_path(model.params)
    for index, (keys, leaf) in enumerate(leaves):
        layer, _, name = path_of(keys).rpartition("/")
        if name == "bias" and layer not in specimen.norms | specimen.other_norms:
            changed = [other for _, other in leaves]
            changed[index] = leaf + jax.random.normal(jax.random.key(index), leaf.shape)
            if relative_error(train(jax.tree.unflatten(tree, changed)), expected) < SINGLE:
                without.add(path_of(keys))
    return without


def masks(specimen: Specimen) -> str:
    """Compares both masks for Optax with the classes of the layers."""
    params = specimen.model.params
    is_flax = specimen.library in ("Linen", "NNX")
    norms = specimen.norms | specimen.other_norms
    masked = bn.optim.norm_params_mask(params, specimen.model.statistics if is_flax else None)
    decays = bn.optim.no_weight_decay_mask(params)
    count = 0
    flags = zip(jax.tree.leaves(masked), jax.tree.leaves(decays), strict=True)
    for (keys, _), (is_norm, decay) in zip(jax.tree.leaves_with_path(params), flags, strict=True):
        layer, _, name = path_of(keys).rpartition("/")
        expected = layer in norms
        assert is_norm == expected, f"norm_params_mask of {path_of(keys)} is {is_norm}"
        expected_decay = not (expected or name in ("bias", "b"))
        assert decay == expected_decay, f"no_weight_decay_mask of {path_of(keys)} is {decay}"
        count += is_norm
    return f"{count} of {len(jax.tree.leaves(params))}"


def freeze(specimen: Specimen) -> str:
    """Freezes all norms, and then one: it evaluates in training, and keeps its statistics."""
    model, statistics = specimen.model, _disturbed(specimen.model.statistics)
    expected = jax.jit(model.evaluate)(model.params, statistics, specimen.data)
    one = min(specimen.norms)
    for paths in ((), (one,)):
        y, updated = _trained_frozen(specimen, statistics, paths)
        before, after = _moments_in(statistics), _moments_in(updated)
        kept = {path.rpartition("/")[0] for path in before if np.all(before[path] == after[path])}
        assert kept == (set(paths) or specimen.norms), f"{sorted(kept)} kept their statistics"
        if not paths:
            error = require(relative_error(y, expected), SINGLE, "outputs")
    return f"{error:.0e}" if error else "0"


def _trained_frozen(specimen: Specimen, statistics: Any, paths: Sequence[str]) -> tuple[Any, Any]:
    """Returns the output and the new statistics of a frozen model in training."""
    variables = _with_statistics(specimen, statistics)
    if specimen.library == "NNX":
        frozen = bn.nnx.freeze(bn.nnx.replace_norms(variables), *paths)
        frozen.train()
        y = nnx.jit(lambda module: module(*specimen.data))(frozen)
        return y, nnx.state(frozen, nnx.BatchStat)
    apply = bn.linen.freeze(specimen.native, *paths)
    y, updates = jax.jit(lambda variables: apply(variables, specimen.data, True))(variables)
    return y, updates["batch_stats"]


def remat(specimen: Specimen) -> str:
    """Compares gradients under a policy, and how much it keeps for the backward pass."""
    model = _ours(specimen)

    def loss(params: Any) -> Any:
        return _loss(model, params, model.statistics, specimen.data)[0]

    lean = {
        keep: jax.checkpoint(loss, policy=bn.remat_policy(keep)) for keep in ("inputs", "moments")
    }
    gradients = jax.jit(jax.grad(loss))(model.params)
    for keep, other in lean.items():
        found = jax.jit(jax.grad(other))(model.params)
        require(relative_error(found, gradients, whole=True), SINGLE, f"gradients with {keep!r}")
    kept = {keep: _bytes_kept(other, model.params) for keep, other in lean.items()}
    whole = _bytes_kept(loss, model.params)
    assert kept["moments"] < kept["inputs"] < whole, f"{kept} bytes of {whole}"
    return f"{kept['inputs'] / whole:.2f}"


def _bytes_kept(loss: Callable[[Any], Any], params: Any) -> int:
    """Returns the size of what a backward pass gets beside the parameters."""
    pullback = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
    return size - sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def exported(specimen: Specimen) -> str:
    """Exports the folded model, and a training pass with our norms, for batches of any size."""
    arguments = export.symbolic_args_specs(specimen.data, "b, ...")
    batch = tuple(array[:OTHER_BATCH] for array in specimen.data)
    folded = _folded(specimen)
    program = export.export(jax.jit(folded.apply))(_shapes(folded.params), arguments)
    error = relative_error(program.call(folded.params, batch), folded.apply(folded.params, batch))
    require(error, SINGLE, "outputs of the folded model")
    if specimen.ours is None:
        return "folded"
    model = specimen.ours
    train = jax.jit(lambda *given: model.train(*given)[0])
    program = export.export(train)(_shapes(model.params), _shapes(model.statistics), arguments)
    given = (model.params, model.statistics, batch)
    require(relative_error(program.call(*given), train(*given)), SINGLE, "outputs in training")
    return "folded, training"


def _shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def ensemble(specimen: Specimen) -> str:
    """Compares members under `jax.vmap` with one at a time: folded, and in training."""
    folded = _folded(specimen)
    _require_members(lambda params: folded.apply(params, specimen.data), folded.params)
    if specimen.ours is None:
        return "folded"
    model = specimen.ours
    _require_members(
        lambda params: _loss(model, params, model.statistics, specimen.data)[1], model.params
    )
    return "folded, training"


def _require_members(call: Callable[[Any], Any], params: Any) -> None:
    members = [
        jax.tree.map(lambda leaf, by=member: leaf * (1 + by / 8), params)
        for member in range(MEMBERS)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = jax.jit(jax.vmap(call))(stacked)
    alone = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(jax.jit(call), members))
    require(relative_error(together, alone), SINGLE, "members")


CHECKS: Mapping[str, Callable[[Specimen], str]] = {
    "ours": ours,
    "fold": fold,
    "names": names,
    "recalibrate": recalibrate,
    "audit": audit,
    "convert": convert,
    "masks": masks,
    "freeze": freeze,
    "remat": remat,
    "export": exported,
    "ensemble": ensemble,
}
