import re
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import assert_close, define_moments, standard_normal

import bn_jax as bn
from bn_jax._audit import is_initial
from bn_jax.lab import models

EXAMPLES = 64


pytestmark = pytest.mark.usefixtures("compile_quickly")


Norm = partial(bn.linen.BatchNorm, momentum=0.0)


class Net(nn.Module):
    """Dense layer, norm and activation, twice, then a classifier; the options add faults."""

    norm: type = Norm
    activation: object = nn.tanh
    use_bias: bool = False
    between: object = staticmethod(lambda x, train: x)
    options: object = None

    @nn.compact
    def __call__(self, x, train, mask=None):
        for number, activation in enumerate([nn.relu, self.activation]):
            x = nn.Dense(8, use_bias=self.use_bias and number == 1, name=f"dense_{number}")(x)
            if number == 1:
                x = self.between(x, train)
            options = (self.options or {}) if number == 1 else {}
            norm = self.norm(name=f"norm_{number}", **options)
            given = {"mask": mask} if mask is not None else {}
            x = activation(norm(x, use_running_average=not train, **given))
        return nn.Dense(2, name="classifier")(x)


def forward_of(model):
    return lambda variables, x, train: model.apply(
        variables, x, train=train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(5)}
    )


def inputs(seed, examples=EXAMPLES):
    return standard_normal(seed, (examples, 6)) + 1


def healthy(model, x):
    """Variables with the running statistics of another batch than the audited one."""

    @jax.jit
    def prepare(x):
        variables = model.init(jax.random.key(0), x, train=False)
        return {**variables, **forward_of(model)(variables, x, True)[1]}

    return jax.tree.map(np.array, prepare(x))


def audited(model, variables=None, x=None, **options):
    if variables is None:
        variables = healthy(model, inputs(0))
    return bn.audit(forward_of(model), variables, inputs(1) if x is None else x, **options)


def with_statistics(model, variables, x):
    """The same variables with the running statistics of a batch."""
    return jax.tree.map(np.array, {**variables, **forward_of(model)(variables, x, True)[1]})


def kinds(report):
    return [(finding.kind, finding.path) for finding in report.findings]


@pytest.fixture(scope="module")
def sound():
    return healthy(Net(), inputs(0))


def broken(variables, path, change):
    """A copy with the leaf at a path changed in place, or replaced by what `change` returns."""
    variables = jax.tree.map(np.copy, variables)
    *parents, name = path.split("/")
    node = variables
    for parent in parents:
        node = node[parent]
    changed = change(node[name])
    node[name] = node[name] if changed is None else changed
    return variables


def at(index, value):
    def change(leaf):
        leaf[index] = value

    return change


# --- healthy models -----------------------------------------------------------------------------


def test_a_healthy_model_has_no_finding(sound):
    x = inputs(1)
    before = jax.tree.map(np.copy, sound)
    report = audited(Net(), sound, x, weight_decay_mask=bn.optim.no_weight_decay_mask)
    assert report.findings == ()
    assert str(report).endswith("\n\nNo findings.")
    chex.assert_trees_all_equal(sound, before)
    first, second = report.layers
    _, mean, var = define_moments(x @ sound["params"]["dense_0"]["kernel"])
    assert (first.path, first.features, first.values) == ("norm_0", 8, EXAMPLES)
    assert_close(first.batch_mean, mean, tolerance=1e-5)
    assert_close(first.batch_var, var, tolerance=1e-5)
    running = sound["batch_stats"]["norm_0"]
    assert_close(first.running_mean, np.float64(running["mean"]))
    assert_close(first.running_var, np.float64(running["var"]))
    # Of independent values the errors are known: each of the two batches has its own.
    off = np.abs(mean - running["mean"]) / np.sqrt(np.minimum(var, running["var"]))
    assert first.mean_off == pytest.approx(off.max(), rel=1e-3)
    worst = off.argmax()
    error = np.sqrt((var + running["var"]) / (EXAMPLES - 1))[worst]
    assert first.mean_errors == pytest.approx(off.max() * np.sqrt(var)[worst] / error, rel=0.1)
    factor = np.exp(np.abs(np.log(var / running["var"])).max())
    assert first.var_off == pytest.approx(factor, rel=1e-3)
    assert first.var_error == pytest.approx(np.sqrt(2 / EXAMPLES), rel=0.25)
    assert first.saturated == 0
    assert 0 < second.saturated < 0.1


def test_notebooks_show_a_short_line_and_tables(sound):
    report = audited(Net(), sound)
    assert repr(report) == "Audit(2 norms, 0 findings)"
    html = report._repr_html_()
    assert html.startswith("<table><thead><tr><th>layer</th><th>features</th><th>values</th>")
    assert "<tr><td>norm_0</td><td>8</td><td>64</td>" in html
    assert "</table><p>values: of a feature in the batch; mean off: " in html
    assert html.endswith("</p><p>No findings.</p>")
    finding = bn.Finding("stale", "", "The mean is < 1.", "Measure it.")
    html = report._replace(findings=(finding,))._repr_html_()
    assert "<th>finding</th><th>norm</th><th>message</th><th>advice</th>" in html
    row = "stale", "the top-level norm", "The mean is &lt; 1.", "Measure it."
    assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in html


