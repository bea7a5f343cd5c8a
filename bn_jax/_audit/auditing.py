"""The public function of the audit."""

from collections.abc import Callable
from typing import Any

from bn_jax._audit.evidence import collect_evidence
from bn_jax._audit.findings import FINDERS, Case
from bn_jax._audit.observations import observe
from bn_jax._audit.report import Audit


def audit(
    forward: Callable[..., Any],
    variables: Any,
    batch: Any,
    *,
    weight_decay_mask: Any = None,
) -> Audit:
    """Finds faults of the batch norms of a model by running it on one batch.

    The model runs once in training and once in evaluation, compiled, on a copy that measures
    statistics instead of updating them. The program of evaluation is also read. If a bias seems to
    have no effect, training runs once more with another bias. Flax's batch norms are examined like
    those of `bn_jax`. The kinds of findings:

    - "never updated": the running statistics are the initial ones.
    - "stale": they are far from those of the batch, both in training and in evaluation, by more
      than chance explains (positions of an example are not counted as independent) and by enough
      to matter.
    - "differs in evaluation": they are far from those of the batch in evaluation alone, in more
      than a fifth of the features. Dropout before a norm has this effect.
    - "normalizes by the batch": evaluation uses the statistics of the batch.
    - "not finite": NaN or infinity in parameters, running statistics, or the input or output of a
      norm.
    - "dead features": a scale near 0 where others are not, or a variance under epsilon. A layer
      all of whose scales are 0, as the last of a residual branch starts, is healthy.
    - "bias without effect": a bias that is added directly before the norm, which removes it, and
      nowhere else. It is not reported if another such bias before it turns out to have an effect.
    - "weight decay": it applies to scale or bias of a norm, according to the mask.
    - "small batch": the variance that training normalizes by is a poor estimate.
    - "domain without examples": a norm by domain got no example of one.
    - "saturated": the activation after the norm, found in the program and differentiated, passes no
      gradient back: for most values (sigmoid, tanh), or for many units on the whole batch (ReLU
      and similar). A unit that few examples need may seem flat in a small batch.
    - "redundant scale": the output of the norm goes directly into linear operations only, which
      could hold scale and bias, or into another norm. A scale before a ReLU could move on as well;
      that is a matter of taste and not reported.

    What depends on the program is unknown (None, "unknown") for norms inside `jax.lax.scan` and
    similar loops, and for norms that are not found in it. For these norms, and where some values
    are masked, standard errors count every example once.

    Args:
        forward: for Linen and plain functions, ``forward(variables, batch, train)`` returns
            ``(y, updates)`` in both modes, with the new statistics in ``updates["batch_stats"]``:
            ``lambda variables, x, train: model.apply(variables, x, train=train,
            mutable=["batch_stats"])``. For NNX, ``forward(model, batch)``.
        variables: ``{"params": ..., "batch_stats": ...}``, or the `nnx.Module`. It is not changed.
        batch: a tree of arrays with examples along the first axis: as many as a training step
            takes, and not the batch of the last step.
        weight_decay_mask: the ``mask`` passed to Optax: a tree (a leaf may stand for a whole
            branch) or a function of the parameters, True where weight decay applies. None skips
            this kind.

    Returns:
        An `Audit` with `layers` and `findings`; print it, or call its `plot`.

    Raises:
        ValueError: there is no batch norm, the batch has no example, `forward` does not return the
            updated statistics, or `weight_decay_mask` covers no parameter of a norm.
        TypeError: `variables` is neither a mapping nor a module.

    Example:
        >>> import jax, jax.numpy as jnp, bn_jax as bn
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), bn.nnx.BatchNorm(3, rngs=rngs))
        >>> x = jax.random.normal(jax.random.key(0), (64, 4))
        >>> report = bn.audit(lambda model, x: model(x), model, x)
        >>> [(finding.kind, finding.path) for finding in report.findings]
        [('never updated', 'layers/1'), ('bias without effect', 'layers/1')]

    Reference: Wu & He 2018, "Group Normalization", https://arxiv.org/abs/1803.08494 (small
    batches); Li et al. 2019, https://arxiv.org/abs/1801.05134 (dropout and running variances).
    """
    observed = observe(forward, variables, batch)
    norms = collect_evidence(observed)
    case = Case(observed.model, norms, weight_decay_mask)
    return Audit(
        layers=tuple(norm.as_layer() for norm in norms),
        findings=tuple(finding for find in FINDERS for finding in find(case)),
        unexamined=observed.model.whitening,
    )
