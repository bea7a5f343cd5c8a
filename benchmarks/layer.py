"""The time of one norm in training on a CPU: ours and every peer's.

``python -m benchmarks.layer`` measures the forward pass, and forward plus backward pass, of batch,
layer and RMS norm in float32 and bfloat16. All libraries run interleaved in one process, together
with a copy of as many bytes. It prints the tables and writes ``layer.json``. `measure` takes
arguments to measure less:

    >>> from benchmarks import layer, report
    >>> found = layer.measure(["BatchNorm"], ["float32"], [(4096, 512)], ["haiku"], rounds=9)
    >>> report.show(layer.tables({"norms": layer.as_json(found)}))

A forward pass maps scale, bias, state and x to the output and the new state. The backward pass maps
the cotangent of the output to the gradients of x, scale and bias; JAX compiles it together with the
forward pass. All libraries must agree before anything is timed.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from statistics import geometric_mean
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.timing import Timing, in_turns, keep_freed_memory, seconds_of

ROUNDS = 20
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm")
SHAPES: tuple[tuple[int, ...], ...] = (
    (32, 28, 28, 128),
    (32, 14, 14, 256),
    (16, 56, 56, 64),
    (8, 7, 7, 512),
    (4096, 512),
)
# The largest difference that rounding explains, relative to the largest value.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
# PyTorch's layer norm sums the gradients of scale and bias in bfloat16, with errors up to a fifth.
TOLERANCES_OF_SUMS = {("torch", "LayerNorm", "bfloat16"): 0.5}
FORWARD, BOTH = "forward", "forward + backward"
# The least number of arrays like x that are read and written if the forward pass ends before the
# cotangent is known: forward 2 reads and 1 write, backward 4 reads and 1 write.
UNITS = {FORWARD: 3, BOTH: 8}
OURS, FLAX = "bn_jax.linen", "flax.linen"
COPY, COPY_UNITS = "copy", 2
# PyTorch's threads occupy the cores for some milliseconds after a call, so PyTorch ends a round.
PAUSE = 1e-2
MOMENTUM, EPSILON = 0.99, 1e-5

Shape = tuple[int, ...]
Figures = dict[str, dict[str, dict[str, dict[str, dict[str, Timing]]]]]


class Case(NamedTuple):
    """A measurement: a norm over the last axis, trained on x of a dtype and a shape."""

    norm: str
    dtype: str
    shape: Shape


class Batch(NamedTuple):
    """The arrays that every library gets. Scale and bias are float32; RMS norm has no bias."""

    params: dict[str, np.ndarray]
    x: np.ndarray
    cotangent: np.ndarray


class Outputs(NamedTuple):
    """The results of a program of any library. A forward pass has no gradients."""

    y: Any
    state: Any
    d_params: Any = None
    d_x: Any = None


class Layer(NamedTuple):
    """A layer of a JAX library as a pure function from params, state and x to y and new state."""

    apply: Callable[[Any, Any, Any], tuple[Any, Any]]
    state: Any


Program = Callable[[], Any]
Programs = dict[str, Program]
Name = tuple[Case, str, str]


class Arm(NamedTuple):
    """A library.

    Attributes:
        package: the module that must be importable.
        programs: makes the programs of a case, by direction.
        norms: the norms that are measured.
        install: the arguments of pip that install it.
    """

    package: str
    programs: Callable[[Case, Batch], Programs]
    norms: tuple[str, ...] = NORMS
    install: str = "--editable '.[bench]'"


def _linen(library: Any, case: Case) -> Layer:
    modes = {"use_running_average": False, "momentum": MOMENTUM}
    module = getattr(library, case.norm)(
        dtype=case.dtype, epsilon=EPSILON, **modes if case.norm == "BatchNorm" else {}
    )
    state = dict(module.init(jax.random.key(0), jnp.zeros(case.shape)))
    state.pop("params")

    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        return module.apply({"params": params, **state}, x, mutable=["batch_stats"])

    return Layer(apply, state)


def _nnx(library: Any, case: Case) -> Layer:
    modes = {"momentum": MOMENTUM} if case.norm == "BatchNorm" else {}
    kind = getattr(library, case.norm)
    module = kind(case.shape[-1], dtype=case.dtype, epsilon=EPSILON, rngs=nnx.Rngs(0), **modes)
    split: Any = nnx.split(module, nnx.Param, ...)
    definition, own, state = split

    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        module = nnx.merge(definition, _filled(own, params), state, copy=True)
        return module(x), nnx.state(module, nnx.Not(nnx.Param))

    return Layer(apply, state)


def _filled(own: Any, params: Any) -> Any:
    """Puts bias and scale into the tree of a library; their order is the same under any name."""
    values = zip(jax.tree.leaves(own), jax.tree.leaves(params), strict=True)
    return jax.tree.unflatten(
        jax.tree.structure(own), [value.reshape(like.shape) for like, value in values]
    )


def _in_float32(layer: Layer) -> Layer:
    """Adapts a library whose outputs or statistics would have another dtype than ours."""

    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        y, state = layer.apply(params, state, x.astype(jnp.float32))
        return y.astype(x.dtype), state

    return layer._replace(apply=apply)


def _haiku(case: Case) -> Layer:
    import haiku

    def call(x: jax.Array) -> jax.Array:
        match case.norm:
            case "BatchNorm":
                return haiku.BatchNorm(True, True, MOMENTUM, EPSILON)(x, is_training=True)
            case "LayerNorm":
                return haiku.LayerNorm(-1, True, True, EPSILON, param_axis=-1)(x)
        return haiku.RMSNorm(-1, EPSILON, param_axis=-1)(x)

    transformed: Any = haiku.transform_with_state(call)
    own, state = transformed.init(None, jnp.zeros(case.shape))

    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        return transformed.apply(_filled(own, params), state, None, x)

    return _in_float32(Layer(apply, state))


def _equinox(case: Case) -> Layer:
    import equinox

    features = case.shape[-1]
    if case.norm == "BatchNorm":
        make = equinox.nn.make_with_state(equinox.nn.BatchNorm)
        layer, state = make(features, "batch", EPSILON, momentum=MOMENTUM, mode="batch")
    else:
        kind = getattr(equinox.nn, case.norm)
        layer, state = kind(features, EPSILON, use_bias=case.norm == "LayerNorm"), ()

    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        own = equinox.tree_at(
            lambda one: [one.weight, one.bias][: len(params)],
            layer,
            [params[name] for name in ("scale", "bias") if name in params],
        )
        if case.norm == "BatchNorm":
            over_batch = jax.vmap(own, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
            y, state = over_batch(jnp.moveaxis(x, -1, 1), state)
            return jnp.moveaxis(y, 1, -1), state
        return jax.vmap(own)(x.reshape(-1, features)).reshape(x.shape), state

    return _in_float32(Layer(apply, state))


def _keras(case: Case) -> Layer:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    policy = "mixed_bfloat16" if case.dtype == "bfloat16" else case.dtype
    modes = {"momentum": MOMENTUM} if case.norm == "BatchNorm" else {}
    layer = getattr(keras.layers, f"{case.norm}alization")(epsilon=EPSILON, dtype=policy, **modes)
    layer.build(case.shape)
    call = {"training": True} if case.norm == "BatchNorm" else {}

    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        own = [params[name] for name in ("scale", "bias") if name in params]
        return layer.stateless_call(own, state, x, **call)

    return Layer(apply, [one.value for one in layer.non_trainable_variables])


def _compiled(make: Callable[[Case], Layer], case: Case, batch: Batch) -> Programs:
    """Compiles a layer of a JAX library."""
    layer = make(case)

    def forward(params: Any, state: Any, x: Any) -> Outputs:
        return Outputs(*layer.apply(params, state, x))

    def both(params: Any, state: Any, x: Any, cotangent: Any) -> Outputs:
        y, pullback, state = jax.vjp(
            lambda params, x: layer.apply(params, state, x), params, x, has_aux=True
        )
        return Outputs(y, state, *pullback(cotangent))

    arguments = jax.device_put((batch.params, layer.state, batch.x))
    cotangent = jax.device_put(batch.cotangent)
    return {
        FORWARD: partial(jax.jit(forward), *arguments),
        BOTH: partial(jax.jit(both), *arguments, cotangent),
    }


def _torch(case: Case, batch: Batch) -> Programs:
    """Makes the programs of PyTorch, with as many threads as XLA uses and channels last."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = getattr(torch, case.dtype)
    is_image = case.norm == "BatchNorm" and len(case.shape) == 4
    name = case.norm + ("2d" if is_image else "1d") * (case.norm == "BatchNorm")
    modes = {"momentum": 1 - MOMENTUM} if case.norm == "BatchNorm" else {}
    module = getattr(torch.nn, name)(case.shape[-1], eps=EPSILON, **modes)

    def tensor(values: np.ndarray) -> Any:
        converted = torch.tensor(values.astype(np.float32), dtype=dtype)
        return converted.permute(0, 3, 1, 2) if is_image else converted

    def features_last(values: Any) -> Any:
        return values.permute(0, 2, 3, 1) if is_image else values

    learned = list(module.parameters())
    with torch.no_grad():
        for own, value in zip(learned, batch.params.values(), strict=True):
            own.copy_(torch.from_numpy(value))
    if case.norm == "RMSNorm":
        module.to(dtype)  # RMS norm promotes; the others accept a float32 scale.
    x, cotangent = tensor(batch.x), tensor(batch.cotangent)
    x_with_gradient = x.clone().requires_grad_()

    def forward() -> Outputs:
        with torch.no_grad():
            return Outputs(features_last(module(x)), list(module.buffers()))

    def both() -> Outputs:
        y = module(x_with_gradient)
        d_x, *d_params = torch.autograd.grad(y, (x_with_gradient, *learned), cotangent)
        gradients = dict(zip(batch.params, d_params, strict=True))
        return Outputs(features_last(y), list(module.buffers()), gradients, features_last(d_x))

    return {FORWARD: forward, BOTH: both}