def inputs_as_images(seed):
    return standard_normal(seed, (32, 6, 6, 1))


class EveryBlock(nn.Module):
    """One block of every kind, in a row."""

    norm: object = Norm

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(models.ConvNorm(4, norm=self.norm)(x, train))
        for kind in (models.PlainBlock, models.DepthwiseBlock, models.BasicBlock):
            x = kind(4, norm=self.norm)(x, train)
        x = models.Bottleneck(2, (2, 2), norm=self.norm)(x, train)
        x = models.PreActivationBlock(8, norm=self.norm)(x, train)
        x = nn.relu(self.norm(name="last")(x, use_running_average=not train))
        return nn.Dense(2)(jnp.mean(x, (1, 2)))


def test_blocks_of_every_kind_have_no_finding():
    model, x = EveryBlock(), inputs_as_images(3)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    rng = np.random.default_rng(0)

    def draw(leaf):
        spread = 0.1 if len(leaf.shape) == 1 else np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return np.float32((len(leaf.shape) == 1) + spread * rng.normal(size=leaf.shape))

    variables = jax.tree.map(draw, shapes)
    _, updates = jax.jit(forward_of(model), static_argnums=2)(variables, x, True)
    mask = bn.optim.no_weight_decay_mask
    other = inputs_as_images(4)
    report = audited(model, {**variables, **updates}, other, weight_decay_mask=mask)
    assert report.findings == ()
    assert len(report.layers) == 14
    assert all(layer.is_found for layer in report.layers)
    assert all(one is not None for layer in report.layers for one in layer[:-2])


# --- running statistics -------------------------------------------------------------------------


def shifted(variables, feature, share):
    """The mean of a feature of norm_1 moved by a share of its standard deviation."""
    deviation = np.sqrt(variables["batch_stats"]["norm_1"]["var"][feature])
    return broken(
        variables,
        "batch_stats/norm_1/mean",
        lambda mean: mean + share * deviation * (np.arange(mean.size) == feature),
    )


def test_stale_statistics(sound):
    report = audited(Net(), shifted(sound, 3, 4.0))
    assert kinds(report) == [("stale", "norm_1")]
    (finding,) = report.findings
    assert "in feature 3 (1 of 8)" in finding.message
    assert "of the initial" not in finding.message
    assert "bn.recalibrate(" in finding.advice
    shares, errors = re.search(
        r"which is (\S+) standard deviations or (\S+) standard errors", finding.message
    ).groups()
    assert float(shares) == pytest.approx(4, abs=0.7)
    assert float(errors) == pytest.approx(float(shares) * np.sqrt(EXAMPLES / 2), rel=0.2)


def test_small_differences_are_not_stale(sound):
    # With thousands of examples a small difference is significant.
    variables = with_statistics(Net(), sound, inputs(0, 4096))
    variables = shifted(shifted(variables, 3, 0.4), 5, 0.6)
    variables["batch_stats"]["norm_1"]["var"] *= np.float32([6, 1.7, 1 / 6, 1, 1, 1, 1 / 1.7, 1])
    report = audited(Net(), variables, inputs(1, 4096))
    assert kinds(report) == [("stale", "norm_1")]
    message = report.findings[0].message
    assert message.startswith(
        "Its running means are far from the batch's in feature 5 (1 of 8): it"
    )
    assert "Its running variances are far from the batch's in features 0, 2 (2 of 8): f" in message
    factor = re.search(r"a factor of (\S+) or \S+ standard errors", report.findings[0].message)
    assert float(factor[1]) == pytest.approx(6, rel=0.2)
    assert report.layers[1].var_off == pytest.approx(6, rel=0.2)
    assert report.layers[1].mean_errors == pytest.approx(0.6 * np.sqrt(4096 / 2), rel=0.2)


class Images(nn.Module):
    virtual_batch_size: int | None = None

    @nn.compact
    def __call__(self, x, train):
        norm = Norm(name="norm", virtual_batch_size=self.virtual_batch_size)
        return nn.relu(norm(x, use_running_average=not train))


