"""The population statistics of a trained model, measured exactly instead of averaged in training.

The statistics of the n-th norm depend on what the norms before it make of the data. A pass in which
every norm normalizes by given statistics, and measures what comes in, makes the first one exact
whatever these are; normalizing by what that pass found, the next makes the second one exact, and so
on. So nothing depends on how the data is split, and one example at a time will do. Batches that are
normalized by their own statistics (PreciseBN, `update_bn`) need one pass only, but what is behind
the first norm is then that of a network which normalizes every batch otherwise.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast
from weakref import WeakKeyDictionary, ref

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from bn_jax._core.batch_norm import BatchStats, Measured, start_measuring
from bn_jax._core.moments import statistics_dtype
from bn_jax._paths import batch_stats_by_path, format_path, is_batch_stats, whitening_paths
from bn_jax._program.reading import exact
from bn_jax.linen import replace_norms as replacing_norms
from bn_jax.nnx import BatchNorm, replace_norms

Forward: TypeAlias = Callable[[Any, Any], Any]
Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = dict[str, Any]
Measure: TypeAlias = Callable[[Any, Any, int], dict[str, Measured]]

# Random numbers that a module of NNX may draw in a batch before they are those of the next.
DRAWS_OF_A_BATCH = 2**16
# Roundings of a statistic within which two passes agree.
ROUNDINGS = 8
# Passes for a norm that is behind itself: in so many, what settles at all has settled.
PASSES_OF_A_LOOP = 100
LINE = (
    "lambda variables, batch: model.apply(variables, batch, train=False, mutable=['batch_stats'])"
)


class LayerChange(NamedTuple):
    """What recalibration did to one norm.

    Attributes:
        path: where it is in ``batch_stats``, joined by "/"; "" at the top level.
        mean: how far the mean moved at most, in old standard deviations.
        var: by which factor the variance changed at most, up or down; at least 1.
        values: how many values entered a feature, the fewest of those that were measured; 0 where
            none was.
        kept: how many features kept their statistics, for lack of valid and finite values.
    """

    path: str
    mean: float
    var: float
    values: float
    kept: int


class Recalibration(NamedTuple):
    """The statistics that `recalibrate` found; as text, a table of what changed.

    Attributes:
        batch_stats: the collection, in the structure and dtypes of the old one; of an `nnx.Module`
            the `nnx.State` for ``nnx.update(model, ...)``.
        layers: what changed, norm by norm in the order of `batch_stats`.
        passes: how often the batches were gone through.
        settled: whether one pass more would change nothing beyond rounding.
    """

    batch_stats: Any
    layers: tuple[LayerChange, ...]
    passes: int
    settled: bool

    def __str__(self) -> str:
        ordered = sorted(
            self.layers, key=lambda one: max(one.mean, math.log(one.var)), reverse=True
        )
        rows = [("norm", "mean moved by", "variance changed", "values"), *map(_row, ordered)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines += [sentence for one in ordered for sentence in _sentences(one)]
        if not self.settled:
            lines.append(
                f"The statistics had not settled after passes={self.passes}: those of later norms "
                "would still change. Allow more passes."
            )
        return "\n".join(lines)


def recalibrate(
    forward: Forward,
    variables: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    prior: float = 0.0,
    passes: int | None = None,
    progress: bool = False,
) -> Recalibration:
    """Measures the exact population statistics of every batch norm over a data set.

    Of a `forward` that evaluates, every pass over the batches normalizes by the statistics of the
    pass before, so that after `k` passes the first `k` norms on any path have ::

        mean = sum(x) / n,    var = sum(|x - mean|**2) / (n - running_var_ddof)

    with the sums over all `n` values of a feature in the whole data set, however it is split: in
    uneven or masked batches, or one example at a time. Passes go on until no statistic changes
    beyond rounding, at most as many as there are norms, those under lifted transforms counted
    singly; each costs an evaluation of the data set. A norm that is called several times is
    measured by all its calls together; its statistics depend on themselves, and passes go on until
    they settle. Dropout is off. This is what to use where the running statistics were not averaged
    under these weights or on this data: averaged weights (SWA, EMA), pruned, quantized or converted
    ones.

    Of a `forward` that trains, every batch is normalized by its own statistics, and these are
    pooled by their counts in a single pass: what PreciseBN and PyTorch's `update_bn` approximate.

    With a `prior`, every norm keeps that share of its old statistics (test-time adaptation to data
    of another distribution than that of the training) ::

        new_mean = prior * old_mean + (1 - prior) * mean
        new_var = prior * old_var + (1 - prior) * var

    where `mean` and `var` are those of what comes in if the norms before it normalize by their new,
    mixed statistics. For few data keep much: `N` pseudo-examples of the training beside the `n`
    examples in `batches`, as Schneider et al. count, are ``prior = N / (N + n)``. AdaBN (Li et al.)
    keeps nothing, ``prior=0``.

    Each batch is one compiled step, and its moments are merged in double precision on the host; the
    memory does not grow with their number. Flax's norms are measured as ours; a subclass of one of
    Flax's keeps its statistics.

    Args:
        forward: called as ``forward(variables, batch)``; returns ``(y, updates)`` with the new
            statistics in ``updates["batch_stats"]``, as ``model.apply(variables, x, train=False,
            mutable=["batch_stats"])`` does, or anything where `variables` is an `nnx.Module`,
            which ``model.eval()`` makes evaluate. It is compiled once for all passes and calls,
            and once again for batches of another shape; as with `jax.jit`, what it reads from
            outside is taken as it was then.
        variables: ``{"params": ..., "batch_stats": ...}``, or an `nnx.Module`. They stay as they
            are.
        batches: trees of arrays, as `forward` takes them: anything that can be iterated as often as
            there are passes, or a function without arguments that returns an iterator.
        prior: the share of the old statistics in the new, in [0, 1). Old ones that are not finite
            have none.
        passes: how many there are at most. None: as many as are needed.
        progress: whether to show a bar on standard error; it needs rich.

    Returns:
        `Recalibration`: the new statistics, and what changed. A norm that measured nothing because
        it is frozen, or because `forward` does not reach it, keeps its own, and so does a feature
        that no batch enters; the text says which. A single valid value that is not finite keeps
        its whole batch out of the feature. A ``count`` of batches becomes the number of those here,
        divided by ``1 - prior``: so it goes on weighing all batches the same.

    Raises:
        ValueError: `prior` is not in [0, 1), there is no batch norm, or there is a whitening norm;
            there are no batches,
            `forward` returns no updated statistics, or a second pass is needed over an iterator
            that gives its batches once.
        TypeError: `variables` is neither a mapping nor a module, or `batches` is one batch.
        ModuleNotFoundError: ``progress=True`` without rich.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> x = jnp.array([[1.0], [3.0], [8.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> def forward(variables, batch):
        ...     return model.apply(variables, batch, mutable=["batch_stats"])
        >>> found = bn.recalibrate(forward, variables, [x[:1], x[1:]])
        >>> found.batch_stats["mean"].tolist(), round(found.batch_stats["var"].item(), 4)
        ([4.0], 8.6667)
        >>> print(found)
        norm                mean moved by  variance changed  values
        the top-level norm  4 std          8.667 times       3
        >>> adapted = bn.recalibrate(forward, variables, [x], prior=9 / (9 + len(x)))
        >>> round(adapted.batch_stats["mean"].item(), 4)  # 3/4 of 0 and 1/4 of 4
        1.0

    Reference: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm",
    https://arxiv.org/abs/2105.07576, for batches normalized by their own statistics; Schneider et
    al. 2020, "Improving robustness against common corruptions by covariate shift adaptation",
    https://arxiv.org/abs/2006.16971, for the prior; Li et al. 2016, "Revisiting Batch Normalization
    For Practical Domain Adaptation", https://arxiv.org/abs/1603.04779, for adaptation without.
    """
    if not 0 <= prior < 1:
        raise ValueError(
            f"prior={prior} must be in [0, 1): it is the share of the old statistics in the new. "
            "For N pseudo-examples beside n examples write prior=N / (N + n)."
        )
    if passes is not None and passes < 1:
        raise ValueError(f"passes={passes} must be at least 1, or None for as many as are needed.")
    measure, batch_stats = _prepare(forward, variables)
    allowed: float = PASSES_OF_A_LOOP if passes is None else passes
    only_once = isinstance(batches, Iterator) and allowed > 1
    current, number, settled = batch_stats, 0, False
    with _progress_bar(progress) as show:
        while not settled and number < allowed:
            number += 1
            shown = show(_opened(batches), f"pass {number}")
            pools, count = _measure_all(measure, current, shown, only_once)
            if count == 0:
                raise ValueError(_nothing_in(batches, number))
            before = current
            current = _recalibrated(before, pools, count, batch_stats, prior)
            needed = 1 if only_once else _passes_needed(pools)
            settled = number >= needed or _agree(before, current)
            if passes is None and needed < math.inf:
                allowed = needed
    layers = tuple(_changes(batch_stats, current, pools))
    return Recalibration(current, layers, number, settled)


# --- what is measured in one batch --------------------------------------------------------------


def _prepare(forward: Forward, variables: Any) -> tuple[Measure, Any]:
    """Returns what measures a batch, given statistics, the batch and its number; and the old."""
    graph: Any = None
    batch_stats: Any
    others: Any
    if isinstance(variables, nnx.Module):
        graph, *states = nnx.split(variables, nnx.BatchStat, ...)
        batch_stats, others = states
    elif isinstance(variables, Mapping):
        others = {name: tree for name, tree in variables.items() if name != "batch_stats"}
        batch_stats = variables.get("batch_stats", {})
    else:
        raise TypeError(
            f"variables is a {type(variables).__name__}; expected an nnx.Module or "
            "{'params': ..., 'batch_stats': ...}, as model.init returns it."
        )
    if whitened := whitening_paths(batch_stats):
        raise ValueError(
            f"variables holds whitening norms, {whitened}, whose covariances are not measured and "
            "would be stale; expected batch norms alone. Average them over the data instead: in a "
            "model with WhiteningNorm(momentum=None) and statistics made anew, in training mode "
            "without steps of the optimizer."
        )
    if not batch_stats_by_path(batch_stats):
        raise ValueError(
            "variables holds no batch norm: expected a mean and a var of each in "
            "variables['batch_stats'], or in the nnx.BatchStat variables of a module. Pass "
            "{'params': params, 'batch_stats': batch_stats} with what model.init or training "
            "returned."
        )
    try:
        hash(graph)
    except TypeError:
        # A graph that holds a dict or a list cannot be a static argument.
        step = jax.jit(partial(_step(lambda: forward), graph))
        return partial(step, others), batch_stats
    return partial(_step_of(forward), graph, others), batch_stats


# A step is compiled as long as its forward function lives.
_steps: WeakKeyDictionary[Forward, Callable[..., dict[str, Measured]]] = WeakKeyDictionary()


def _step_of(forward: Forward) -> Callable[..., dict[str, Measured]]:
    """Returns the compiled step of a forward function, which the caller keeps alive."""
    try:
        if forward in _steps:
            return _steps[forward]
        reference = ref(forward)
    except TypeError:
        # What cannot be hashed or referred to weakly is compiled anew each time.
        return _compiled(lambda: forward)
    _steps[forward] = _compiled(cast(Callable[[], Forward], reference))
    return _steps[forward]


def _compiled(reference: Callable[[], Forward]) -> Callable[..., dict[str, Measured]]:
    return jax.jit(_step(reference), static_argnums=0)


def _step(reference: Callable[[], Forward]) -> Callable[..., dict[str, Measured]]:
    def step(
        graph: Any, others: Any, batch_stats: Any, batch: Any, number: int
    ) -> dict[str, Measured]:
        if graph is None:
            variables = {**others, "batch_stats": batch_stats}
            return measure(reference(), variables, batch, line=LINE)
        model = nnx.merge(graph, batch_stats, others)
        # The model of every batch is the given one, and is to draw other numbers in each.
        drawn = jax.tree.map(
            lambda count: count + jnp.asarray(number * DRAWS_OF_A_BATCH, count.dtype),
            nnx.state(model, nnx.RngCount),
        )
        nnx.update(model, drawn)
        return measure(reference(), model, batch, line=LINE)

    return step


def measure(
    forward: Callable[..., Any], variables: Any, *args: Any, line: str
) -> dict[str, Measured]:
    """Calls a forward function in which every batch norm measures.

    Args:
        forward: called as ``forward(variables, *args)``.
        variables: as of `recalibrate`; an `nnx.Module` is changed.
        *args: the batch, and what else `forward` takes.
        line: a forward function to write, for who forgot the updated statistics.

    Returns:
        What each norm has measured, by path; those that are not called have measured nothing.

    Raises:
        ValueError: `forward` returns no updated statistics.
    """
    if isinstance(variables, nnx.Module):
        for _, layer in nnx.iter_graph(replace_norms(variables)):
            if isinstance(layer, BatchNorm):
                batch_stats: BatchStats = {"mean": layer.mean[...], "var": layer.var[...]}
                layer.measured = nnx.BatchStat(start_measuring(batch_stats)["measured"])
        forward(variables, *args)
        return _found(nnx.to_pure_dict(nnx.state(variables, nnx.BatchStat)))

    def start(node: Any) -> Any:
        if not is_batch_stats(node):
            return node
        return {**node, "measured": start_measuring(_arrays(node))["measured"]}

    marked = jax.tree.map(start, variables["batch_stats"], is_leaf=is_batch_stats)
    with replacing_norms():
        returned = forward({**variables, "batch_stats": marked}, *args)
    return _found(updated(returned, line))


def updated(returned: Any, line: str) -> Any:
    """Returns the statistics of what a forward function returned, and says what it had to be.

    Args:
        returned: ``(y, updates)``.
        line: a forward function to write, for who forgot the updated statistics.

    Returns:
        ``updates["batch_stats"]``.

    Raises:
        ValueError: it is something else.
    """
    is_array = isinstance(returned, jax.Array)
    found = "an array" if is_array else f"a {type(returned).__name__}"
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        if "batch_stats" in returned[1]:
            return returned[1]["batch_stats"]
        found = f"(y, updates) with the collections {sorted(returned[1])} in updates"
    raise ValueError(
        f"forward returned {found}, expected (y, updates) with the new statistics in "
        f"updates['batch_stats']. Write forward = {line}"
    )


def _found(batch_stats: Any) -> dict[str, Measured]:
    return {
        path: node["measured"]
        for path, node in batch_stats_by_path(batch_stats).items()
        if "measured" in node
    }


def _arrays(node: Any) -> Any:
    """Returns the statistics of a norm, out of their boxes or variables."""
    return {format_path(path[:1]): leaf for path, leaf in jax.tree.leaves_with_path(node)}


# --- what is measured in all batches ------------------------------------------------------------


def _measure_all(
    measure: Measure, batch_stats: Any, batches: Iterable[Any], only_once: bool
) -> tuple[dict[str, Measured], int]:
    """Returns what all batches have measured together, and how many there were."""
    pools: dict[str, Measured] = {}
    waiting: dict[str, Measured] = {}
    count = 0
    for batch in batches:
        found = measure(batch_stats, batch, count)
        if only_once and count == 0:
            _require_one_pass(measure, batch_stats, batch, found)
        # Read one step late, so that the device has the next one to compute meanwhile.
        pools = _pooled(pools, waiting)
        waiting, count = found, count + 1
    return _pooled(pools, waiting), count


def _pooled(pools: dict[str, Measured], found: dict[str, Measured]) -> dict[str, Measured]:
    """Merges in double precision: a float32 count stops counting at 2**24."""
    read = {path: _read(one) for path, one in jax.device_get(found).items()}
    return pools | {
        path: _merge(pools[path], one) if path in pools else one for path, one in read.items()
    }


def _read(measured: Measured) -> Measured:
    doubled: Measured = jax.tree.map(exact, measured)
    return doubled._replace(mean=doubled.mean + doubled.residue, residue=0 * doubled.residue)


def _merge(first: Measured, second: Measured) -> Measured:
    maximum: Any = np.maximum
    count = first.count + second.count
    share = second.count / np.where(count > 0, count, 1)
    difference = second.mean - first.mean
    between = share * (1 - share) * np.abs(difference) ** 2
    return Measured(
        count,
        first.mean + share * difference,
        (1 - share) * first.var + share * second.var + between,
        maximum(first.running_var_ddof, second.running_var_ddof),
        maximum(first.by_running, second.by_running),
        maximum(first.by_batch, second.by_batch),
        first.residue,
    )


def _passes_needed(pools: dict[str, Measured]) -> float:
    """One, where batches were normalized by themselves alone, else one for every norm.

    What a norm measures in its second call depends on its own statistics: infinitely many.
    """
    if not any(np.any(one.by_running) for one in pools.values()):
        return 1
    if any(np.any(one.by_running > 1) for one in pools.values()):
        return math.inf
    called = (one for one in pools.values() if np.any(one.count) or np.any(one.by_running))
    # Those under a lifted transform are stacked.
    return sum(math.prod(one.mean.shape[:-1]) for one in called)


def _recalibrated(
    batch_stats: Any, pools: dict[str, Measured], batches: int, initial: Any, prior: float
) -> Any:
    """Returns the statistics with those that were measured, and the initial, in their place."""

    def replace(path: Any, node: Any, initial_node: Any) -> Any:
        pool = pools.get(format_path(path))
        if not is_batch_stats(node) or pool is None:
            return node
        new = _mixed(_population(pool), _arrays(initial_node), batches, prior)

        def choose(path: Any, old: Any) -> Any:
            name = format_path(path[:1])
            return _placed(np.where(_enters(pool), new[name], old), old) if name in new else old

        return jax.tree.map_with_path(choose, node)

    return jax.tree.map_with_path(replace, batch_stats, initial, is_leaf=is_batch_stats)


def _mixed(found: Arrays, initial: Arrays, batches: int, prior: float) -> Arrays:
    """Returns what was found and the initial statistics by their shares, and the new count."""
    old = {name: exact(initial[name]) for name in found}
    is_known = np.isfinite(old["mean"]) & np.isfinite(old["var"])
    share = np.where(is_known, prior, 0.0)
    mixed = {
        name: share * np.where(is_known, old[name], 0) + (1 - share) * found[name] for name in found
    }
    return mixed | {"count": batches / (1 - share)}


def _population(pool: Measured) -> Arrays:
    freedom = pool.count - pool.running_var_ddof
    unbiased = pool.var * pool.count / np.where(freedom > 0, freedom, 1)
    return {"mean": pool.mean, "var": unbiased}


def _enters(pool: Measured) -> Array:
    return np.asarray(pool.count > pool.running_var_ddof)


def _placed(values: Array, old: Any) -> jax.Array:
    """Returns values in the dtype of the old ones, on their devices."""
    becomes_complex = np.iscomplexobj(values) and not jnp.iscomplexobj(old)
    dtype = statistics_dtype(old.dtype) if becomes_complex else old.dtype
    values = values.astype(np.result_type(dtype, np.complex64) if becomes_complex else dtype)
    if isinstance(old, jax.Array) and old.committed:
        return jax.device_put(values, old.sharding)
    return jnp.asarray(values)


def _agree(before: Any, after: Any) -> bool:
    """Says whether two collections are the same but for rounding."""
    new = batch_stats_by_path(after)
    return all(
        _agree_in_layer(_arrays(node), _arrays(new[path]))
        for path, node in batch_stats_by_path(before).items()
    )


def _agree_in_layer(before: Arrays, after: Arrays) -> bool:
    tolerance = ROUNDINGS * jnp.finfo(statistics_dtype(after["var"].dtype)).eps
    old, new = ({name: exact(leaf) for name, leaf in one.items()} for one in (before, after))
    with np.errstate(invalid="ignore"):
        scale = np.abs(new["mean"]) + np.sqrt(new["var"])
        of_mean = np.abs(new["mean"] - old["mean"]) <= tolerance * scale
        of_var = np.abs(new["var"] - old["var"]) <= tolerance * new["var"]
    return bool(of_mean.all() and of_var.all())


# --- the batches --------------------------------------------------------------------------------


def _opened(batches: Any) -> Iterable[Any]:
    if callable(batches) and not isinstance(batches, Iterable):
        return cast(Iterable[Any], batches())
    if isinstance(batches, Mapping) or hasattr(batches, "_fields"):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which is one batch; expected something that "
            "gives batches: write [batch]."
        )
    return cast(Iterable[Any], batches)


def _require_one_pass(
    measure: Measure, batch_stats: Any, batch: Any, found: dict[str, Measured]
) -> None:
    found = jax.device_get(found)
    needed = _passes_needed(found)
    if needed > 1 and _depends_on_statistics(measure, batch_stats, batch, found):
        several = "a norm is called several times and normalizes"
        called = several if needed == math.inf else f"up to {needed} norms normalize"
        raise ValueError(
            f"batches can be iterated once only, but {called} by running statistics, so that those "
            "of later calls may still change in further passes. Pass a list, a data loader "
            "that can be iterated again, or a function that returns a new iterator: "
            "recalibrate(forward, variables, lambda: iter(loader)). Or say passes=1 for statistics "
            "of later calls that depend on the old ones."
        )


def _depends_on_statistics(
    measure: Measure, batch_stats: Any, batch: Any, found: dict[str, Measured]
) -> bool:
    """Says whether what norms take depends on the running statistics; of none in doubt."""
    # Statistics that are neither the old ones nor the batch's.
    moved = {
        path: one._replace(
            mean=one.mean + np.sqrt(one.var) / 2, var=2 * one.var, running_var_ddof=0 * one.count
        )
        for path, one in ((path, _read(one)) for path, one in found.items())
    }
    others = jax.device_get(
        measure(_recalibrated(batch_stats, moved, 1, batch_stats, 0.0), batch, 0)
    )
    called = {path: one for path, one in found.items() if np.any(one.by_running)}
    return not all(_measured_the_same(one, others[path]) for path, one in called.items())


def _measured_the_same(one: Measured, other: Measured) -> bool:
    of_one, of_other = ({"mean": each.mean, "var": each.var} for each in (one, other))
    is_known = np.any(one.count) and np.array_equal(one.count, other.count)
    return bool(is_known) and _agree_in_layer(of_one, of_other)


def _nothing_in(batches: Any, number: int) -> str:
    if number == 1:
        return (
            f"batches is empty: expected at least one batch, received none from the "
            f"{type(batches).__name__}. An iterator that has been used up gives none: pass a list."
        )
    return (
        f"batches gave nothing in pass {number}: expected the same as in the first. A function "
        "must return a new iterator each time: recalibrate(forward, variables, lambda: "
        "iter(loader))."
    )


@contextmanager
def _progress_bar(shown: bool) -> Iterator[Callable[[Iterable[Any], str], Iterable[Any]]]:
    if not shown:
        yield lambda batches, description: batches
        return
    try:
        from rich import console, progress
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True draws its bar with rich, which is not installed: pip install rich, or "
            "leave progress out.",
            name=error.name,
        ) from error
    columns = *progress.Progress.get_default_columns(), progress.MofNCompleteColumn()
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        yield lambda batches, description: bar.track(batches, description=description)


# --- the report ---------------------------------------------------------------------------------


def _changes(before: Any, after: Any, pools: dict[str, Measured]) -> Iterator[LayerChange]:
    new = batch_stats_by_path(after)
    for path, node in batch_stats_by_path(before).items():
        pool = pools.get(path)
        enters = np.zeros(()) if pool is None else _enters(pool)
        entered = np.broadcast_to(enters, np.shape(_arrays(node)["var"])).astype(bool)
        mean, var = _moved(_arrays(node), _arrays(new[path]))
        yield LayerChange(
            path,
            float(np.max(mean, initial=0, where=entered)),
            float(np.max(var, initial=1, where=entered)),
            float(np.min(pool.count[entered])) if pool and entered.any() else 0.0,
            int(np.sum(~entered)),
        )


def _moved(before: Arrays, after: Arrays) -> tuple[Array, Array]:
    """Returns how far the means moved in old standard deviations, and the variances' factors."""
    old, new = ({name: exact(leaf) for name, leaf in one.items()} for one in (before, after))
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(new["mean"] - old["mean"])
        mean = np.where(distance == 0, 0, distance / np.sqrt(old["var"]))
        factor = new["var"] / old["var"]
        var = np.where(new["var"] == old["var"], 1, np.maximum(factor, 1 / factor))
    return np.where(np.isnan(mean), math.inf, mean), np.where(np.isnan(var), math.inf, var)


def _row(layer: LayerChange) -> tuple[str, str, str, str]:
    values = f"{layer.values:.10g}"
    return _name(layer), f"{layer.mean:.4g} std", f"{layer.var:.4g} times", values


def _name(layer: LayerChange) -> str:
    return layer.path or "the top-level norm"


def _sentences(layer: LayerChange) -> list[str]:
    if layer.kept == 0:
        return []
    if layer.values == 0:
        return [
            f"{_name(layer)} has measured nothing and keeps its statistics: it is frozen or does "
            "not update, is of a class of its own, is not reached by forward, or in every batch "
            "nothing was valid or something was not finite."
        ]
    return [
        f"{_name(layer)} keeps the statistics of {layer.kept} features, which no batch entered: a "
        "batch does not where nothing is valid, or a single value is not finite."
    ]