ARMS = {
    OURS: Arm("bn_jax", partial(_compiled, partial(_linen, bn.linen))),
    "bn_jax.nnx": Arm("bn_jax", partial(_compiled, partial(_nnx, bn.nnx)), NORMS[:1]),
    FLAX: Arm("flax", partial(_compiled, partial(_linen, nn))),
    "flax.nnx": Arm("flax", partial(_compiled, partial(_nnx, nnx)), NORMS[:1]),
    "haiku": Arm("haiku", partial(_compiled, _haiku)),
    "equinox": Arm("equinox", partial(_compiled, _equinox)),
    "keras": Arm("keras", partial(_compiled, _keras), NORMS[:1]),
    "torch": Arm("torch", _torch, install="torch"),
}


def draw(case: Case) -> Batch:
    """Returns arrays for a case. The mean of x is near the running mean, 0."""
    rng = np.random.default_rng(0)
    features = case.shape[-1]
    params = {
        "scale": rng.uniform(0.5, 1.5, features).astype(np.float32),
        "bias": rng.standard_normal(features).astype(np.float32),
    }
    if case.norm == "RMSNorm":
        del params["bias"]
    x, cotangent = rng.standard_normal((2, *case.shape), np.float32)
    return Batch(
        params, *(np.asarray(one, jnp.dtype(case.dtype)) for one in (1 + 2 * x, cotangent))
    )