def test_positions_of_one_image_are_not_independent():
    # Every image is its own constant and a little noise: 12 values, however many positions.
    def images(seed):
        constant = standard_normal(seed, (12, 1, 1, 16))
        return np.array(constant + 0.1 * standard_normal(seed + 1, (12, 4, 4, 16)))

    x = images(20)
    _, mean, var = define_moments(images(8))
    stats = {"norm": {"mean": np.float32(mean), "var": np.float32(var)}}
    params = {"norm": {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}}
    variables = {"params": params, "batch_stats": stats}
    report = audited(Images(), variables, x)
    count, batch_mean, batch_var = define_moments(x)
    naive = np.abs(batch_mean - mean) / np.sqrt((batch_var + var) / count)
    assert report.layers[0].mean_off > 0.5
    assert naive.max() > 8
    assert report.layers[0].mean_errors < 4
    assert report.findings == ()
    error = report.layers[0].var_error
    assert error == pytest.approx(np.sqrt(2 / 12), rel=0.5)
    (in_groups,) = audited(Images(4), variables, x).layers
    assert in_groups.var_error == pytest.approx(error * np.sqrt(3), rel=1e-4)


def test_statistics_without_updates(sound):
    fresh = {name: np.array(values) for name, values in bn.init_batch_stats(8).items()}
    one = {**sound, "batch_stats": {**sound["batch_stats"], "norm_1": fresh}}
    report = audited(Net(), one)
    assert kinds(report) == [("never updated", "norm_1")]
    assert "mean 0 and variance 1" in report.findings[0].message
    assert is_initial(fresh)
    frozen = audited(Net(options={"frozen": True}), one)
    assert kinds(frozen) == [("never updated", "norm_1")]
    assert "if it is frozen, unfreeze it first" in frozen.findings[0].advice
    assert "frozen" not in report.findings[0].advice
    assert not is_initial({**fresh, "mean": np.float32([0, 1e-6])})
    assert not is_initial({**fresh, "var": np.float32([1, 1.001])})


def test_a_count_of_zero_is_never_updated(sound):
    model = Net(options={"momentum": None})
    counted = {**sound["batch_stats"]["norm_1"], "count": np.ones(8, np.float32)}
    counted = {**sound, "batch_stats": {**sound["batch_stats"], "norm_1": counted}}
    none = broken(counted, "batch_stats/norm_1/count", at(slice(None), 0))
    assert kinds(audited(model, none)) == [("never updated", "norm_1")]


def test_too_few_updates_leave_initial_values(sound):
    # Larger inputs, so that their statistics do not resemble the initial ones.
    x = 3 * inputs(1)
    few = broken(
        with_statistics(Net(), sound, x), "batch_stats/norm_0/mean", lambda mean: 0.3 * mean
    )
    few = broken(few, "batch_stats/norm_0/var", lambda var: 0.7 + 0.3 * var)
    report = audited(Net(), few, x)
    assert report.findings[0][:2] == ("stale", "norm_0")
    assert "with 70% of the initial mean 0 and variance 1" in report.findings[0].message


def test_evaluation_that_differs_from_training(sound):
    def drop(x, train):
        return nn.Dropout(0.7, deterministic=not train)(x)

    def enlarge(x, train):
        return x * jnp.where(jnp.arange(8)[None] < 1, 4.0 if train else 1.0, 1.0)

    model = Net(between=drop)
    report = audited(model, with_statistics(model, sound, inputs(0)))
    assert kinds(report) == [("differs in evaluation", "norm_1")]
    assert "those of the batch, in evaluation they are not. Its" in report.findings[0].message
    assert "variances are far from the batch's in features" in report.findings[0].message
    model = Net(between=enlarge)
    assert audited(model, with_statistics(model, sound, inputs(0))).findings == ()


@pytest.mark.parametrize("kind", [Norm, bn.linen.BatchRenorm])
def test_evaluation_by_the_batch(sound, kind):
    always = partial(kind, use_running_average=False)

    class Forgetful(Net):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8, use_bias=False, name="dense_0")(x)
            return nn.relu(always(name="norm_0")(x))

    report = audited(Forgetful(), sound)
    assert ("normalizes by the batch", "norm_0") in kinds(report)


# --- the other kinds of findings, and models just within bounds ---------------------------------


def assert_finds(report, *expected):
    """Compares the findings with rows of kind, path, and a pattern in the message."""
    assert kinds(report) == [(kind, path) for kind, path, _ in expected]
    for finding, (_, _, message) in zip(report.findings, expected, strict=True):
        assert re.search(message, finding.message), finding.message
        assert finding.message in str(report)
        assert finding.advice in str(report)


def test_what_is_not_finite(sound):
    variables = broken(sound, "params/dense_1/kernel", at((0, 5), np.nan))
    variables = broken(variables, "params/norm_1/bias", at(2, np.inf))
    variables = broken(variables, "batch_stats/norm_1/mean", at(1, -np.inf))
    assert_finds(
        audited(Net(), variables),
        ("not finite", "norm_1", r"^batch_stats/norm_1/mean: 1 of 8 values are NaN"),
        ("not finite", "dense_1/kernel", r"^params/dense_1/kernel: 1 of 64 values"),
        ("not finite", "norm_1", r"^params/norm_1/bias: 1 of 8 values"),
        ("not finite", "norm_1", r"^Its input is not finite in feature 5 \(1 of 8\)\."),
        (
            "not finite",
            "norm_1",
            r"^Its output is not finite in features 1, 2 \(2 of 8\), though its input is",
        ),
    )


