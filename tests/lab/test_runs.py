import errno
import functools
import json
import shlex
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file
from support import assert_close, bars, copy_of, files

import bn_jax as bn
from bn_jax import linen, training
from bn_jax.lab import data, models, runs
from bn_jax.lab.console import advice
from bn_jax.lab.datasets import problem
from bn_jax.lab.errors import CommandError
from bn_jax.lab.files import records, writing
from bn_jax.lab.fitting import fit, make_optimizer, shard_dataset
from bn_jax.lab.training import results

ARM = runs.SYNCHRONIZED


def make_small(arm, num_classes, *_):
    norm = None if arm == runs.NO_NORM else functools.partial(linen.BatchNorm, momentum=0.9)
    return models.ResNet(num_classes, stage_sizes=(1, 1), widths=(4, 6), norm=norm)


@pytest.fixture(scope="module", autouse=True)
def small(compile_quickly):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_model", make_small)
        yield


def save_run(folder, data_file):
    """Trains one arm in this process and saves it as the best of a run."""
    loaded = problem.load(data_file, seed=0)
    config = records.Config(
        data=str(data_file), devices=2, epochs=8, batch_size=16, learning_rate=0.1, seed=0
    )
    mesh = training.make_mesh(jax.devices()[:1])
    optimizer = make_optimizer(0.1, 72)
    state = training.create_state(runs.make_model(ARM, 3, 8), optimizer, (4, 4, 1), 0, mesh)
    parts = loaded.splits.train, loaded.splits.validation
    options = {"batch_size": 16, "epochs": 8, "seed": 0, "report_every": 50}
    reached = list(fit(state, *parts, mesh, **options))
    state, reports = reached[-1][0], [report for _, report in reached]
    test = training.evaluate(state, shard_dataset(loaded.splits.test, 16, mesh))
    folder.mkdir()
    results.write(folder, loaded, config, {ARM: results.Result(reports, state, test)}, ARM)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, data of another domain, and a run on the former."""
    home = tmp_path_factory.mktemp("runs")
    np.savez(home / "bars.npz", **bars(200))
    shifted = bars(40, seed=1)
    np.savez(home / "dark.npz", x=shifted["x"] * 3 - 50, y=shifted["y"])
    save_run(home / "run", home / "bars.npz")
    return home


@pytest.fixture(scope="module")
def variables(home):
    state = runs.restore(runs.read_run(home / "run"), training.make_mesh(jax.devices()[:1]))
    return {"params": state.params, "batch_stats": state.batch_stats}


def whole_batch_statistics(variables, images):
    """The statistics of all images as one batch, which replace the running ones at momentum 0."""
    norm = functools.partial(linen.BatchNorm, momentum=0.0)
    model = models.ResNet(3, stage_sizes=(1, 1), widths=(4, 6), norm=norm)
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]


def evaluated(command, folder, *options):
    code, out, err = command("eval", folder, *options)
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("domain", [None, "dark.npz"])
def test_recalibrate(home, variables, command, tmp_path, domain):
    before = files(home)
    options = ["--data", home / domain] if domain else []
    picture = tmp_path / "picture.svg"
    code, out, err = command(
        "recalibrate", home / "run", "--out", "new", "--plot", picture, *options
    )
    assert (code, err) == (0, "")
    assert files(home) == before and "<svg" in picture.read_text()
    assert imread(tmp_path / "new/recalibration.png").std() > 0
    saved = runs.read_run(tmp_path / "new")
    if domain:
        images = data.load_npz(home / domain)
    else:
        images = data.split(data.load_npz(home / "bars.npz"), seed=0).train
    x = jnp.asarray(data.standardize(images, saved.mean, saved.std).x)
    state = runs.restore(saved, training.make_mesh(jax.devices()[:1]))
    assert_close(state.batch_stats, whole_batch_statistics(variables, x), tolerance=2e-5)
    assert_close(state.params, variables["params"], tolerance=1e-12)
    assert "stage1_block0/shortcut/norm" in out and "accuracy" in out
    assert out.endswith("Saved in new; evaluate it with bn-jax eval new\n")
    facts = json.loads((tmp_path / "new/metrics.json").read_text())["recalibrated"]
    assert facts["run"] == str(home / "run") and facts["examples"] == len(x)
    assert [layer["values"] for layer in facts["layers"] if layer["path"] == "stem/norm"] == [
        16 * len(x)
    ]
    for run, when in ((home / "run", "before"), (tmp_path / "new", "after")):
        accuracy = f" accuracy {facts[when]['accuracy']:.2%} "
        assert accuracy in evaluated(command, run, *options)
        assert facts[when]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert domain is None or facts["before"]["accuracy"] < facts["after"]["accuracy"]


def test_recalibrate_with_a_prior(home, variables, command, tmp_path):
    mesh, old = training.make_mesh(jax.devices()[:1]), variables["batch_stats"]["stem"]["norm"]
    kept = {}
    for prior in ("0", "0.75"):
        options = "--data", home / "dark.npz", "--prior", prior, "--out", prior
        assert command("recalibrate", home / "run", *options)[0] == 0
        saved = runs.read_run(tmp_path / prior)
        kept[prior] = runs.restore(saved, mesh).batch_stats["stem"]["norm"]
        facts = json.loads((tmp_path / prior / "metrics.json").read_text())
        assert facts["recalibrated"]["prior"] == float(prior)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, old, kept["0"])
    assert_close(kept["0.75"], expected)


def test_fold(home, variables, command, tmp_path):
    before = files(home)
    code, out, err = command("fold", home / "run", "--out", "new")
    assert (code, err) == (0, "")
    assert files(home) == before
    assert "stage0_block0/ConvNorm_1/norm  into stage0_block0/ConvNorm_1/conv/kernel" in out
    assert evaluated(command, tmp_path / "new") == evaluated(command, home / "run")
    # What anybody has who reads the folder without this library.
    exported = jax.export.deserialize(
        bytearray((tmp_path / "new/checkpoint/model.stablehlo").read_bytes())
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "rsqrt" not in exported.mlir_module() and "batch_stats" not in exported.mlir_module()
    flat = load_file(tmp_path / "new/checkpoint/params.safetensors")
    params = {}
    for path, array in flat.items():
        *around, name = path.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), around, params)[name] = array
    x = np.random.default_rng(0).standard_normal((5, 4, 4, 1)).astype(np.float32)
    expected = make_small(ARM, 3, 8).apply(variables, x, train=False)
    assert_close(exported.call(params, x), expected, tolerance=1e-5)
    facts = json.loads((tmp_path / "new/metrics.json").read_text())["folded"]
    assert facts["after"]["parameters"] == sum(array.size for array in flat.values())
    norms = 1 + 2 * 2 + 1
    assert len(facts["norms"]) == norms
    # Of mean, variance, scale and bias the last stays.
    features = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) // 2
    assert facts["before"]["parameters"] - facts["after"]["parameters"] == 3 * features


def logits_of_folder(folder, x):
    """What anybody has who reads the folder without this library."""
    exported = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    return exported, exported.call(dict(np.load(folder / "params.npz")), x)


@pytest.mark.parametrize("fold", [False, True])
def test_export(home, variables, command, tmp_path, fold):
    (tmp_path / "names.txt").write_text("horizontal\nvertical\n\nnichts außer Rauschen\n")
    before = files(home)
    options = ["--fold"] if fold else []
    code, out, err = command(
        "export", home / "run", "--out", "new", "--class-names", "names.txt", *options
    )
    assert (code, err) == (0, "")
    assert files(home) == before
    accuracy = evaluated(command, home / "run").removeprefix("test accuracy ")
    assert out == (
        f"test accuracy of the run: {accuracy}"
        f"test accuracy of the exported model, on raw images: {accuracy}"
        "Saved in new; its README.md shows how to load and call it\n"
    )
    # The pixels as they are in the user's file, and a batch of another size.
    raw = np.load(home / "run/test.npz")["x"][:5].astype(np.float32)
    facts = json.loads((home / "run/metrics.json").read_text())["data"]
    standardized = (raw.astype(np.float64) - facts["mean"]) / facts["std"]
    expected = make_small(ARM, 3, 8).apply(variables, jnp.asarray(standardized, jnp.float32), False)
    exported, logits = logits_of_folder(tmp_path / "new", raw)
    assert_close(logits, expected, tolerance=1e-4)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert ("rsqrt" in exported.mlir_module()) is not fold
    model = bn.load_exported(tmp_path / "new")
    assert model.class_names == ("horizontal", "vertical", "nichts außer Rauschen")
    np.testing.assert_array_equal(model(raw), logits)


def test_export_of_what_was_folded(home, command, tmp_path):
    assert command("fold", home / "run", "--out", "folded")[0] == 0
    code, out, err = command("export", "folded")
    assert (code, err) == (0, "")
    assert out.count(evaluated(command, home / "run").removeprefix("test accuracy ")) == 2
    raw = np.load(home / "run/test.npz")["x"].astype(np.float32)
    command("export", home / "run", "--out", "new")
    expected = logits_of_folder(tmp_path / "new", raw)[1]
    assert_close(logits_of_folder(tmp_path / "folded-exported", raw)[1], expected, tolerance=1e-4)


def test_export_refuses(home, command, monkeypatch, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff")
    (copy_of(home / "run", tmp_path / "damaged") / "checkpoint/manifest.ocdbt").write_bytes(b"0")
    (copy_of(home / "run", tmp_path / "no test") / "test.npz").unlink()
    plain = copy_of(home / "run", tmp_path / "plain") / "metrics.json"
    metrics = json.loads(plain.read_text()) | {"best_arm": runs.NO_NORM}
    plain.write_text(json.dumps(records.seal_metrics(metrics)))
    run = home / "run"
    cases = {
        ("no run",): "DIR: no run does not exist, expected the folder of a run",
        ("damaged",): "DIR: damaged/checkpoint is missing or damaged",
        ("no test",): "DIR: no test/test.npz does not exist",
        ("plain", "--fold"): f"DIR: the model in plain is of the arm {runs.NO_NORM!r} and has no",
        (run, "--out", "full"): "--out: full exists and is not empty",
        (run, "--out", "two.txt"): "--out: two.txt is a file, expected a new folder",
        (run, "--class-names", "no.txt"): "--class-names: no.txt cannot be read (",
        (run, "--class-names", "latin.txt"): "--class-names: latin.txt cannot be read (",
        (run, "--class-names", "two.txt"): "--class-names: two.txt holds 2 names, expected 3, one",
        (): "Missing argument 'DIR'.",
    }
    before = files(tmp_path)
    for arguments, message in cases.items():
        code, out, err = command("export", *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith(f"bn-jax: error: {message}"), (arguments, err)
        assert err.count("\n") == 1, arguments
    assert files(tmp_path) == before

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    code, out, err = command("export", run, "--out", "new")
    assert (code, out) == (2, "")
    assert err == (
        "bn-jax: error: --out: new cannot be made (Permission denied); choose another folder\n"
    )
    assert files(tmp_path) == before


def test_audit(home, command, tmp_path):
    run = copy_of(home / "run", tmp_path / "a")
    before = files(run)
    code, out, err = command("audit", "a")
    assert (code, err) == (0, "")
    assert out.startswith("layer ") and out.endswith("Saved in a-audit\n")
    found = json.loads((tmp_path / "a-audit/audit.json").read_text())
    saturated = {layer["path"]: layer["saturated"] for layer in found["layers"]}
    assert len(saturated) == 6
    assert saturated["stem/norm"] is not None and saturated["stage1_block0/shortcut/norm"] is None
    assert not {finding["kind"] for finding in found["findings"]} & {"never updated", "not finite"}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a-audit"}
    assert {path.name for path in (tmp_path / "a-audit").iterdir()} == {"audit.json", "audit.png"}
    assert imread(tmp_path / "a-audit/audit.png").std() > 0
    assert files(run) == before
    code, out, err = command("audit", "a/../a/")
    assert code == 2 and "a-audit exists and is not empty" in err


def test_audit_finds_what_is_wrong(home, command, tmp_path):
    # A domain whose first norm sees other images than in training.
    code, out, err = command("audit", home / "run", "--data", home / "dark.npz", "--out", "new")
    assert (code, err) == (0, "")
    findings = json.loads((tmp_path / "new/audit.json").read_text())["findings"]
    stale = [finding for finding in findings if finding["kind"] == "stale"]
    assert "stem/norm" in {finding["path"] for finding in stale}
    assert all(finding["message"] in " ".join(out.split()) for finding in findings)
    assert "bn." not in " ".join(finding["advice"] for finding in stale)
    # The advice, followed.
    (line,) = {finding["advice"].split(": ")[1] for finding in stale}
    assert line == f"bn-jax recalibrate {home / 'run'} --data {home / 'dark.npz'}"
    assert command(*shlex.split(line)[1:], "--out", "fresh")[0] == 0
    options = ("--data", home / "dark.npz", "--out", "again", "--plot", "again.png")
    code, out, err = command("audit", "fresh", *options)
    assert (code, err) == (0, "")
    assert "stale: " not in out
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


def test_advice_is_what_to_enter():
    kinds = typing.get_args(typing.get_type_hints(bn.Finding)["kind"])
    found = bn.Audit((), tuple(bn.Finding(kind, "norm", "", "{as it was}") for kind in kinds))
    said = {
        finding.kind: finding.advice
        for finding in advice.with_commands(found, Path("my run"), None).findings
    }
    assert set(advice.ADVICE) < set(kinds)
    for kind in ("never updated", "stale", "differs in evaluation"):
        assert said[kind].endswith(": bn-jax recalibrate 'my run'")
    assert said["redundant scale"].endswith(": bn-jax fold 'my run'")
    assert said["not finite"] == "{as it was}"


def test_refusals(home, command, tmp_path):
    np.savez(tmp_path / "other.npz", **bars(200, seed=5))
    metrics = json.loads((home / "run/metrics.json").read_text())
    others = {
        "plain": {"best_arm": runs.NO_NORM},
        "folded": {"folded": {}},
        "lost": {"config": metrics["config"] | {"data": "no.npz"}},
        "changed": {"config": metrics["config"] | {"data": "other.npz"}},
    }
    for name, facts in others.items():
        run = copy_of(home / "run", tmp_path / name)
        (run / "metrics.json").write_text(json.dumps(records.seal_metrics(metrics | facts)))
    (copy_of(home / "run", tmp_path / "damaged") / "checkpoint/manifest.ocdbt").write_bytes(b"0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "full.png").touch()
    no_norm = (
        "has no batch norm, expected a model with batch norm; give a run whose best arm has batch "
        "norm"
    )
    cases = {
        ("recalibrate", "plain"): no_norm,
        ("fold", "plain"): f"DIR: the model in plain is of the arm {runs.NO_NORM!r} and",
        ("audit", "plain"): no_norm,
        ("fold", "folded"): "DIR: the model in folded was folded and has no batch norm",
        ("recalibrate", "lost"): "DIR: the training data of lost cannot be loaded (no.npz does not "
        "exist; give the path of an .npz file); give images to measure the statistics on with",
        ("recalibrate", "changed"): "DIR: other.npz no longer holds the training data of changed "
        "(its test part differs); restore it, or give images",
        ("recalibrate", "damaged"): "DIR: damaged/checkpoint is missing or damaged",
        ("recalibrate", "no run"): "DIR: no run does not exist, expected the folder of a run",
        ("audit", "lost", "--data", "no.npz"): "--data: no.npz does not exist",
        ("audit", "lost", "--out", "full"): "--out: full exists and is not empty",
        ("audit", "plain", "--plot", "a.txt"): "--plot: received a.txt, expected a file name that "
        "ends in .png, .pdf, .svg",
        ("recalibrate", "plain", "--plot", "no/a.png"): "--plot: no/a.png cannot be made (No such",
        ("recalibrate", "plain", "--plot", "full.png"): "--plot: full.png exists",
        ("audit", "plain", "--plot", f"{'a' * 300}.png"): "cannot be made (File name too long)",
        ("recalibrate", "lost", "--prior", "1"): "--prior: received 1.0, expected 0 to below 1",
        ("fold",): "Missing argument 'DIR'.",
    }
    before = files(tmp_path)
    for arguments, message in cases.items():
        code, out, err = command(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("bn-jax: error: ") and message in err, (arguments, err)
        assert err.count("\n") == 1, arguments
    assert files(tmp_path) == before


def test_what_is_not_finite_is_null_in_json(tmp_path):
    value = {"a": [np.array([1.0, np.nan])], "b": np.float32(np.inf), "c": None, "d": "text"}
    writing.write_json(tmp_path / "a.json", value)
    expected = {"a": [[1.0, None]], "b": None, "c": None, "d": "text"}
    assert json.loads((tmp_path / "a.json").read_text()) == expected


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(OSError), writing.staged(tmp_path / name) as folder:
            (folder / "file").touch()
            raise OSError(errno.ENOSPC, "disk full")
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    with writing.staged(tmp_path / "old") as folder:
        (folder / "file").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "old"]


def test_results_in_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with writing.staged(Path()) as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arm", "present", "examples"),
    [(ARM, 100, 64), (ARM, 7, 6), (runs.PER_DEVICE, 100, 64), (runs.PER_DEVICE, 40, 32)],
)
def test_the_batch_that_is_audited(home, arm, present, examples):
    saved = runs.read_run(home / "run")._replace(arm=arm, batch_size=64, devices=2)
    assert runs._audited_examples(saved, present, "--data") == examples


@pytest.mark.parametrize(("arm", "least"), [(ARM, 2), (runs.PER_DEVICE, 32)])
def test_too_few_images_to_audit(home, arm, least):
    saved = runs.read_run(home / "run")._replace(arm=arm, batch_size=64, devices=2)
    message = f"--data: received {least - 1} images, expected at least {least}, which the stat"
    with pytest.raises(CommandError, match=message):
        runs._audited_examples(saved, least - 1, "--data")