def require_agreement(case: Case, programs: Mapping[str, Programs]) -> None:
    """Runs every program once; raises if its results differ from the first library's."""
    expected: dict[str, Any] = {}
    for arm, by_direction in programs.items():
        of_sums = TOLERANCES_OF_SUMS.get((arm, case.norm, case.dtype), TOLERANCES[case.dtype])
        for direction, program in by_direction.items():
            found = program()._replace(state=None)
            leaves = [np.asarray(_readable(leaf), np.float64) for leaf in jax.tree.leaves(found)]
            for one, other in zip(leaves, expected.setdefault(direction, leaves), strict=True):
                error = np.abs(one - other).max() / np.abs(other).max()
                if not error <= (of_sums if one.ndim == 1 else TOLERANCES[case.dtype]):
                    raise AssertionError(
                        f"{arm} and {next(iter(programs))} differ by {error:.1e} in {direction} "
                        f"of {case}: they do not compute the same function and cannot be compared."
                    )


def _readable(leaf: Any) -> Any:
    """Converts a tensor of PyTorch with bfloat16 or gradients to one that NumPy can read."""
    return leaf.detach().float() if hasattr(leaf, "detach") else leaf


def programs_of(case: Case, arms: Iterable[str]) -> dict[str, Programs]:
    """Returns `COPY` and the programs of a case by arm, after a check that they agree."""
    batch = draw(case)
    programs = {
        arm: ARMS[arm].programs(case, batch) for arm in arms if case.norm in ARMS[arm].norms
    }
    require_agreement(case, programs)
    # Integers, because a copy in half precision would also convert values.
    integers = jnp.zeros(batch.x.nbytes // 4, jnp.int32)
    return {COPY: dict.fromkeys(UNITS, partial(jax.jit(lambda x: x + 1), integers)), **programs}


def after_itself(program: Callable[[], Any]) -> tuple[float, float]:
    """Times the second of two calls, which finds its arrays in the caches."""
    jax.block_until_ready(program())
    return seconds_of(program)


def missing() -> dict[str, str]:
    """Returns the install command of each arm that is not installed."""
    return {
        name: f"python -m pip install {arm.install}"
        for name, arm in ARMS.items()
        if find_spec(arm.package) is None
    }


def measure(
    norms: Sequence[str] = NORMS,
    dtypes: Sequence[str] = tuple(TOLERANCES),
    shapes: Sequence[Shape] = SHAPES,
    arms: Sequence[str] = tuple(ARMS),
    rounds: int = ROUNDS,
) -> Figures:
    """Compiles and times everything, with a progress bar.

    A round is one call of every arm in every case. A disturbance of some seconds therefore affects
    a few rounds of all arms, and no median.

    Args:
        norms: some of `NORMS`.
        dtypes: some of `TOLERANCES`.
        shapes: of x, features last.
        arms: some of `ARMS`. `OURS` and `FLAX` are always included; arms that are not installed
            are left out.
        rounds: how often each program is timed.

    Returns:
        The timings by norm, dtype, shape, direction and arm; `COPY` is one of the arms.
    """
    wanted = {OURS, FLAX, *arms}.difference(missing())
    cases = list(map(Case._make, product(norms, dtypes, shapes)))
    by_arm: dict[str, dict[Name, Program]] = {arm: {} for arm in (COPY, *ARMS)}
    keep_freed_memory()
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(cases) + rounds)
        for case in cases:
            progress.update(task, description=f"{case.norm}, {case.dtype}, {named(case.shape)}")
            for arm, programs in programs_of(case, filter(wanted.__contains__, ARMS)).items():
                for direction, program in programs.items():
                    by_arm[arm][case, direction, arm] = program
            progress.advance(task)
        progress.update(task, description=f"{rounds} rounds")
        return _nested(_time(by_arm, rounds, partial(progress.advance, task)))