def test_an_input_that_is_not_finite(sound):
    x = inputs(1).at[7, 2].set(np.inf)
    report = audited(Net(), sound, x)
    assert kinds(report) == [("not finite", "norm_0")]
    assert "Its input is not finite in features 0, 1, 2, 3, ... (8 of 8). The same holds" in str(
        report
    )
    assert "The same holds for 1 norm after it.\n" in str(report)


def test_masked_values_may_be_anything(sound):
    x = jnp.concatenate([inputs(1), jnp.full((8, 6), np.nan)])
    mask = jnp.arange(72)[:, None] < 64

    def forward(variables, batch, train):
        x, mask = batch
        return Net().apply(variables, x, train=train, mask=mask, mutable=["batch_stats"])

    report = bn.audit(forward, sound, (x, mask))
    assert report.findings == ()
    assert report.layers[0].values == 64
    _, mean, _ = define_moments(inputs(1) @ sound["params"]["dense_0"]["kernel"])
    assert_close(report.layers[0].batch_mean, mean, tolerance=1e-5)
    assert report.layers[0].var_error == pytest.approx(np.sqrt(5 / 64))


def test_fully_masked_features_count_as_finite(sound):
    mask = np.ones((EXAMPLES, 8), bool)
    mask[:, 3] = False

    def forward(variables, x, train):
        return Net().apply(variables, x, train=train, mask=mask, mutable=["batch_stats"])

    assert bn.audit(forward, sound, inputs(1)).findings == ()


def test_a_scan_without_finite_values():
    stats = {"inner": {"mean": 1 + jnp.zeros(6), "var": 2 * jnp.ones(6)}}

    def forward(variables, x, train):
        def step(inner, part):
            y, inner = bn.batch_norm({}, inner, part, use_running_average=not train)
            return inner, y

        inner, y = jax.lax.scan(step, variables["batch_stats"]["inner"], x.reshape(2, 2, 6))
        return y, {"batch_stats": {"inner": inner}}

    report = bn.audit(forward, {"params": {}, "batch_stats": stats}, jnp.full((4, 6), jnp.nan))
    message = r"No input value is valid and finite in features .* \(6 of 6\), unless the mask"
    assert_finds(report, ("not finite", "inner", message))


def test_a_bias_before_renorm_has_no_effect(sound):
    class Renormed(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8, name="dense_0")(x)
            norm = bn.linen.BatchRenorm(momentum=0.0, name="norm_0")
            return norm(x, use_running_average=not train)

    model = Renormed()
    variables = model.init(jax.random.key(0), inputs(0), train=False)
    report = audited(model, with_statistics(model, variables, inputs(0)))
    assert kinds(report) == [("bias without effect", "norm_0")]


def test_a_bias_before_dropout_has_an_effect(sound):
    def drop(x, train):
        return nn.Dropout(0.05, deterministic=not train)(x)

    variables = jax.tree.map(np.copy, sound)
    variables["params"]["dense_1"]["bias"] = np.ones(8, np.float32)
    model = Net(use_bias=True, between=drop)
    report = audited(model, with_statistics(model, variables, inputs(0)))
    assert "bias without effect" not in [one.kind for one in report.findings]


def test_several_faults_of_one_norm(sound):
    model = Net(use_bias=True)
    variables = broken(sound, "params/norm_1/scale", at(slice(None), 4.0))
    variables = broken(variables, "params/norm_1/scale", at(2, 1.1e-4))
    variables["params"]["dense_1"]["bias"] = np.zeros(8, np.float32)
    decays = {"norm_1": {"scale": True, "bias": False}, "norm_0": False}
    report = audited(model, variables, weight_decay_mask={**decays, "classifier": True})
    assert_finds(
        report,
        ("dead features", "norm_1", r"scale of feature 2 \(1 of 8\) is 0.00011 .* median of 4:"),
        ("bias without effect", "norm_1", r"^The bias 'dense_1/bias' directly before it"),
        ("saturated", "norm_1", r"^5\d% of the values after it"),
        ("weight decay", "norm_1", r"applies to its scale\."),
    )
    assert 0.5 < report.layers[1].saturated < 0.6
    decays = {"norm_0": True, "norm_1": {"scale": False, "bias": True}}
    assert_finds(
        audited(Net(), sound, weight_decay_mask=lambda params: decays),
        ("weight decay", "norm_0", r"applies to its bias and scale\."),
        ("weight decay", "norm_1", r"applies to its bias\."),
    )


