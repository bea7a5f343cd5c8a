"""The memory of a ResNet-50 training step in bfloat16 under each `bn_jax.remat_policy`.

``python -m benchmarks.memory`` compiles the training step of every arm for a TPU v5e, ahead of time
and without a chip. In bfloat16, norms have no guard; those of one arm ask for it. Each program
takes some minutes. The command prints the figures of the compiled programs and writes
``memory.json``. Programs that this file already holds are not compiled again.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.progress import Progress
from rich.table import Table

import bn_jax as bn
from benchmarks import report
from benchmarks.compilers import V5E, identify, lower_for, mesh_of, read, remembered
from bn_jax.lab.models import Bottleneck, Norm, ResNet
from bn_jax.remat import Keep, Policy

FLAX, OURS = "flax.linen", "bn_jax"
CHIPS = (V5E,)
# Where to apply each policy: the inputs of blocks are kept anyway, those of a loss are not.
WHERE: dict[Keep, str] = {
    "inputs": "loss",
    "narrow": "blocks",
    "moments": "blocks",
}


class Sizes(NamedTuple):
    """The network, on RGB images, and its batch.

    Attributes:
        examples: images in a batch.
        side: height and width of an image.
        stage_sizes: number of blocks in each stage.
        widths: number of channels in each stage.
        classes: number of logits.
    """

    examples: int = 128
    side: int = 224
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    classes: int = 1000


class Arm(NamedTuple):
    """A norm, and where the step is rematerialized.

    Attributes:
        norm: constructor of the norms.
        loss: policy of the `jax.checkpoint` around the loss; None: there is none.
        blocks: policy of the `nn.remat` around every block; None: there is none.
    """

    norm: Norm
    loss: Policy | None = None
    blocks: Policy | None = None


class Measured(NamedTuple):
    """The figures of a compiled step.

    Attributes:
        temporary: bytes of main memory in addition to arguments and results.
        moved: bytes that the kernels read from main memory and write to it, without the guards.
        flops: floating-point operations, including the branches of the guards.
        guards: number of conditionals, one for each measurement of a batch.
        kernels: number of kernels outside of the guards.
    """

    temporary: int
    moved: int
    flops: int
    guards: int
    kernels: int


def arms() -> dict[str, Arm]:
    """Returns the arms, Flax's norms first."""
    flax = partial(nn.BatchNorm, momentum=0.9)
    ours = partial(bn.linen.BatchNorm, momentum=0.9)
    return {
        FLAX: Arm(flax),
        f"{FLAX}, blocks": Arm(flax, blocks=jax.checkpoint_policies.nothing_saveable),
        OURS: Arm(ours),
        f"{OURS}, guards": Arm(partial(ours, use_fast_variance=False)),
        **{
            f"{OURS}, {where}: {keep}": _with_policy(ours, keep, where)
            for keep, where in WHERE.items()
        },
    }


def _with_policy(norm: Norm, keep: Keep, where: str) -> Arm:
    policy: dict[str, Any] = {where: bn.remat_policy(keep)}
    return Arm(norm, **policy)


def make_step(arm: Arm, sizes: Sizes) -> tuple[Callable[..., Any], tuple[Any, Any, Any]]:
    """Returns a step of gradient descent and the shapes of its arguments: variables and a batch."""
    block: Any = Bottleneck
    if arm.blocks is not None:
        block = nn.remat(block, static_argnums=(2,), policy=arm.blocks)
    model = ResNet(
        sizes.classes,
        sizes.stage_sizes,
        sizes.widths,
        block,
        arm.norm,
        stem="7x7",
        dtype=jnp.bfloat16,
    )

    def loss(params: Any, batch_stats: Any, images: Any, labels: Any) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(variables, images, True, mutable=["batch_stats"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
        return -jnp.mean(chosen), updates

    if arm.loss is not None:
        loss = jax.checkpoint(loss, policy=arm.loss)

    def step(variables: Any, images: Any, labels: Any) -> Any:
        params = variables["params"]
        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(
            params, variables["batch_stats"], images, labels
        )
        params = jax.tree.map(lambda one, gradient: one - 0.1 * gradient, params, gradients)
        return {"params": params, **updates}, value

    images = jax.ShapeDtypeStruct((sizes.examples, sizes.side, sizes.side, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((sizes.examples,), jnp.int32)
    variables = jax.eval_shape(lambda images: model.init(jax.random.key(0), images, False), images)
    return step, (variables, images, labels)


def measure(arm: Arm, mesh: Mesh, sizes: Sizes, known: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the step of an arm; compiles it only if its program is not known yet."""
    lowered = lower_for(mesh, *make_step(arm, sizes))
    program = identify(mesh, lowered)
    if program in known:
        return {**known[program], "program": program}
    compiled = lowered.compile()
    cost: Any = compiled.cost_analysis()
    found = read(compiled)
    return {
        **Measured(
            temporary=found.temporary,
            moved=found.moved,
            flops=int(cost["flops"]),
            guards=len(re.findall(r" conditional\(", compiled.as_text() or "")),
            kernels=found.kernels,
        )._asdict(),
        "program": program,
    }


def load(figures: Mapping[str, Any]) -> dict[str, dict[str, Measured]]:
    """Reads the figures of the JSON by chip and arm."""
    return {
        chip: {arm: Measured(*map(one.get, Measured._fields)) for arm, one in found.items()}
        for chip, found in figures["chips"].items()
    }


def cells(measured: Mapping[str, Measured], arm: str) -> list[str]:
    """Shows memory, bytes and operations of an arm, relative to the arm with Flax's norms."""
    one, other = measured[arm], measured[FLAX]
    return [
        f"{one.temporary / other.temporary:.2f}",
        f"{one.moved / other.moved:.2f}",
        f"{one.flops / other.flops:.2f}",
    ]


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """Returns the figures as a table."""
    table = Table(title="A step of ResNet-50, relative to flax.linen", box=SIMPLE_HEAD)
    for column in ("", "chip", "memory MB", "moved GB", "GFLOP", "kernels", "guards"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("memory", "bytes", "operations"):
        table.add_column(column, justify="right", no_wrap=True)
    for chip, measured in load(figures).items():
        for arm, one in measured.items():
            table.add_row(
                arm,
                chip,
                f"{one.temporary / 1e6:.0f}",
                f"{one.moved / 1e9:.2f}",
                f"{one.flops / 1e9:.0f}",
                str(one.kernels),
                str(one.guards),
                *cells(measured, arm),
            )
    return [table]


def main() -> None:
    """Measures, writes the JSON and prints the table."""
    folder = report.parser("memory", __doc__).parse_args().folder
    jax.config.update("jax_platforms", "cpu")
    sizes, known = Sizes(), remembered(report.read_all("memory"))
    found: dict[str, dict[str, Any]] = {chip: {} for chip in CHIPS}
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=sum(len(arms()) for chip in found))
        for chip, measured in found.items():
            for name, arm in arms().items():
                progress.update(task, description=f"{chip}: {name}")
                measured[name] = measure(arm, mesh_of(chip), sizes, known)
                progress.advance(task)
    report.finish(
        "memory", folder, ("flax", "libtpu"), {"sizes": sizes._asdict(), "chips": found}, tables
    )


if __name__ == "__main__":
    main()