def _time(
    by_arm: Mapping[str, Mapping[Name, Program]], rounds: int, advance: Callable[[], object]
) -> dict[Name, Timing]:
    def end_round() -> None:
        time.sleep(PAUSE)
        advance()

    in_order = {name: program for own in by_arm.values() for name, program in own.items()}
    return in_turns(in_order, rounds, end_round, after_itself)


def _nested(timings: Mapping[Name, Timing]) -> Figures:
    figures: Figures = {}
    for (case, direction, arm), timing in timings.items():
        by_shape = figures.setdefault(case.norm, {}).setdefault(case.dtype, {})
        by_shape.setdefault(named(case.shape), {}).setdefault(direction, {})[arm] = timing
    return figures


def as_json(figures: Figures) -> dict[str, Any]:
    """Returns figures in the form of the JSON."""
    return _map_timings(Timing._asdict, figures)


def load(known: Mapping[str, Any]) -> Figures:
    """Reads the figures of the JSON."""
    return _map_timings(Timing.load, known["norms"])


def _map_timings(function: Callable[[Any], Any], tree: Any, depth: int = 5) -> Any:
    """Applies a function below norm, dtype, shape, direction and arm."""
    if depth == 0:
        return function(tree)
    return {name: _map_timings(function, branch, depth - 1) for name, branch in tree.items()}