def test_faults_just_within_bounds(sound):
    # What is added after the bias is not constant, and under half of the values are saturated.
    model = Net(
        use_bias=True,
        between=lambda x, train: x + jnp.mean(x, -1, keepdims=True),
        options={"virtual_batch_size": 16},
    )
    variables = broken(sound, "params/norm_1/scale", at(slice(None), 2.8))
    variables = broken(variables, "params/norm_1/scale", at(2, 1.4e-4))
    variables["params"]["dense_1"]["bias"] = np.zeros(8, np.float32)
    variables = with_statistics(model, variables, inputs(0))
    decays = {"norm_1": False, "norm_0": False, "dense_0": {"kernel": True}}
    report = audited(model, variables, weight_decay_mask=decays)
    assert report.findings == ()
    assert 0.3 < report.layers[1].saturated < 0.5


def test_a_bias_before_a_frozen_norm_has_an_effect(sound):
    # A layer of zero scales is not dead, and the flatter side of a leaky ReLU is not flat.
    model = Net(use_bias=True, options={"frozen": True}, activation=nn.leaky_relu)
    variables = broken(sound, "params/norm_1/scale", at(slice(None), 0.0))
    variables = broken(variables, "params/norm_1/bias", at(slice(2, 6), -20.0))
    variables["params"]["dense_1"]["bias"] = np.zeros(8, np.float32)
    report = audited(model, variables)
    assert report.findings == ()
    assert report.layers[1][2:] == (None, *report.layers[1][3:5], *[None] * 7, 0, True)
    assert str(report.table()).splitlines()[2].split()[2:] == ["unknown"] * 6 + ["0"]


@pytest.mark.parametrize("activation", [nn.relu, partial(nn.gelu, approximate=False)])
def test_units_without_gradient(sound, activation):
    variables = broken(sound, "params/norm_1/bias", at(slice(3, 5), -20.0))
    report = audited(Net(activation=activation), variables)
    assert_finds(report, ("saturated", "norm_1", "^25% of the units after it are zero or flat"))
    assert report.layers[1].saturated == 0.25


def test_an_activation_of_one_side_is_not_judged_by_its_flat_values(sound):
    variables = broken(sound, "params/norm_1/bias", at(slice(None), -0.5))
    report = audited(Net(activation=nn.relu6), variables)
    assert report.findings == ()
    assert report.layers[1].saturated == 0
    variables = broken(sound, "params/norm_1/bias", at(slice(3, 5), 20.0))
    assert kinds(audited(Net(activation=nn.relu6), variables)) == [("saturated", "norm_1")]


def test_an_activation_with_a_derivative_only_in_reverse_mode(sound):
    @jax.custom_vjp
    def activation(x):
        return jnp.tanh(x)

    activation.defvjp(lambda x: (jnp.tanh(x), x), lambda x, cotangent: (0 * x + cotangent,))
    report = audited(Net(activation=activation), sound)
    assert report.findings == ()
    assert report.layers[1].saturated == 0


def test_ghost_batches_and_a_scale_that_the_next_layer_could_hold(sound):
    model = Net(options={"virtual_batch_size": 8}, activation=lambda x: x.astype(jnp.bfloat16))
    report = audited(model, sound)
    assert_finds(
        report,
        ("small batch", "norm_1", r"each ghost batch of 8 examples .* independent values, 5\d%"),
        (
            "redundant scale",
            "norm_1",
            r"norm_1/bias and norm_1/scale .* directly and only into 'classifier/kernel'",
        ),
    )
    assert report.findings[0].advice.startswith("Raise virtual_batch_size or leave it out, or use")
    assert report.layers[1].saturated is None
    assert report.table().splitlines()[2].split()[-1] == "-"


def test_a_small_batch(sound):
    report = audited(Net(), sound, inputs(1, 6))
    assert kinds(report) == [("small batch", "norm_0"), ("small batch", "norm_1")]
    assert report.layers[0].var_error == pytest.approx(np.sqrt(2 / 5), rel=0.1)
    assert "of 6.0 independent values, 63% of itself" in report.findings[0].message
    # A ghost batch of all examples is the batch.
    whole = audited(Net(options={"virtual_batch_size": 6}), sound, inputs(1, 6))
    assert whole.findings == report.findings


def test_a_variance_under_epsilon(sound):
    variables = jax.tree.map(np.copy, sound)
    kernel, (_, first, *_) = (
        variables["params"]["dense_1"]["kernel"],
        variables["batch_stats"]["norm_1"]["var"],
    )
    for feature, var in (4, 0.0), (6, 0.5e-5), (7, 3e-5):
        kernel[:, feature] = kernel[:, 1] * np.sqrt(var / first)
    report = audited(Net(), with_statistics(Net(), variables, inputs(0)))
    message = r"^The variance of features 4, 6 \(2 of 8\) is \de-06 at most, under epsilon=1e-05"
    assert_finds(report, ("dead features", "norm_1", message))


# --- plain functions, and what is found in programs-----------------------------------------------


