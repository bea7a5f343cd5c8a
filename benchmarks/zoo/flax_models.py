"""Models of the zoo in Flax: Linen and NNX, with their own norms and with ours."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from unittest.mock import patch

import flax.linen as nn
import jax
from flax import nnx

import bn_jax as bn
from benchmarks.zoo.imports import load
from benchmarks.zoo.specimens import (
    CHANNELS,
    CLASSES,
    EXAMPLES,
    Entry,
    Functional,
    Specimen,
    images,
    in_double,
    perturbed,
    population_statistics,
    rounded,
)

Apply = Callable[..., Any]

# Norms of Flax without running statistics.
_STATELESS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)
_STATELESS_NNX = (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


# --- Linen --------------------------------------------------------------------------------------


def _functional(apply: Apply, variables: Any) -> Functional:
    def train(params: Any, statistics: Any, batch: Any) -> tuple[Any, Any]:
        y, updates = apply({"params": params, "batch_stats": statistics}, batch, True)
        return y, updates["batch_stats"]

    def evaluate(params: Any, statistics: Any, batch: Any) -> Any:
        return apply({"params": params, "batch_stats": statistics}, batch, False)[0]

    return Functional(variables["params"], variables["batch_stats"], train, evaluate)


def _exact_statistics(model: Functional, data: Any) -> Any:
    with jax.enable_x64(True):
        params, statistics, batch = in_double((model.params, model.statistics, data))
        double = model._replace(params=params, statistics=statistics)
        return jax.device_get(population_statistics(double, batch))


def _paths(initialize: Callable[[], Any], kinds: tuple[type[nn.Module], ...]) -> frozenset[str]:
    """Returns the paths of the modules of some classes, as they are called."""
    found = set()

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if type(context.module) in kinds:
            found.add("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        # A new function, or JAX would remember its trace and call no module.
        jax.eval_shape(lambda: initialize())
    return frozenset(found)


def _linen(
    name: str,
    package: str,
    model: nn.Module,
    apply: Apply,
    data: Any,
    *,
    norm: type[nn.Module] = nn.BatchNorm,
    in_place: Callable[[Apply], Apply] = bn.linen.replace_norms,
    **options: Any,
) -> Specimen:
    """Returns a specimen of a Linen model; ``apply(variables, batch, train)`` calls it."""
    example = tuple(array[:2] for array in data)

    def initialize() -> Any:
        return model.init(jax.random.key(0), *example)

    initial = jax.jit(initialize)()
    params = perturbed(initial["params"])
    theirs = _functional(apply, {**initial, "params": params})
    exact = _exact_statistics(theirs, data)
    variables = {"params": params, "batch_stats": rounded(exact, theirs.statistics)}
    return Specimen(
        name=name,
        package=package,
        library="Linen",
        model=_functional(apply, variables),
        forward=lambda variables, batch: apply(variables, batch, False)[0],
        variables=variables,
        norms=_paths(initialize, (norm,)),
        other_norms=_paths(initialize, _STATELESS),
        data=data,
        # The tools know no class of another package: such a model gets ours first.
        native=apply if norm is nn.BatchNorm else in_place(apply),
        ours=_functional(in_place(apply), variables),
        exact=exact,
        double=theirs,
        **options,
    )


def _with_training(model: nn.Module) -> Apply:
    """How a model of flaim is called."""

    def apply(variables: Any, batch: Any, train: bool) -> Any:
        return model.apply(variables, *batch, training=train, mutable=["batch_stats"])

    return apply


def flaim_resnet() -> Specimen:
    """ResNet-D with bottlenecks, and squeeze-and-excitation after the last norm of a block."""
    resnet = load("flaim.models.resnet")
    model = resnet.ResNet(
        depths=(1, 1),
        dim_per_cardinal_first_stage=4,
        stem=partial(resnet.ResNetDStem, out_dims=(8, 8, 16)),
        downsample=partial(resnet.ResNetDownsample, avg_pool=True),
        attention=load("flaim.layers").SE,
        n_classes=CLASSES,
    )
    return _linen("flaim ResNet", "flaim", model, _with_training(model), images())


def flaim_regnet() -> Specimen:
    """RegNet: grouped convolutions between pointwise ones."""
    regnet = load("flaim.models.regnet")
    model = regnet.RegNet(depths=(1, 2), out_dims=(16, 24), dim_per_cardinal=8, n_classes=CLASSES)
    return _linen("flaim RegNet", "flaim", model, _with_training(model), images())


def flaim_convmixer() -> Specimen:
    """ConvMixer: norms after the activation, before a sum or the next convolution."""
    mixer = load("flaim.models.convmixer")
    model = mixer.ConvMixer(depth=2, dim=16, patch_size=4, kernel_size=5, n_classes=CLASSES)
    return _linen("flaim ConvMixer", "flaim", model, _with_training(model), images())


def flaim_van() -> Specimen:
    """VAN: norms before attention by large kernels, biases before norms, layer norms."""
    van = load("flaim.models.van")
    model = van.VAN(
        depths=(1, 1),
        out_dims=(8, 16),
        mlp_hidden_dim_expansion_factors=(2.0, 2.0),
        n_classes=CLASSES,
    )
    return _linen("flaim VAN", "flaim", model, _with_training(model), images())


def flaim_efficientnet() -> Specimen:
    """EfficientNetV2: fused and depthwise blocks, squeeze-and-excitation, SiLU."""
    net = load("flaim.models.efficientnetv2")
    model = net.EfficientNetV2(
        blocks=(net.ResConvBNAct, net.FusedMBConv, net.MBConv),
        depths=(1, 1, 2),
        out_dims=(8, 12, 16),
        strides=(1, 2, 2),
        expansion_factors=(1, 2, 2),
        n_classes=CLASSES,
        head_conv_bn_act_dim=32,
    )
    return _linen("flaim EfficientNetV2", "flaim", model, _with_training(model), images())


def _by_mutability(model: nn.Module) -> Apply:
    """How a model of jax-resnet is called: it trains wherever its statistics are mutable."""

    def apply(variables: Any, batch: Any, train: bool) -> Any:
        if train:
            return model.apply(variables, *batch, mutable=["batch_stats"])
        return model.apply(variables, *batch), {"batch_stats": variables["batch_stats"]}

    return apply


def _jax_resnet(name: str, block: str, sizes: tuple[int, int], **options: Any) -> Specimen:
    resnet = load("jax_resnet")
    model = resnet.ResNet(
        partial(getattr(resnet, block), **options),
        stage_sizes=[1, 1],
        n_classes=CLASSES,
        hidden_sizes=sizes,
        stem_cls=partial(resnet.ResNetDStem, stem_width=8),
    )
    apply = _by_mutability(model)
    return _linen(name, "jax-resnet", model, apply, images(), trains_where_mutable=True)


def jax_resnet() -> Specimen:
    """ResNet-D of jax-resnet."""
    return _jax_resnet("jax-resnet ResNet-D", "ResNetDBlock", (8, 16))


def jax_resnest() -> Specimen:
    """ResNeSt of jax-resnet: attention over the parts of a grouped convolution."""
    return _jax_resnet("jax-resnet ResNeSt", "ResNeStBottleneckBlock", (8, 8), base_width=64)


def crossq() -> Specimen:
    """The critics of CrossQ: an ensemble by `nn.vmap`, with batch renormalization of its own."""
    policies = load("sbx.crossq.policies")
    model = policies.VectorCritic(net_arch=(16, 16), activation_fn=nn.relu)
    keys = jax.random.split(jax.random.key(1))
    data = (
        jax.random.normal(keys[0], (EXAMPLES * 8, 6)),
        jax.random.normal(keys[1], (EXAMPLES * 8, 2)),
    )

    def apply(variables: Any, batch: Any, train: bool) -> Any:
        return model.apply(variables, *batch, train, mutable=["batch_stats"])

    def in_place(apply: Apply) -> Apply:
        def ours(warmup_steps: int, **options: Any) -> nn.Module:
            # In its warm-up theirs is batch norm.
            return bn.linen.BatchRenorm(r_max=1.0, d_max=0.0, epsilon=1e-3, **options)

        def replaced(variables: Any, batch: Any, train: bool) -> Any:
            with patch.object(policies, "BatchRenorm", ours):
                return apply(variables, batch, train)

        return replaced

    return _linen(
        "sbx-rl CrossQ critics",
        "sbx-rl",
        model,
        apply,
        data,
        norm=policies.BatchRenorm,
        in_place=in_place,
        members=model.n_critics,
    )


# --- NNX ----------------------------------------------------------------------------------------


def _functional_of_module(module: nnx.Module) -> Functional:
    graphs: dict[bool, Any] = {}
    for is_training in (True, False):
        (module.train if is_training else module.eval)()
        graphs[is_training], *states = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    params, statistics, others = states

    def call(is_training: bool, params: Any, statistics: Any, batch: Any) -> Any:
        model = nnx.merge(graphs[is_training], params, statistics, others, copy=True)
        return model(*batch), nnx.state(model, nnx.BatchStat)

    return Functional(
        params,
        statistics,
        partial(call, True),
        lambda params, statistics, batch: call(False, params, statistics, batch)[0],
    )


def _nnx(name: str, package: str, module: nnx.Module, data: Any) -> Specimen:
    nnx.update(module, perturbed(nnx.state(module, nnx.Param)))
    theirs = _functional_of_module(module)
    exact = _exact_statistics(theirs, data)
    nnx.update(module, rounded(exact, theirs.statistics))
    return Specimen(
        name=name,
        package=package,
        library="NNX",
        model=_functional_of_module(module),
        forward=lambda module, batch: module(*batch),
        variables=module,
        norms=_paths_in(module, (nnx.BatchNorm,)),
        other_norms=_paths_in(module, _STATELESS_NNX),
        data=data,
        native=module,
        ours=_functional_of_module(bn.nnx.replace_norms(nnx.clone(module))),
        exact=exact,
        double=theirs,
    )


def _paths_in(module: nnx.Module, kinds: tuple[type[nnx.Module], ...]) -> frozenset[str]:
    nodes = nnx.iter_graph(module)
    return frozenset("/".join(map(str, path)) for path, node in nodes if isinstance(node, kinds))


def jaxnn_resnet() -> Specimen:
    """ResNet-D of jaxnn."""
    resnet = load("jaxnn.models.resnet")
    with warnings.catch_warnings():
        # It reads and sets `Variable.value`, which is deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        module = resnet.ResNet(
            resnet.Bottleneck,
            layers=(1, 1),
            channels=(4, 8),
            num_classes=CLASSES,
            in_chans=CHANNELS,
            stem_type="deep",
            stem_width=8,
            avg_down=True,
            norm_dtype=None,
            rngs=nnx.Rngs(0),
        )
    return _nnx("jaxnn ResNet-D", "jaxnn", module, images())


def jaxkit_mlp() -> Specimen:
    """The residual multilayer perceptron of jaxkit."""
    jaxkit = load("jaxkit")
    data = (jax.random.normal(jax.random.key(2), (EXAMPLES * 8, 6)),)
    module = jaxkit.FullyConnected(
        [6, 16, 16, 16, CLASSES], activation="silu", dropout=None, rngs=nnx.Rngs(0)
    )
    return _nnx("jaxkit FullyConnected", "jaxkit", module, data)


FLAX_MODELS: Mapping[str, Entry] = {
    "flaim ResNet": Entry("Linen", flaim_resnet),
    "flaim RegNet": Entry("Linen", flaim_regnet),
    "flaim ConvMixer": Entry("Linen", flaim_convmixer),
    "flaim VAN": Entry("Linen", flaim_van),
    "flaim EfficientNetV2": Entry("Linen", flaim_efficientnet),
    "jax-resnet ResNet-D": Entry("Linen", jax_resnet),
    "jax-resnet ResNeSt": Entry("Linen", jax_resnest),
    "sbx-rl CrossQ critics": Entry("Linen", crossq),
    "jaxnn ResNet-D": Entry("NNX", jaxnn_resnet),
    "jaxkit FullyConnected": Entry("NNX", jaxkit_mlp),
}