def named(shape: Shape) -> str:
    """Returns the name of a shape."""
    return "x".join(map(str, shape))


def limit(direction: str, timings: Mapping[str, Timing]) -> float:
    """Returns the seconds that a copy takes for the bytes that the direction must move."""
    return timings[COPY].median * UNITS[direction] / COPY_UNITS


def fastest_peer(timings: Mapping[str, Timing]) -> str:
    """Returns the fastest arm of another library."""
    peers = [arm for arm in timings if arm != COPY and not arm.startswith("bn_jax")]
    return min(peers, key=lambda arm: timings[arm].median)


def rows(figures: Figures, norm: str) -> Iterator[tuple[str, str, str, dict[str, Timing]]]:
    """Yields dtype, shape, direction, and the timings of the arms."""
    for dtype, by_shape in figures[norm].items():
        for shape, by_direction in by_shape.items():
            for direction, timings in by_direction.items():
                yield dtype, shape, direction, timings


def norm_table(figures: Figures, norm: str) -> Table:
    """Returns the table of a norm: our milliseconds, and the others' time divided by ours."""
    *_, timings = next(rows(figures, norm))
    peers = [arm for arm in timings if arm not in (COPY, OURS)]
    table = Table(
        title=f"{norm}: ms of {OURS}; time of the others / {OURS} (above 1: {OURS} is faster)",
        caption=(
            "limit: the time that a copy, measured in the same run, takes for the bytes of "
            f"{UNITS[FORWARD]} arrays like x (forward) or {UNITS[BOTH]} (forward + backward)"
        ),
        box=SIMPLE_HEAD,
    )
    for column in ("dtype", "shape", "direction", f"{OURS} ms", *peers, "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for dtype, shape, direction, timings in rows(figures, norm):
        ours = timings[OURS].median
        others = [*(timings[arm].median for arm in peers), limit(direction, timings)]
        ratios = [f"{other / ours:.2f}" for other in others]
        table.add_row(dtype, shape, direction, f"{1e3 * ours:.3f}", *ratios)
    return table


def headline(figures: Figures) -> Table:
    """Returns our time relative to the fastest peer, to Flax and to the limit, over all shapes."""
    table = Table(
        title=f"Time of {OURS} / time of others: geometric mean over the shapes (worst shape)",
        box=SIMPLE_HEAD,
    )
    for column in ("norm", "dtype", "direction", "fastest peer", FLAX, "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    for norm, direction in product(figures, UNITS):
        for dtype, by_shape in figures[norm].items():
            of_shapes = [timings[direction] for timings in by_shape.values()]
            table.add_row(
                norm,
                dtype,
                direction,
                *map(
                    _summary,
                    zip(*(_over_others(direction, timings) for timings in of_shapes), strict=True),
                ),
            )
    return table


def _over_others(direction: str, timings: Mapping[str, Timing]) -> list[float]:
    ours = timings[OURS].median
    others = (timings[fastest_peer(timings)].median, timings[FLAX].median)
    return [ours / other for other in (*others, limit(direction, timings))]


def _summary(ratios: Sequence[float]) -> str:
    return f"{geometric_mean(ratios):.2f} ({max(ratios):.2f})"


def tables(known: Mapping[str, Any]) -> list[Table]:
    """Returns the figures of the JSON as tables: the headline, and one for each norm."""
    figures = load(known)
    return [headline(figures), *(norm_table(figures, norm) for norm in figures)]


def main() -> None:
    """Measures, writes the JSON and prints the tables."""
    folder = report.parser("layer", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    found = measure()
    packages = ("jaxlib", "flax", "dm-haiku", "equinox", "keras", "torch")
    report.finish("layer", folder, packages, {"rounds": ROUNDS, "norms": as_json(found)}, tables)
    for arm, command in missing().items():
        print(f"{arm} is not installed and was left out. Install it with: {command}")


if __name__ == "__main__":
    main()
