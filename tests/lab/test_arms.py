"""`bn-jax train --arm` and `--model`, and the commands on such runs."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_programs
from support import assert_close, bars

from bn_jax import training
from bn_jax.lab import fitting, runs
from bn_jax.lab.console.choices import ARM_NAMES, ARMS, MODELS, NO_NORM, PER_DEVICE, SYNCHRONIZED
from bn_jax.lab.training import arms

pytestmark = pytest.mark.usefixtures("compile_quickly")

TRAIN = ("train", "--epochs", "2", "--batch-size", "8", "--learning-rate", "0.05")
ONE = training.make_mesh(jax.devices()[:1])


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


@pytest.fixture
def good(tmp_path):
    np.savez(tmp_path / "good.npz", **bars())
    # As in a new process: a model that is made again runs what is compiled for it.
    arms.make_model.cache_clear()


def trained(command, *options):
    """Trains in this process, and returns what was printed and compiled."""
    with compiled_programs() as programs:
        code, out, err = command(*TRAIN, "--data", "good.npz", "--out", "run", *options)
    assert (code, err) == (0, "")
    return out, programs


@pytest.mark.parametrize("name", ARM_NAMES)
def test_one_arm(good, command, tmp_path, name):
    out, programs = trained(command, "--model", "mlp", "--arm", name)
    assert [out.count(f"{arm}: epoch 2 of 2") for arm in ARMS] == [
        int(arm == ARM_NAMES[name]) for arm in ARMS
    ]
    assert f"The only arm: {ARM_NAMES[name]}\n" in out and "Best" not in out
    metrics = metrics_of(tmp_path / "run")
    assert metrics["config"]["arms"] == list(metrics["arms"]) == [ARM_NAMES[name]]
    assert (metrics["best_arm"], metrics["config"]["model"]) == (ARM_NAMES[name], "mlp")
    assert {program: programs[program] for program in PROGRAMS} == dict.fromkeys(PROGRAMS, 1)
    code, out, err = command("fold", "run", "--out", "folded")
    if name != "none":
        assert (code, err) == (0, "")
        return
    assert code == 2 and "is of the arm 'no normalization' and has no batch norm" in err
    assert err.endswith("e.g. one of bn-jax train --arm synchronized\n")


PROGRAMS = ("jit(init)", "jit(train_step)", "jit(_measure_model)")


def test_some_arms_in_any_order(good, command, tmp_path):
    names = ("synchronized", "none", "synchronized")
    options = itertools.chain.from_iterable(("--arm", name) for name in names)
    out, programs = trained(command, "--model", "mlp", *options)
    assert list(metrics_of(tmp_path / "run")["arms"]) == [NO_NORM, SYNCHRONIZED]
    assert out.index(f"{NO_NORM}: epoch 2") < out.index(f"{SYNCHRONIZED}: epoch 1")
    assert "Best by validation accuracy: " in out
    # Reloading the best arm initializes and compiles nothing.
    assert {program: programs[program] for program in PROGRAMS} == dict.fromkeys(PROGRAMS, 2)


def test_arms_are_trained_as_they_are_alone(good, command, tmp_path):
    trained(command, "--model", "mlp")
    together = metrics_of((tmp_path / "run").rename(tmp_path / "together"))
    trained(command, "--model", "mlp", "--arm", "per-device")
    alone = metrics_of(tmp_path / "run")
    assert together["arms"][PER_DEVICE]["curves"] == alone["arms"][PER_DEVICE]["curves"]


def test_a_resumed_run_has_its_arms_and_its_model(good, command, tmp_path, monkeypatch):
    options = ("--model", "mlp", "--arm", "none", "--arm", "per-device")
    trained(command, *options)
    expected = metrics_of((tmp_path / "run").rename(tmp_path / "uninterrupted"))
    fit, calls = fitting.fit, itertools.count(1)

    def stopped_fit(*arguments, **options):
        call = next(calls)
        for reached in fit(*arguments, **options):
            if (call, reached[1].epoch) == (2, 2):
                raise KeyboardInterrupt
            yield reached

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit", stopped_fit)
        code, _, err = command(*TRAIN, "--data", "good.npz", "--out", "run", *options)
    assert code == 130 and "bn-jax train --resume run" in err
    with compiled_programs() as programs:
        code, out, err = command("train", "--resume", "run")
    assert (code, err) == (0, "") and f"{PER_DEVICE}: epoch 2" in out
    assert programs["jit(init)"] == 0 and f"{NO_NORM}: epoch 1" not in out
    resumed = metrics_of(tmp_path / "run")
    assert resumed["config"] == expected["config"]
    for arm in expected["arms"]:
        assert resumed["arms"][arm]["curves"] == expected["arms"][arm]["curves"]


BAD_NAMES = {
    "--arm": (
        ["--arm", "none", "--arm", "syncronized"],
        "--arm: received syncronized, expected none or per-device or synchronized; did you mean "
        "synchronized?",
    ),
    "--arm, nothing like it": (
        ["--arm", "xyz"],
        "--arm: received xyz, expected none or per-device or synchronized; choose one of these",
    ),
    "--model": (
        ["--model", "resnet-18"],
        "--model: received resnet-18, expected small or tiny or resnet18 or mlp; did you mean "
        "resnet18?",
    ),
    "--arm with --resume": (["--resume", "run", "--arm", "none"], "--arm: not allowed with --res"),
    "--model with --resume": (["--resume", "run", "--model", "mlp"], "--model: not allowed with"),
}


@pytest.mark.parametrize(("options", "message"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_names(good, command, tmp_path, options, message):
    code, out, err = command("train", *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"bn-jax: error: {message}") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["good.npz"]


def initial(model, arm, shape, num_classes=10):
    made = arms.make_model(arm, num_classes, 4, model, shape)
    images = jnp.zeros((8, *shape))
    return made, jax.eval_shape(lambda: made.init(jax.random.key(0), images, train=True))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("model", MODELS)
def test_models_have_norms_or_biases(model, arm):
    _, variables = initial(model, arm, (8, 8, 1))
    assert ("batch_stats" in variables) == (arm != NO_NORM)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(variables)]
    assert any("norm" in path for path in paths) == (arm != NO_NORM)


def test_resnet18_is_that_of_torchvision_for_large_images_and_keeps_small_ones():
    made, variables = initial("resnet18", SYNCHRONIZED, (224, 224, 3), num_classes=1000)
    # The number that torchvision states.
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 11_689_512
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (7, 7, 3, 64)
    assert made.padding == "symmetric"
    for shape in [(8, 8, 1), (63, 224, 3), (1, 16, 1)]:
        _, variables = initial("resnet18", SYNCHRONIZED, shape)
        assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, shape[-1], 64)


@pytest.mark.parametrize(("side", "last"), [(5, 3), (8, 4), (9, 3), (12, 3), (28, 7)])
def test_no_kernel_of_the_default_network_is_larger_than_its_image(side, last):
    """XLA for CPUs computes a 3x3 convolution of a 2x2 image slowly."""
    made, _ = initial(arms.choose_model((side, 28, 1)), SYNCHRONIZED, (side, 28, 1))
    x = np.zeros((1, side, 28, 1), np.float32)
    _, state = jax.eval_shape(
        lambda: made.init_with_output(jax.random.key(0), x, train=False, capture_intermediates=True)
    )
    heights = [
        leaf.shape[1] for leaf in jax.tree.leaves(state["intermediates"]) if len(leaf.shape) == 4
    ]
    assert min(heights) == last


def test_mlp_is_dense_layers_with_norms():
    made, _ = initial("mlp", PER_DEVICE, (2, 3, 1))
    x = np.random.default_rng(0).standard_normal((8, 2, 3, 1)).astype(np.float32)
    variables = made.init(jax.random.key(0), x, train=False)
    mask = np.array([True] * 6 + [False] * 2)
    logits, _ = made.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    hidden = x.reshape(8, 6).astype(np.float64)
    for number in range(2):
        hidden = hidden @ params[f"dense_{number}"]["kernel"]
        groups = []
        for group, valid in zip(hidden.reshape(2, 4, -1), mask.reshape(2, 4), strict=True):
            mean, var = group[valid].mean(0), group[valid].var(0)
            groups.append((group - mean) / np.sqrt(var + 1e-5))
        hidden = np.maximum(np.concatenate(groups), 0)
    expected = hidden @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    assert_close(logits[mask], expected[mask], tolerance=1e-4)


def check_every_command(command, tmp_path):
    """Runs each command on the run; test.npz holds what was trained on, so all agree."""
    metrics = metrics_of(tmp_path / "run")
    best = metrics["arms"][metrics["best_arm"]]
    expected = f"test accuracy {best['test_accuracy']:.2%} ({best['test_correct']} of 12 correct)\n"
    with compiled_programs() as programs:
        assert command("eval", "run") == (0, expected, "")
    assert programs["jit(init)"] == 0 and programs["jit(_measure_model)"] == 1
    for name, options in {
        "recalibrate": (),
        "fold": (),
        "audit": (),
        "export": ("--fold",),
    }.items():
        with compiled_programs() as programs:
            code, out, err = command(name, "run", "--out", name, *options)
        assert (code, err) == (0, ""), name
        assert programs["jit(init)"] == 0, name
    assert command("eval", "fold") == (0, expected, "")
    code, out, _ = command("eval", "recalibrate")
    assert code == 0 and out.startswith("test accuracy ")
    assert f"on raw images: {best['test_accuracy']:.2%}" in command("export", "run")[1]


def test_commands_on_an_mlp_of_ghost_batches(good, command, tmp_path):
    trained(command, "--model", "mlp", "--arm", "per-device")
    check_every_command(command, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["per-device", "synchronized"])
def test_commands_on_a_resnet18(good, command, tmp_path, name):
    trained(command, "--model", "resnet18", "--arm", name, "--epochs", "1")
    check_every_command(command, tmp_path)


def test_training_waits_for_no_compiler_and_a_restored_state_is_whole(
    good, command, tmp_path, monkeypatch
):
    fit, compiled = fitting.fit, []

    def watched_fit(*arguments, **options):
        with compiled_programs() as programs:
            yield from fit(*arguments, **options)
        compiled.append(programs)

    monkeypatch.setattr(fitting, "fit", watched_fit)
    _, programs = trained(command, "--model", "mlp", "--arm", "none")
    assert programs["jit(train_step)"] == 1 and compiled == [{}]
    state = runs.restore(runs.read_run(tmp_path / "run"), ONE)
    assert all(isinstance(leaf, jax.Array | int) for leaf in jax.tree.leaves(state))
