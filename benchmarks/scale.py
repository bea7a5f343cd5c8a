"""Scaling with the number of devices: collectives and memory, from 1 to 256 chips.

``python -m benchmarks.scale`` compiles the training step of bn_jax and single layers for slices of
TPU v5e, ahead of time and without a chip. It prints the figures of the compiled programs and writes
``scale.json``. Every chip has the same number of examples. Programs that this file already holds
are not compiled again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.compilers import V5E, identify, mesh_of, remembered
from benchmarks.hlo import Collective, collectives
from bn_jax import training
from bn_jax.lab.fitting import make_optimizer
from bn_jax.lab.models import Norm, ResNet

SLICES = {1: "1x1", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"}
NO_NORM = "no norm"


class Sizes(NamedTuple):
    """What is compiled.

    Attributes:
        examples: examples on each device.
        image_shape: [H, W, C] of an image of the training step.
        widths: channels of the stages of its residual network, one block per stage.
        layer_shape: [H, W, F] of an example of the single layers.
    """

    examples: int = 256
    image_shape: tuple[int, int, int] = (32, 32, 3)
    widths: tuple[int, ...] = (64, 128, 256)
    layer_shape: tuple[int, int, int] = (16, 16, 256)


class Traffic(NamedTuple):
    """Collective operations, and the values and bytes that each device contributes to them."""

    operations: int
    elements: int
    bytes: int


class Program(NamedTuple):
    """The figures of a compiled program.

    Attributes:
        kinds: number of collectives of each kind outside of conditionals.
        always: all collectives outside of conditionals.
        guarded: all collectives in branches of conditionals.
        arguments: bytes of the arguments on each device.
        outputs: bytes of the results on each device.
        temporary: bytes of everything else in the main memory of each device.
        accessed: bytes that each device reads and writes, as the compiler counts them: in main
            memory and in on-chip memory, with branches, and with copies between the memories.
        program: its hash from `identify`.
    """

    kinds: dict[str, int]
    always: Traffic
    guarded: Traffic
    arguments: int
    outputs: int
    temporary: int
    accessed: int
    program: str

    @property
    def memory(self) -> int:
        """All bytes in the main memory of a device."""
        return self.arguments + self.outputs + self.temporary


class Layer(NamedTuple):
    """A single norm to compile: under `shard_map` with an `axis_name`, else under sharded `jit`."""

    norm: Norm
    axis_name: str | None = None


Programs = dict[str, dict[int, Program]]


class Findings(NamedTuple):
    """The programs of every arm by number of devices, and the number of norms in a step."""

    sizes: Sizes
    norm_layers: int
    norm_features: int
    steps: Programs
    layers: Programs


def arms(examples: int) -> dict[str, Norm | None]:
    """Returns the norms of the training step. Ghost groups are the examples of one device."""
    ours = partial(bn.linen.BatchNorm, momentum=0.9)
    return {
        NO_NORM: None,
        "bn_jax": ours,
        "bn_jax, ghost": partial(ours, virtual_batch_size=examples),
        "flax.linen": partial(nn.BatchNorm, momentum=0.9),
    }


def single_layers(examples: int) -> dict[str, Layer]:
    """Returns the single layers."""
    # With the guard, to see the collectives of its branch.
    ours = partial(bn.linen.BatchNorm, dtype=jnp.bfloat16, use_fast_variance=False)
    flax = partial(nn.BatchNorm, dtype=jnp.bfloat16)
    return {
        "bn_jax, jit": Layer(ours),
        "bn_jax, shard_map": Layer(ours, training.DATA_AXIS),
        "bn_jax, ghost, jit": Layer(partial(ours, virtual_batch_size=examples)),
        "flax.linen, jit": Layer(flax),
        "flax.linen, shard_map": Layer(flax, training.DATA_AXIS),
    }


def placed(tree: Any, mesh: Mesh, *axes: str) -> Any:
    """Returns the shapes of a tree on a mesh, with the leading axis split over `axes`."""
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def initial_state(norm: Norm | None, mesh: Mesh, sizes: Sizes) -> Any:
    """Returns the shapes of the state of the training step."""
    model = ResNet(10, (1,) * len(sizes.widths), sizes.widths, norm=norm)
    optimizer = make_optimizer(0.1, total_steps=100)
    create = partial(training.create_state, model, optimizer, sizes.image_shape, 0, mesh)
    return placed(jax.eval_shape(create), mesh)


def lower_step(norm: Norm | None, mesh: Mesh, sizes: Sizes) -> jax.stages.Lowered:
    """Lowers `bn_jax.training.train_step` as `bn_jax.lab.fitting.fit` does."""
    examples = sizes.examples * mesh.size
    batch: Any = training.Batch(
        jax.ShapeDtypeStruct((examples, *sizes.image_shape), jnp.float32),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct((examples,), jnp.int32),  # type: ignore[arg-type]
        jax.ShapeDtypeStruct((examples,), jnp.bool_),  # type: ignore[arg-type]
    )
    step = jax.jit(training.train_step, out_shardings=NamedSharding(mesh, PartitionSpec()))
    state = initial_state(norm, mesh, sizes)
    return step.lower(state, placed(batch, mesh, training.DATA_AXIS))


def lower_layer(layer: Layer, mesh: Mesh, sizes: Sizes) -> jax.stages.Lowered:
    """Lowers output, new running statistics and gradients of a layer on masked bfloat16 input."""
    examples = sizes.examples * mesh.size
    x = jax.ShapeDtypeStruct((examples, *sizes.layer_shape), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((examples, 1, 1, 1), jnp.bool_)
    module = layer.norm(use_running_average=False, axis_name=layer.axis_name)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)

    def forward_and_backward(variables: Any, x: Any, mask: Any, cotangent: Any) -> Any:
        def forward(params: Any, x: Any) -> Any:
            return module.apply(
                {**variables, "params": params}, x, mask=mask, mutable="batch_stats"
            )

        y, pullback, updated = jax.vjp(forward, variables["params"], x, has_aux=True)
        d_params, d_x = pullback(cotangent)
        return (updated, d_params), (y, d_x)

    replicated, split = PartitionSpec(), PartitionSpec(training.DATA_AXIS)
    function: Callable[..., Any] = forward_and_backward
    if layer.axis_name is not None:
        in_specs = (replicated, split, split, split)
        function = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=(replicated, split)
        )
    out_shardings = tuple(NamedSharding(mesh, spec) for spec in (replicated, split))
    arguments = placed(variables, mesh), *placed((x, mask, x), mesh, training.DATA_AXIS)
    return jax.jit(function, out_shardings=out_shardings).lower(*arguments)


def measure(lowered: jax.stages.Lowered, mesh: Mesh, known: Mapping[str, Program]) -> Program:
    """Reads a program; compiles it only if it is not known yet."""
    program = identify(mesh, lowered)
    if program in known:
        return known[program]
    compiled = lowered.compile()
    found = collectives(compiled.as_text() or "")
    always = [one for one in found if not one.guarded]
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    return Program(
        kinds=dict(Counter(one.kind for one in always)),
        always=_traffic(always),
        guarded=_traffic([one for one in found if one.guarded]),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        accessed=int(cost["bytes accessed"]),
        program=program,
    )


def _traffic(found: Sequence[Collective]) -> Traffic:
    return Traffic(len(found), sum(one.elements for one in found), sum(one.bytes for one in found))


def measure_all(meshes: Sequence[Mesh], sizes: Sizes, known: Mapping[str, Program]) -> Findings:
    """Measures every arm on every mesh, with a progress bar."""
    programs: dict[str, dict[str, Callable[[Mesh], jax.stages.Lowered]]] = {
        "steps": {
            arm: partial(lower_step, norm, sizes=sizes)
            for arm, norm in arms(sizes.examples).items()
        },
        "layers": {
            arm: partial(lower_layer, layer, sizes=sizes)
            for arm, layer in single_layers(sizes.examples).items()
        },
    }
    found: dict[str, Programs] = {name: {} for name in programs}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(meshes) * sum(map(len, programs.values())))
        for name, by_arm in programs.items():
            for arm, lower_on in by_arm.items():
                found[name][arm] = {}
                for mesh in meshes:
                    progress.update(task, description=f"{arm}, {mesh.size} devices")
                    found[name][arm][mesh.size] = measure(lower_on(mesh), mesh, known)
                    progress.advance(task)
    return Findings(sizes, *_normalized(meshes[0], sizes), found["steps"], found["layers"])


def _normalized(mesh: Mesh, sizes: Sizes) -> tuple[int, int]:
    """Returns the number of norm layers of the training step, and of all their features."""
    stats = jax.tree.leaves(initial_state(bn.linen.BatchNorm, mesh, sizes).batch_stats)
    return len(stats) // 2, sum(leaf.size for leaf in stats) // 2


def per_layer(findings: Findings, arm: str, devices: int) -> tuple[float, float]:
    """Returns the collectives, and their bytes, that a norm layer adds to a step."""
    one, other = (findings.steps[name][devices].always for name in (arm, NO_NORM))
    return (
        (one.operations - other.operations) / findings.norm_layers,
        (one.bytes - other.bytes) / findings.norm_layers,
    )


def step_cell(findings: Findings, arm: str, devices: int) -> str:
    """Formats a step: collectives and their bytes per norm layer, and memory."""
    memory = f"{findings.steps[arm][devices].memory / 1e6:.1f} MB"
    if arm == NO_NORM:
        return memory
    operations, size = per_layer(findings, arm, devices)
    return f"{operations:.2f} / {size:.0f} B / {memory}"


def layer_cell(findings: Findings, arm: str, devices: int) -> str:
    """Formats a layer: collectives and their values; in parentheses, in the guard's branch."""
    program = findings.layers[arm][devices]
    guarded = program.guarded
    branch = f" ({guarded.operations} / {guarded.elements})" if guarded.operations else ""
    return f"{program.always.operations} / {program.always.elements}{branch}"


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns tables of the layers and of the step, with a column for each slice."""
    findings = load(figures)
    features = findings.sizes.layer_shape[-1]
    shown = (
        (
            f"A layer of {features} features, forward and backward, with a mask: collectives / "
            "values per device (in parentheses: in the guard's branch, which is rarely taken)",
            findings.layers,
            layer_cell,
        ),
        (
            f"A training step of {findings.norm_layers} norm layers, of {findings.norm_features:,} "
            "features in all: collectives per norm layer / their bytes per device and norm layer / "
            "memory per device. The first two exclude the collectives of the network without "
            "norms, whose convolutions have biases",
            findings.steps,
            step_cell,
        ),
    )
    made = []
    for title, programs, cell in shown:
        table = Table(title=title, box=SIMPLE_HEAD)
        table.add_column("chips", no_wrap=True)
        for devices in next(iter(programs.values())):
            table.add_column(str(devices), justify="right", no_wrap=True)
        for arm, by_devices in programs.items():
            table.add_row(arm, *(cell(findings, arm, devices) for devices in by_devices))
        made.append(table)
    return made


def load(figures: Mapping[str, Any]) -> Findings:
    """Reads the findings of the JSON."""

    def programs(arms: Mapping[str, Any]) -> Programs:
        return {
            arm: {int(devices): _program(found) for devices, found in by_devices.items()}
            for arm, by_devices in arms.items()
        }

    sizes: dict[str, Any] = {
        name: tuple(size) if isinstance(size, list) else size
        for name, size in figures["sizes"].items()
    }
    return Findings(
        Sizes(**sizes),
        figures["norm_layers"],
        figures["norm_features"],
        programs(figures["steps"]),
        programs(figures["layers"]),
    )


def _program(figures: Mapping[str, Any]) -> Program:
    traffic = {name: Traffic(**figures[name]) for name in ("always", "guarded")}
    return Program(**{**figures, **traffic})


def known_programs(figures: Any) -> dict[str, Program]:
    """Returns the programs of the JSON, if there is one, by their hash from `identify`."""
    return {
        program: _program({**found, "program": program})
        for program, found in remembered(figures).items()
    }


def main() -> None:
    """Compiles, writes the JSON and prints the tables."""
    folder = report.parser("scale", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    meshes = [mesh_of(V5E, layout) for layout in SLICES.values()]
    findings = measure_all(meshes, Sizes(), known_programs(report.read_all("scale")))
    report.finish("scale", folder, ("flax", "libtpu"), {"chip": V5E, **findings._asdict()}, tables)


if __name__ == "__main__":
    main()