def plain(build):
    """A model of plain functions, and healthy variables for it."""

    def forward(variables, x, train):
        norms = dict(variables["batch_stats"])

        def norm(name, x, **options):
            params = variables["params"].get(name, {})
            options = {"use_running_average": not train, "momentum": 0.0, **options}
            y, norms[name] = bn.batch_norm(params, norms[name], x, **options)
            return y

        return build(norm, variables["params"], x), {"batch_stats": norms}

    rng = np.random.default_rng(0)
    names = ("a", "b")
    arrays = {"w": (6, 8), "bias": (8,), "v": (8, 8), "places": (3, 8)}
    params = {name: np.float32(rng.normal(size=shape)) for name, shape in arrays.items()}
    params.update({name: bn.init_params(8) for name in names})
    variables = {
        "params": params,
        "batch_stats": {name: bn.init_batch_stats(8) for name in names},
    }
    return forward, variables


def audited_plain(build, x=None, **options):
    forward, variables = plain(build)
    other = inputs(0) if x is None else 0.9 * x[::-1]
    _, updates = forward(variables, other, True)
    unused = set(updates["batch_stats"]) - set(used_by(build, other))
    stats = {name: norm for name, norm in updates["batch_stats"].items() if name not in unused}
    x = inputs(1) if x is None else x
    return bn.audit(forward, {**variables, "batch_stats": stats}, x, **options)


def used_by(build, x):
    names = []

    def note(name, x, **options):
        names.append(name)
        return x

    _, variables = plain(build)
    jax.eval_shape(lambda x: build(note, variables["params"], x), x)
    return names


def with_positions(x):
    return jnp.stack([x, x[::-1] + 0.5, -x], axis=1)


