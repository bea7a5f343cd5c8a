"""Where bn_jax loses: a table made from the committed figures of other benchmarks.

``python -m benchmarks.document`` puts it into pages. It measures nothing by itself.
"""

from collections.abc import Iterator, Mapping
from statistics import geometric_mean
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks import compiled, domains, inference, layer, memory, startup
from benchmarks.timing import Timing

# The benchmarks whose figures `tables` takes, in its order.
READS = "layer", "step", "startup", "inference", "compiled", "memory", "domains"
# Ratios that print as 1.00 are no loss.
LEAST = 1.005
# Of a wall-clock time, how it compares with the disturbances of the machine.
WITHIN, BEYOND, DETERMINISTIC = "within the quartiles", "beyond the quartiles", "deterministic"


class Loss(NamedTuple):
    """A figure of ours that is larger than Flax's.

    Attributes:
        quantity: what was measured.
        case: of what.
        ratio: ours over Flax's.
        note: how sure it is.
    """

    quantity: str
    case: str
    ratio: float
    note: str


def tables(
    of_layer: Mapping[str, Any],
    of_step: Mapping[str, Any],
    of_startup: Mapping[str, Any],
    of_inference: Mapping[str, Any],
    of_compiled: Mapping[str, Any],
    of_memory: Mapping[str, Any],
    of_domains: Mapping[str, Any],
) -> list[Table]:
    """Returns two tables: where Flax is better, and which library is the fastest.

    Args:
        of_layer: the content of the JSON file of the benchmark; so are all others.
        of_step: as above.
        of_startup: as above.
        of_inference: as above.
        of_compiled: as above.
        of_memory: as above.
        of_domains: as above.
    """
    losses = [
        *_of_layer(of_layer),
        *_of_steps(of_step),
        *_of_startup(of_startup),
        *_of_inference(of_inference),
        *_of_compiled(of_compiled),
        *_of_memory(of_memory),
        *_of_masks(of_domains),
    ]
    table = Table(title="Where bn_jax takes more than Flax, the largest first", box=SIMPLE_HEAD)
    table.add_column("measured")
    table.add_column("case", justify="default")
    table.add_column("bn_jax / Flax", justify="right")
    table.add_column("how sure", justify="default")
    for loss in sorted(losses, key=lambda loss: -loss.ratio):
        if loss.ratio >= LEAST:
            table.add_row(loss.quantity, loss.case, f"{loss.ratio:.2f}", loss.note)
    return [table, _fastest(of_layer)]


def _of_layer(figures: Mapping[str, Any]) -> Iterator[Loss]:
    for (norm, dtype, direction), of_shapes in _by_case(figures):
        ratios = [arms[layer.OURS].median / arms[layer.FLAX].median for arms in of_shapes]
        slower = sum(ratio >= LEAST for ratio in ratios)
        note = f"worst shape {max(ratios):.2f}; slower in {slower} of {len(ratios)} shapes"
        case = f"{norm}, {dtype}, {direction}"
        yield Loss("time of a layer", case, geometric_mean(ratios), note)


def _by_case(
    figures: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, str, str], list[dict[str, Timing]]]]:
    """Yields norm, dtype and direction, and the timings of all arms for each shape."""
    for norm, by_dtype in layer.load(figures).items():
        for dtype, by_shape in by_dtype.items():
            for direction in layer.UNITS:
                yield (norm, dtype, direction), [one[direction] for one in by_shape.values()]


def _timed(quantity: str, case: str, ours: Timing, flax: Timing) -> Loss:
    is_within = ours.quartiles[0] <= flax.quartiles[2]
    return Loss(quantity, case, ours.median / flax.median, WITHIN if is_within else BEYOND)


def _of_steps(figures: Mapping[str, Any]) -> Iterator[Loss]:
    for network, by_dtype in figures["steps"].items():
        for dtype, arms in by_dtype.items():
            ours, flax = (Timing.load(arms[arm]) for arm in (startup.OURS, startup.FLAX))
            yield _timed("time of a training step", f"{network}, {dtype}", ours, flax)


