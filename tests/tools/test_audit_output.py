"""What an audit says and draws, and that it leaves nothing behind."""

import gc
import itertools
import sys
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import quick, standard_normal

import bn_jax as bn
from bn_jax._audit import Audit, Finding, Layer

pytestmark = pytest.mark.usefixtures("compile_quickly")
X = np.asarray(standard_normal(0, (256, 4)) * np.array([1, 3, 10, 0.3], np.float32)[None] + 2)


class Net(nn.Module):
    """One norm of this library or of Flax."""

    norm: Any = bn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        return nn.tanh(self.norm(use_running_average=not train, name="norm")(x))


def forward_of(model):
    return lambda variables, x, train: model.apply(variables, x, train, mutable=["batch_stats"])


def variables_of(mean, var, **others):
    stats = {"mean": np.float32(mean), "var": np.float32(var), **others}
    params = {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    return {"params": {"norm": params}, "batch_stats": {"norm": stats}}


def audited(mean, var, model=None, **others):
    return bn.audit(forward_of(model or Net()), variables_of(mean, var, **others), X)


# --- nothing is left behind ---------------------------------------------------------------------


def of_module():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    return lambda: lambda model, x: model(x), model


def of_functions(compiled):
    forward = forward_of(Net(nn.BatchNorm))
    given = jax.jit(forward, static_argnums=2) if compiled else forward
    # A new function in every call, as a user writes one in a loop.
    return lambda: lambda *args: given(*args), variables_of(X.mean(0), X.var(0))


AUDITED: dict[str, Any] = {
    "a function": partial(of_functions, False),
    "a compiled function": partial(of_functions, True),
    "a module": of_module,
}


@pytest.mark.parametrize("kind", quick(list(AUDITED), ["a compiled function"]))
def test_memory_does_not_grow_from_call_to_call(kind):
    make_forward, variables = AUDITED[kind]()
    counts = []
    for _ in range(4):
        bn.audit(make_forward(), variables, X)
        gc.collect()
        counts.append(len(gc.get_objects()))
    # The first calls fill caches.
    assert counts[-1] - counts[1] <= 20, counts


@pytest.mark.parametrize("norm", [bn.linen.BatchNorm, nn.BatchNorm])
def test_attributes_are_known_however_often_a_compiled_function_is_audited(norm):
    """The epsilon of the layer, and of how many examples its ghost batches are."""
    x = 0.01 * X[:, :1].repeat(4, 1)
    attributes = {"epsilon": 1e-2}
    if norm is bn.linen.BatchNorm:
        attributes["virtual_batch_size"] = 4
    forward = jax.jit(forward_of(Net(partial(norm, **attributes))), static_argnums=2)
    variables = variables_of(x.mean(0), x.var(0))
    forward(variables, x, True)
    reports = [
        bn.audit(given, variables, x) for given in (forward, forward, lambda *a: forward(*a))
    ]
    for report in reports:
        messages = [finding.message for finding in report.findings]
        assert "under epsilon=0.01: practically constant" in messages[0]
        assert ("each ghost batch of 4 examples" in str(messages)) == (norm is not nn.BatchNorm)


def test_no_implicit_transfer():
    variables = jax.device_put(variables_of(X.mean(0), X.var(0)), jax.devices()[1])
    with jax.transfer_guard("disallow"):
        report = bn.audit(forward_of(Net()), variables, X)
        str(report)
    assert report.findings == ()


# --- sentences ----------------------------------------------------------------------------------


def only_message(report):
    (finding,) = report.findings
    return finding.message


def test_only_variances_are_off():
    var = X.var(0) * [1, 8, 1, 9]
    message = only_message(audited(X.mean(0), var))
    assert message == (
        "Its running variances are far from the batch's in features 1, 3 (2 of 4): feature 3 has "
        f"{var[3]:.3g}, not {X.var(0)[3]:.3g}, a factor of 9 or "
        f"{message.split()[-3]} standard errors."
    )


def test_only_means_are_off():
    mean = X.mean(0) + X.std(0) * [0, 0, 2, 0]
    message = only_message(audited(mean, X.var(0)))
    assert message.startswith(
        "Its running means are far from the batch's in feature 2 (1 of 4): it has "
        f"{mean[2]:.3g}, not {X.mean(0)[2]:.3g}, which is 2 standard deviations or "
    )
    assert "variance" not in message


def test_means_and_variances_are_off():
    message = only_message(audited(X.mean(0) + 3 * X.std(0), X.var(0) * [1, 1, 1, 9]))
    first, second = message.split(". Its running variances are")
    assert "in features 0, 1, 2, 3 (4 of 4)" in first and "in feature 3 (1 of 4)" in second


def test_standard_deviations_in_the_place_of_variances():
    said = "All are the square roots of the batch's: standard deviations in the place of variances."
    assert only_message(audited(X.mean(0), X.std(0))).endswith(said)
    assert "square roots" not in only_message(audited(X.mean(0), X.var(0) * 3))
    assert "square roots" not in only_message(audited(X.mean(0), X.var(0) * [1, 1, 0.1, 3.3]))


def test_variances_are_off_in_evaluation_alone():
    class Doubled(Net):
        @nn.compact
        def __call__(self, x, train):
            x = jnp.where(train, x, 2 * x - 2)  # the same mean of 2
            return nn.tanh(bn.linen.BatchNorm(use_running_average=not train, name="norm")(x))

    x = X - X.mean(0) + 2
    report = bn.audit(forward_of(Doubled()), variables_of(x.mean(0), x.var(0)), x)
    assert [finding.kind for finding in report.findings] == ["differs in evaluation"]
    message = report.findings[0].message
    assert message.startswith("In training its running statistics are those of the batch, in evalu")
    assert "Its running variances are" in message and "running means" not in message


def test_a_count_of_zero_beside_other_statistics():
    report = audited(X.mean(0), X.var(0), count=np.zeros(4, np.float32))
    assert [finding.kind for finding in report.findings] == ["never updated"]
    message = only_message(report)
    assert message.startswith("No batch has entered its running statistics: their count is 0, the ")
    message = only_message(audited(np.zeros(4), np.ones(4)))
    assert message.startswith(
        "Its running statistics are the initial ones, mean 0 and variance 1, the batch has means of"
    )


def test_a_norm_of_one_number():
    def forward(variables, x, train):
        stats = variables["batch_stats"]
        y, stats = bn.batch_norm({}, stats, x, axis=(), use_running_average=not train)
        return y, {"batch_stats": stats}

    stats = {"mean": np.float32(9), "var": np.float32(X.var())}
    report = bn.audit(forward, {"batch_stats": stats}, X)
    assert "in feature 0 (1 of 1)" in only_message(report)


def test_columns_are_explained():
    report = audited(X.mean(0), X.var(0))
    text, html = str(report), report._repr_html_()
    header, _, _, *explained = text.splitlines()
    for column in ("values", "mean off", "in s.e.", "var off", "var error", "saturated"):
        assert column in header
        assert any(line.startswith(f"{column}  ") for line in explained)
        assert f"{column}: " in html
    assert max(map(len, text.splitlines())) <= 100
    whitened = report._replace(unexamined=("white",))
    assert "not examined: white (whitening)" in str(whitened)
    assert "<p>not examined: white (whitening)</p>" in whitened._repr_html_()


# --- the picture --------------------------------------------------------------------------------


def row(path, mean=(0.0, 0.1), var=(1.0, 1.0), saturated=0.1, **changed):
    """A norm whose batch has means of 0 and variances of 1."""
    zeros, ones = np.zeros(len(mean)), np.ones(len(mean))
    layer = Layer(path, len(mean), 100, np.array(mean), np.array(var), zeros, ones, 0, 0, 1, 0, 0,
                  saturated, True)  # fmt: skip
    return layer._replace(**changed)


def segments(collection):
    return [part[:, 0].tolist() for part in collection.get_segments()]


def labels_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_the_picture_holds_what_was_measured():
    pytest.importorskip("matplotlib")
    layers = (
        row("first", mean=(-1.0, 0.0, 2.0), var=(0.5, 1.0, 4.0), saturated=0.25),
        row("second", batch_mean=None, batch_var=None, saturated=None),
        row("third", mean=(np.nan, np.nan), var=(1.0, np.inf), saturated=None, is_found=False),
    )
    findings = [
        Finding("stale", "first", "", ""),
        Finding("saturated", "first", "", ""),
        Finding("stale", "first", "", ""),
        Finding("not finite", "third", "", ""),
    ]
    figure: Any = Audit(layers, tuple(findings)).plot()
    means, factors, shares = figure.axes
    assert figure.get_suptitle() == "Audit of 3 batch norms: 4 findings"
    assert labels_of(means) == ["first", "second", "third"]
    assert means.get_ylim()[0] > means.get_ylim()[1], "the first norm is at the top"
    widths, quartiles, medians = means.collections
    assert segments(widths) == [[pytest.approx(-np.sqrt(2), 1e-4), pytest.approx(2, 1e-4)]]
    np.testing.assert_allclose(segments(quartiles), [[-np.sqrt(0.5), 1]], 1e-4)
    assert medians.get_offsets().tolist() == [[0, 0]]
    widths, _, medians = factors.collections
    np.testing.assert_allclose(segments(widths), [[0.5, 4.0], [1.0, 1.0]], 1e-4)
    np.testing.assert_allclose(medians.get_offsets(), [[1.0, 0.0], [1.0, 2.0]], 1e-4)
    assert [text.get_text() for text in means.texts] == ["not measured", "not finite"]
    assert [bar.get_width() for bar in shares.patches] == [25]
    assert [text.get_text() for text in shares.texts] == [
        *("no activation", "unknown", "stale, saturated", "not finite")
    ]
    (low, high), (least, most) = means.get_xlim(), factors.get_xlim()
    assert low < -np.sqrt(2) and high > 2 and least < 0.5 and most > 4


SIZES = list(itertools.product([1, 100], [0.1, 1.0, 1e2, 1e4]))


@pytest.mark.parametrize(("norms", "off"), quick(SIZES, [(1, 0.1), (100, 1e4)]))
def test_the_picture_is_readable(norms, off):
    """No label touches another, and everything is on the page."""
    pytest.importorskip("matplotlib")
    layers = [row(f"stage{number}/block/norm", mean=(-off, off)) for number in range(norms)]
    assert_readable(Audit(tuple(layers), (Finding("stale", layers[0].path, "", ""),)).plot())


def assert_readable(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox.padded(1)
    for axes in figure.axes:
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [tick.get_window_extent(renderer) for tick in ticks if tick.get_text()]
            inside = [box for box in boxes if box.width]
            for box, following in itertools.pairwise(inside):
                assert not box.overlaps(following)
            assert all(page.contains(*corner) for box in inside for corner in box.corners())
        for text in axes.texts:
            box = text.get_window_extent(renderer)
            assert all(page.contains(*corner) for corner in box.corners()), text.get_text()


def test_the_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot\(\) draws .*pip install matplotlib"):
        Audit((row("norm"),), ()).plot()