FUNCTIONS = {
    "a bias, in the next shape and dtype": (
        lambda norm, p, x: norm("a", (x @ p["w"] + p["bias"][None]).reshape(-1, 2, 8)) ** 2,
        [("bias without effect", "a")],
    ),
    "a bias, subtracted from channels that go first": (
        lambda norm, p, x: norm("a", (x @ p["w"] - p["bias"][None]).T, axis=0) ** 2,
        [("bias without effect", "a")],
    ),
    "a bias for each position": (
        lambda norm, p, x: norm("a", with_positions(x @ p["w"]) + p["places"][None]) ** 2,
        [],
    ),
    "a bias that something else takes too": (
        lambda norm, p, x: norm("a", h := x @ p["w"] + p["bias"][None]) ** 2 + h,
        [],
    ),
    "a bias that is used once more, where it has an effect": (
        lambda norm, p, x: (
            norm("a", x @ p["w"] + p["bias"][None]) ** 2 + jnp.tanh(x @ p["w"] + p["bias"][None])
        ),
        [],
    ),
    "a bias before two norms": (
        lambda norm, p, x: (
            norm("a", x @ p["w"] + p["bias"][None]) ** 2
            + norm("b", x @ p["w"][::-1] + p["bias"][None]) ** 2
        ),
        [("bias without effect", "a"), ("bias without effect", "b")],
    ),
    "into a product with what another norm is multiplied by": (
        lambda norm, p, x: (
            (norm("a", x @ p["w"]) @ p["v"]) * (norm("b", x @ p["w"][::-1]) @ p["v"])
        ),
        [],
    ),
    "norm after norm": (
        lambda norm, p, x: jnp.tanh(20 * norm("b", norm("a", x @ p["w"]))),
        [("redundant scale", "a"), ("saturated", "b")],
    ),
    "into two products": (
        lambda norm, p, x: ((y := norm("a", x @ p["w"])) @ p["v"]) * (y @ p["v"].T),
        [("redundant scale", "a")],
    ),
    "into a product and a sum": (
        lambda norm, p, x: (y := norm("a", x @ p["w"])) @ p["v"] + y,
        [],
    ),
    "into products with a parameter and with a constant": (
        lambda norm, p, x: (y := norm("a", x @ p["w"])) @ p["v"] + y @ np.ones((8, 8), np.float32),
        [],
    ),
    "the output": (lambda norm, p, x: norm("a", x @ p["w"]), []),
    "the output too": (lambda norm, p, x: ((y := norm("a", x @ p["w"])), y @ p["v"]), []),
    "into a product by element": (lambda norm, p, x: norm("a", x @ p["w"]) * p["bias"][None], []),
    "flat after a factor": (
        lambda norm, p, x: jnp.tanh(20 * norm("a", x @ p["w"])) @ p["v"],
        [("saturated", "a")],
    ),
    "an activation in the layer": (
        lambda norm, p, x: norm("a", x @ p["w"], activation=jnp.tanh) @ p["v"],
        [],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_around_a_norm(name):
    build, expected = FUNCTIONS[name]
    report = audited_plain(build)
    assert kinds(report) == expected
    assert all(layer.is_found for layer in report.layers)


def test_faults_of_plain_functions():
    forward, variables = plain(lambda norm, p, x: jnp.tanh(norm("a", x @ p["w"])) @ p["v"])
    _, updates = forward(variables, inputs(0), True)
    stats = {"a": {name: np.array(one) for name, one in updates["batch_stats"]["a"].items()}}
    stats["a"]["var"] *= 9
    stats["a"]["mean"][6] = np.nan
    params = {**variables["params"], "a": {"scale": 40 * np.ones(8, np.float32)}}
    report = bn.audit(forward, {"params": params, "batch_stats": stats}, inputs(1))
    assert [one.kind for one in report.findings] == ["not finite", "not finite", "stale"]
    assert {one.path for one in report.findings} == {"a"}
    (layer,) = report.layers
    assert "in features 0, 1, 2, 3, ... (7 of 8)" in report.findings[2].message
    assert layer.saturated > 0.7


def test_functions_that_are_not_finite_only_in_evaluation():
    forward, variables = plain(lambda norm, p, x: norm("b", nn.relu(norm("a", x @ p["w"]))))
    _, updates = forward(variables, inputs(0), True)
    variables = broken({**variables, **updates}, "batch_stats/a/var", at(1, np.nan))
    report = bn.audit(forward, variables, inputs(1))
    assert_finds(
        report,
        ("not finite", "a", "^batch_stats/a/var: 1 of 8 values"),
        ("not finite", "b", r"^Its input is not finite in feature 1 \(1 of 8\)\."),
        ("not finite", "a", r"^Its output is not finite in feature 1 \(1 of 8\)"),
    )


def scanned(variables, x, train):
    """A norm inside a scan, which carries its statistics, and a norm after it."""
    params = variables["params"]
    options = {"use_running_average": not train, "momentum": 0.0}

    def step(stats, part):
        y, stats = bn.batch_norm({}, stats, part, **options)
        return stats, y

    inner, y = jax.lax.scan(step, variables["batch_stats"]["inner"], jnp.stack(jnp.split(x, 2)))
    h = y.reshape(x.shape) @ params["w"]
    y, outer = bn.batch_norm({}, variables["batch_stats"]["outer"], h, **options)
    return jnp.tanh(y), {"batch_stats": {"inner": inner, "outer": outer}}


def test_a_norm_inside_a_scan_is_not_found_in_the_program():
    def images(seed):
        return jnp.repeat(standard_normal(seed, (32, 1, 6)), 4, axis=1)

    stats = {"inner": bn.init_batch_stats(6), "outer": bn.init_batch_stats(6)}
    variables = {"params": {"w": jnp.eye(6)}, "batch_stats": stats}
    _, updates = scanned(variables, images(0), True)
    updates["batch_stats"]["inner"]["mean"] += 4.0
    report = bn.audit(scanned, {**variables, **updates}, images(1))
    outer, inner = report.layers
    assert outer.is_found
    assert (inner.path, inner.is_found, inner.values, inner.saturated) == (
        "inner",
        False,
        128,
        None,
    )
    # Every example counts once, with the assumed kurtosis.
    assert inner.var_error == pytest.approx(np.sqrt(5 / 32))
    assert ("stale", "inner") in kinds(report)
    assert inner.mean_errors == pytest.approx(inner.mean_off / np.sqrt(2 / 32), rel=0.3)
    assert report.table().splitlines()[2].split()[-1] == "unknown"


class Shared(nn.Module):
    """One norm of Flax for both halves of the batch, with features along axis 1."""

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(not train, axis=1, momentum=0.0, name="norm")
        return jnp.concatenate([jnp.tanh(norm(half)) for half in jnp.split(x, 2)])


def test_one_norm_of_flax_in_two_calls():
    def images(seed):
        return standard_normal(seed, (32, 3, 5)) * 2 + 1

    variables = jax.eval_shape(partial(Shared().init, train=False), jax.random.key(0), images(0))
    _, mean, var = define_moments(images(0), 1)
    stats = {"norm": {"mean": np.float32(mean), "var": np.float32(var)}}
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables["params"])
    report = audited(Shared(), {"params": params, "batch_stats": stats}, images(1))
    assert report.findings == ()
    (layer,) = report.layers
    assert (layer.features, layer.values, layer.is_found) == (3, 160, True)
    assert_close(layer.batch_mean, define_moments(images(1), 1)[1], tolerance=1e-5)
    squares = np.mean((np.float64(images(1)) - layer.batch_mean[:, None]) ** 2, axis=2)
    error = np.median(squares.std(0, ddof=1) / np.sqrt(32) / squares.mean(0))
    assert layer.var_error == pytest.approx(max(error, np.sqrt(2 / 159)), rel=1e-4)


# --- NNX ----------------------------------------------------------------------------------------


def make_module(seed=0, norm=nnx.BatchNorm, **options):
    rngs = nnx.Rngs(seed)
    layers = [
        nnx.Linear(6, 8, use_bias=False, rngs=rngs),
        norm(8, momentum=0.0, rngs=rngs),
        nnx.relu,
        nnx.Linear(8, 8, rngs=rngs, **options),
        norm(8, momentum=0.0, rngs=rngs),
        nnx.silu,
        nnx.Linear(8, 2, rngs=rngs),
    ]
    model = nnx.Sequential(*layers)
    model(inputs(0))
    return model


def call(model, x):
    return model(x)


def test_a_healthy_module_has_no_finding_and_is_not_changed():
    model = make_module(use_bias=False)
    before = jax.tree.map(np.array, nnx.state(model))
    classes = [type(layer) for layer in model.layers]
    report = bn.audit(call, model, inputs(1), weight_decay_mask=bn.optim.no_weight_decay_mask)
    assert report.findings == ()
    assert [layer.path for layer in report.layers] == ["layers/1", "layers/4"]
    assert [layer.is_found for layer in report.layers] == [True, True]
    chex.assert_trees_all_equal(nnx.state(model), before)
    assert [type(layer) for layer in model.layers] == classes
    assert not model.layers[1].use_running_average
    assert report.layers[1].saturated == 0


def test_faults_of_a_module():
    model = make_module(norm=partial(bn.nnx.BatchNorm, virtual_batch_size=8))
    first, second = model.layers[1], model.layers[4]
    first.mean[...] -= jnp.sqrt(first.var[...]) * 5 * (jnp.arange(8) == 3)
    second.scale[...] = second.scale[...].at[2].set(1e-5)
    second.bias[...] = second.bias[...].at[5:].set(-100.0)
    mask = nnx.map_state(lambda path, leaf: path[1] in (0, 4), nnx.state(model, nnx.Param))
    report = bn.audit(call, model, inputs(1), weight_decay_mask=nnx.to_pure_dict(mask))
    assert_finds(
        report,
        ("stale", "layers/1", r"in feature 3 \(1 of 8\)"),
        ("small batch", "layers/1", "each ghost batch of 8 examples"),
        ("dead features", "layers/4", r"scale of feature 2 \(1 of 8\) is 1e-05 at most"),
        ("bias without effect", "layers/4", "The bias 'layers/3/bias'"),
        ("small batch", "layers/4", "each ghost batch of 8 examples"),
        ("saturated", "layers/4", "38% of the units"),
        ("weight decay", "layers/4", "applies to its bias and scale"),
    )
    assert "nnx.update(model, bn.recalibrate(" in report.findings[0].advice


def test_a_module_without_updates():
    model = nnx.Sequential(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    report = bn.audit(call, model, inputs(1))
    assert kinds(report) == [("never updated", "layers/1"), ("bias without effect", "layers/1")]


# --- errors -------------------------------------------------------------------------------------


def test_variables_without_a_batch_norm():
    with pytest.raises(
        ValueError, match=r"variables hold no batch norm.*'batch_stats': batch_stats"
    ):
        bn.audit(forward_of(Net()), {"params": {}}, inputs(1))
    with pytest.raises(ValueError, match="variables hold no batch norm"):
        bn.audit(call, nnx.Linear(6, 2, rngs=nnx.Rngs(0)), inputs(1))


def test_variables_that_are_not_a_mapping(sound):
    with pytest.raises(
        TypeError, match=r"variables is a list; expected an nnx.Module or a mapping.*state\.params"
    ):
        bn.audit(forward_of(Net()), [sound], inputs(1))


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (lambda y, updates: y, "forward returned an array, expected"),
        (lambda y, updates: {"logits": y}, "forward returned a dict, expected"),
        (lambda y, updates: (y, {}), r"with the collections \[\] in updates"),
    ],
)
def test_a_forward_that_does_not_return_updates(sound, returned, named):
    def forward(variables, x, train):
        return returned(*forward_of(Net())(variables, x, train))

    with pytest.raises(ValueError, match=rf"{named}.*mutable=\['batch_stats'\]"):
        bn.audit(forward, sound, inputs(1))


def test_a_mask_of_other_parameters(sound):
    message = (
        r"covers no .* at norm_0/bias, .* and norm_1/scale or around them, received params/norm_0"
    )
    with pytest.raises(ValueError, match=message):
        audited(Net(), sound, weight_decay_mask={"params": {"norm_0": True}})
    assert_finds(
        audited(Net(), sound, weight_decay_mask={"norm_0": {"bias": True}}),
        ("weight decay", "norm_0", r"applies to its bias\."),
    )


@pytest.mark.parametrize("batch", [np.zeros((0, 6), np.float32), (), np.float32(1)])
def test_a_batch_without_examples(sound, batch):
    with pytest.raises(ValueError, match="batch has no examples, its arrays have the shapes"):
        bn.audit(forward_of(Net()), sound, batch)