def _of_startup(figures: Mapping[str, Any]) -> Iterator[Loss]:
    for dtype, by_arm in figures["steps"].items():
        ours, flax = by_arm[startup.OURS], by_arm[startup.FLAX]
        for phase in startup.PHASES:
            times = (Timing.load(arm["phases"][phase]) for arm in (ours, flax))
            yield _timed(f"time to {phase}", f"step of ResNet-50, {dtype}", *times)
        for size in ours["size"]:
            case = f"step of ResNet-50, {dtype}"
            yield _counted(f"{size} before XLA", case, ours["size"][size], flax["size"][size])
    for dtype, by_arm in figures["layers"].items():
        ours, flax = by_arm[startup.OURS], by_arm[startup.FLAX]
        for size in ours:
            yield _counted(f"{size} before XLA", f"layer, {dtype}", ours[size], flax[size])
    for call, by_arm in figures["calls"].items():
        times = (Timing.load(by_arm[arm]) for arm in (startup.OURS, startup.FLAX))
        yield _timed("time of a call on few values", call, *times)


def _counted(quantity: str, case: str, ours: float, flax: float) -> Loss:
    return Loss(quantity, case, ours / flax, DETERMINISTIC)


def _of_inference(figures: Mapping[str, Any]) -> Iterator[Loss]:
    for network, arms in inference.load(figures).items():
        ours, flax = arms["bn_jax"], arms["flax.linen"]
        yield _timed("time of inference", network, ours.timing, flax.timing)


def _of_compiled(figures: Mapping[str, Any]) -> Iterator[Loss]:
    for row, arms in compiled.load(figures).items():
        ours, flax = arms[compiled.OURS], arms[compiled.FLAX]
        chip = row.chip if row.chips == 1 else f"{row.chips} x {row.chip}"
        case = f"{row}, {row.dtype}, {chip}"
        yield _counted("bytes moved", case, ours.moved, flax.moved)
        # What is a hundredth of the input or less is no array of the size of the batch.
        if flax.temporary > row.unit / 100:
            yield _counted("temporary memory", case, ours.temporary, flax.temporary)


def _of_memory(figures: Mapping[str, Any]) -> Iterator[Loss]:
    for chip, arms in memory.load(figures).items():
        flax = arms[memory.FLAX]
        for arm in (memory.OURS, f"{memory.OURS}, guards"):
            case = f"step of ResNet-50, bfloat16, {chip}, {arm}"
            yield _counted("temporary memory", case, arms[arm].temporary, flax.temporary)
            yield _counted("bytes moved", case, arms[arm].moved, flax.moved)
            yield _counted("operations", case, arms[arm].flops, flax.flops)


def _of_masks(figures: Mapping[str, Any]) -> Iterator[Loss]:
    for row, cases in domains.load(figures).items():
        for case, of_flax in ((domains.PLAIN, domains.FLAX), (domains.MASK, domains.FLAX_MASK)):
            for passes in domains.PASSES:
                name = f"{case}, {row.inputs}, {row.dtype}, {row.chip}, {passes}"
                yield _counted("bytes moved", name, cases[case][passes], cases[of_flax][passes])


def _fastest(figures: Mapping[str, Any]) -> Table:
    """Returns which library is the fastest of all, layer by layer."""
    table = Table(title="The fastest library on a CPU, by the number of shapes", box=SIMPLE_HEAD)
    for column in ("norm", "dtype", "direction", "fastest"):
        table.add_column(column, justify="default")
    table.add_column("bn_jax / fastest of the others", justify="right")
    for case, of_shapes in _by_case(figures):
        peers = [layer.fastest_peer(arms) for arms in of_shapes]
        ratios = [
            arms[layer.OURS].median / arms[peer].median
            for arms, peer in zip(of_shapes, peers, strict=True)
        ]
        # The best of each shape, which may be ours.
        best = ["bn_jax" if ratio < 1 else peer for ratio, peer in zip(ratios, peers, strict=True)]
        counted = sorted(set(best), key=lambda name: (-best.count(name), name))
        shown = ", ".join(f"{name} {best.count(name)}" for name in counted)
        table.add_row(*case, shown, f"{geometric_mean(ratios):.2f}")
    return table
