"""Passes over a data set that make the statistics of one norm after another exact.

The statistics of the n-th norm depend on the outputs of the norms before it. In each pass, every
norm normalizes by given statistics and measures its input. The first pass makes the first norm
exact, whatever statistics were given. The second pass normalizes by what the first one measured,
and makes the second norm exact, and so on. So nothing depends on how the data is split into
batches; single examples are enough. Batches that are normalized by their own statistics (PreciseBN,
`update_bn`) need only one pass, but what follows the first norm then comes from a network that
normalizes every batch differently.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from bn_jax._core.running import promote_batch_stats
from bn_jax._core.types import Measured
from bn_jax._paths import batch_stats_by_path, whitening_paths
from bn_jax._program import PureForward, as_pure
from bn_jax._recalibrate import pooling
from bn_jax._recalibrate.batches import (
    Inputs,
    about_no_batches,
    inputs_of,
    note_parts,
    opened,
    progress_bar,
)
from bn_jax._recalibrate.measuring import Forward, prepare
from bn_jax._recalibrate.pooling import Passed, Pools
from bn_jax._recalibrate.processes import as_local, gather, is_global
from bn_jax._recalibrate.report import Recalibration
from bn_jax._transfers import devices_of, fetch, place_like, put

# Measures a batch with given running statistics, and returns the measurements on the device.
Measure: TypeAlias = Callable[[Any, int], Pools]

# The limit where a norm depends on itself: statistics that settle at all have settled by then.
PASSES_OF_A_LOOP = 100


def recalibrate(
    forward: Forward,
    variables: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    inputs: str | int | Callable[[Any], Any] | None = None,
    prior: float = 0.0,
    passes: int | None = None,
    progress: bool = False,
) -> Recalibration:
    """Measures the exact population statistics of every batch norm over a data set.

    If `forward` evaluates, every pass over the batches normalizes by the statistics of the previous
    pass. After `k` passes the first `k` norms on any path have ::

        mean = sum(x) / n,    var = sum(|x - mean|**2) / (n - running_var_ddof)

    with the sums over all `n` values of a feature in the whole data set, however it is split: in
    uneven or masked batches, or into single examples. Passes continue until no statistic changes
    beyond rounding, at most as many as there are norms (each norm under a lifted transform counts);
    every pass costs an evaluation of the data set. A norm that is called several times is measured
    by all its calls together. Its statistics depend on themselves, and passes continue until they
    settle. Dropout is off. Use this where the running statistics were not averaged under these
    weights or on this data: for averaged weights (SWA, EMA), and pruned, quantized or converted
    ones.

    If `forward` trains, every batch is normalized by its own statistics, and these are pooled by
    their counts in a single pass: what PreciseBN and PyTorch's `update_bn` approximate.

    With a `prior`, every norm keeps that share of its old statistics (test-time adaptation to data
    from another distribution than the training data) ::

        new_mean = prior * old_mean + (1 - prior) * mean
        new_var = prior * old_var + (1 - prior) * var

    where `mean` and `var` are those of the input if the norms before it normalize by their new,
    mixed statistics. With little data, keep much: `N` pseudo-examples of the training data beside
    the `n` examples in `batches`, as Schneider et al. count, are ``prior = N / (N + n)``. AdaBN (Li
    et al.) keeps nothing, ``prior=0``.

    A norm by domain measures each domain by its own examples, and a domain without any keeps its
    statistics.

    Each batch is one compiled step, and its moments are merged in double precision on the host;
    memory does not grow with the number of batches. All transfers are explicit, so that
    ``jax.transfer_guard("disallow")`` allows them. Flax's norms are measured like those of
    `bn_jax`; a subclass of a norm of Flax keeps its statistics.

    With several processes (`jax.distributed`), every process calls this function and passes batches
    of its own, as many as it has. After each pass they merge what they have measured by counts, so
    that all return the statistics of all batches. If the batches are global arrays, all processes
    pass the same ones.

    Args:
        forward: called as ``forward(variables, batch)``. It returns ``(y, updates)`` with the new
            statistics in ``updates["batch_stats"]``, as ``model.apply(variables, x, train=False,
            mutable=["batch_stats"])`` does; for an `nnx.Module`, which ``model.eval()`` makes
            evaluate, it may return anything. It is compiled once for all passes and calls, and
            again for batches of another shape. As with `jax.jit`, values that it reads from outside
            are those of the first call.
        variables: ``{"params": ..., "batch_stats": ...}``, or an `nnx.Module`. They are not
            changed.
        batches: what a data loader yields: an iterable that can be iterated once per pass, or a
            function without arguments that returns an iterator. Arrays may be those of NumPy, or
            convert to these, as tensors of PyTorch and TensorFlow do.
        inputs: what of a batch `forward` gets: an index or a key, as ``inputs=0`` for ``(x, y)``
            and ``inputs="image"`` for a dictionary, or a function of the batch. None: the whole
            batch, of which `forward` can choose.
        prior: the share of the old statistics in the new ones, in [0, 1). Old statistics that are
            not finite get no share.
        passes: the largest number of passes. None: as many as are needed.
        progress: whether to show a progress bar on standard error; it needs rich.

    Returns:
        `Recalibration`: the new statistics, and what changed. A norm that measured nothing, because
        it is frozen or because `forward` does not reach it, keeps its statistics, and so does a
        feature that no batch enters; the printed text says which. A single valid value that is not
        finite keeps its whole batch out of the feature; the text says how many values were left out
        of which norms. A ``count`` of batches becomes the number of batches here that had values of
        the feature, divided by ``1 - prior``, so that later updates still weigh all batches the
        same.

    Raises:
        ValueError: `prior` is not in [0, 1); there is no batch norm, or there is a whitening norm;
            there are no batches; `forward` returns no updated statistics; a second pass is needed
            over an iterator that gives its batches once; statistics are too large for their dtype;
            or variables are split over processes, but batches are not.
        TypeError: `variables` is neither a mapping nor a module; `batches` is one batch or an
            array; or a batch has no such part as `inputs`, or holds what is no array.
        ModuleNotFoundError: ``progress=True`` without rich.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, bn_jax as bn
        >>> model = nn.BatchNorm(use_running_average=True)
        >>> x = jnp.array([[1.0], [3.0], [8.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> def forward(variables, batch):
        ...     return model.apply(variables, batch, mutable=["batch_stats"])
        >>> result = bn.recalibrate(forward, variables, [x[:1], x[1:]])
        >>> result.batch_stats["mean"].tolist(), round(result.batch_stats["var"].item(), 4)
        ([4.0], 8.6667)
        >>> print(result)
        norm                mean moved by  variance changed  values
        the top-level norm  4 std          8.667 times       3
        >>> adapted = bn.recalibrate(forward, variables, [x], prior=9 / (9 + len(x)))
        >>> round(adapted.batch_stats["mean"].item(), 4)  # 3/4 of 0 and 1/4 of 4
        1.0

    Reference: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm",
    https://arxiv.org/abs/2105.07576 (batches normalized by their own statistics); Schneider et
    al. 2020, "Improving robustness against common corruptions by covariate shift adaptation",
    https://arxiv.org/abs/2006.16971 (the prior); Li et al. 2016, "Revisiting Batch Normalization
    For Practical Domain Adaptation", https://arxiv.org/abs/1603.04779 (adaptation without a prior).
    """
    if not 0 <= prior < 1:
        raise ValueError(
            f"prior={prior} must be in [0, 1): it is the share of the old statistics in the new. "
            "For N pseudo-examples beside n examples write prior=N / (N + n)."
        )
    if passes is not None and passes < 1:
        raise ValueError(f"passes={passes} must be at least 1, or None for as many as are needed.")
    pure, arrays = as_pure(forward, variables)
    given = promote_batch_stats(pure.batch_stats(arrays))
    _require_batch_norms(given)
    model = _Model(pure, given, pure.others(arrays))
    initial = current = fetch(given)
    limit: float = PASSES_OF_A_LOOP if passes is None else passes
    is_iterator = isinstance(batches, Iterator) and limit > 1
    number, settled = 0, False
    with progress_bar(progress) as show:
        while not settled and number < limit:
            number += 1
            shown = show(opened(batches), f"pass {number}")
            passed = _measure_all(model, current, shown, inputs, is_iterator)
            if passed.batches == 0:
                raise ValueError(about_no_batches(batches, number))
            before = current
            current = pooling.replace_statistics(before, passed, initial, prior)
            needed = 1 if is_iterator else pooling.passes_needed(passed.pools)
            settled = number >= needed or pooling.agree(before, current)
            if passes is None and needed < math.inf:
                limit = needed
    return Recalibration(
        batch_stats=place_like(current, given),
        layers=tuple(pooling.changes(initial, current, passed)),
        passes=number,
        settled=settled,
        batches=passed.batches,
    )


def _require_batch_norms(batch_stats: Any) -> None:
    if paths := whitening_paths(batch_stats):
        raise ValueError(
            f"variables holds whitening norms, {paths}, whose covariances are not measured and "
            "would be stale; expected batch norms alone. Average them over the data instead: in a "
            "model with WhiteningNorm(momentum=None) and new initial statistics, in training mode "
            "without steps of the optimizer."
        )
    if not batch_stats_by_path(batch_stats):
        raise ValueError(
            "variables holds no batch norm: expected a mean and a var of each in "
            "variables['batch_stats'], or in the nnx.BatchStat variables of a module. Pass "
            "{'params': params, 'batch_stats': batch_stats} with what model.init or training "
            "returned."
        )


class _Model:
    """A model that measures batches, on the devices where its variables are."""

    def __init__(self, pure: PureForward, batch_stats: Any, others: Any) -> None:
        self._pure = pure
        self._batch_stats = batch_stats
        self._others = others

    def with_statistics(self, statistics: Any) -> Measure:
        """Returns what measures a batch with running statistics, which are on the host."""

        @cache
        def prepared(is_of_all_processes: bool) -> tuple[Callable[..., Pools], Any, Any]:
            batch_stats, others = self._batch_stats, self._others
            if not is_of_all_processes:
                batch_stats, others = as_local(batch_stats), as_local(others)
            devices = devices_of((batch_stats, others))
            placed = put(place_like(statistics, batch_stats), devices)
            return prepare(self._pure, put(others, devices)), placed, devices

        def measure(batch: Any, number: int) -> Pools:
            step, placed, devices = prepared(is_global(batch))
            return step(placed, put(batch, devices), put(np.int32(number), devices))

        return measure


def _measure_all(
    model: _Model, statistics: Any, batches: Iterable[Any], inputs: Inputs, is_iterator: bool
) -> Passed:
    """Returns what all batches, of all processes, have measured together."""
    measure = model.with_statistics(statistics)
    passed, waiting, is_together = pooling.NOTHING, None, False
    for number, batch in enumerate(batches):
        chosen = inputs_of(batch, inputs)
        try:
            measured = measure(chosen, number)
        except Exception as error:
            if inputs is None:
                note_parts(error, batch)
            raise
        if waiting is None:
            is_together = is_global(chosen)
            if is_iterator:
                _require_one_pass(model, statistics, chosen, fetch(measured))
        else:
            # Read one step late, so that the device computes the next one meanwhile.
            passed = passed.with_batch(fetch(waiting))
        waiting = measured
    if waiting is not None:
        passed = passed.with_batch(fetch(waiting))
    return passed if is_together else pooling.merge(gather(passed))


# --- iterators that give their batches once -----------------------------------------------------


def _require_one_pass(model: _Model, statistics: Any, batch: Any, measured: Pools) -> None:
    """Raises an error if a further pass over the data is needed."""
    needed = pooling.passes_needed(measured)
    if needed > 1 and _depends_on_statistics(model, statistics, batch, measured):
        if needed == math.inf:
            reason = "a norm is called several times and normalizes"
        else:
            reason = f"up to {needed} norms normalize"
        raise ValueError(
            f"batches can be iterated once only, but {reason} by running statistics, so that those "
            "of later calls may still change in further passes. Pass a list, a data loader "
            "that can be iterated again, or a function that returns a new iterator: "
            "recalibrate(forward, variables, lambda: iter(loader)). Or pass passes=1 for "
            "statistics of later calls that depend on the old ones."
        )


def _depends_on_statistics(model: _Model, statistics: Any, batch: Any, measured: Pools) -> bool:
    """Tells whether inputs of norms depend on the running statistics; True if in doubt.

    It measures the batch a second time, with other statistics than the old ones and the batch's.
    """
    changed = {path: _changed(pooling.as_double(norm)) for path, norm in measured.items()}
    passed = pooling.NOTHING.with_batch(changed)
    others = pooling.replace_statistics(statistics, passed, statistics, 0.0)
    again = fetch(model.with_statistics(others)(batch, 0))
    return not all(
        pooling.is_measured_again(norm, again[path])
        for path, norm in measured.items()
        if np.any(norm.by_running)
    )


def _changed(measured: Measured) -> Measured:
    return measured._replace(
        mean=measured.mean + np.sqrt(measured.var) / 2,
        var=2 * measured.var,
        running_var_ddof=0 * measured.count,
    )
