import importlib
import subprocess
import sys

import pytest

from bn_jax import training
from bn_jax.lab import fitting

OLD_TO_NEW = {
    "bn_jax.data": "bn_jax.lab.data",
    "bn_jax.experiments": "bn_jax.lab.experiments",
    "bn_jax.models": "bn_jax.lab.models",
}


@pytest.mark.parametrize("old", OLD_TO_NEW)
def test_old_modules_warn_and_are_the_new_ones(old):
    new = OLD_TO_NEW[old]
    for name in [name for name in sys.modules if name == old or name.startswith(f"{old}.")]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning) as caught:
        assert importlib.import_module(old) is importlib.import_module(new)
    (warning,) = caught
    message = f"{old} has moved to {new}, and the old name will be removed in the next release"
    assert str(warning.message) == message
    # Now it is in place, and nobody is told again.
    importlib.import_module(old)


# As notebooks and README have named them.
IMPORTS = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from bn_jax.experiments.verdicts import Setting
    from bn_jax.experiments import figures, hessian
    from bn_jax import models
    from bn_jax.data import load_digits
    import bn_jax.experiments.sweeps
    bn_jax.experiments.sweeps
assert [warning.filename for warning in caught] == ["<string>"] * 3, caught
assert [warning.lineno for warning in caught] == [5, 7, 8]
for name, module in sys.modules.items():
    if name.startswith(("bn_jax.experiments", "bn_jax.models", "bn_jax.data")):
        assert module is sys.modules[name.replace("bn_jax.", "bn_jax.lab.")], name
from bn_jax.lab.experiments.verdicts import Setting as same
assert Setting is same
"""


def test_old_imports_still_work():
    finished = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("name", ["Report", "fit", "make_optimizer", "shard_dataset"])
def test_what_has_left_training_warns_at_the_line_that_uses_it(name):
    message = f"bn_jax.training.{name} has moved to bn_jax.lab.fitting.{name}, and"
    with pytest.warns(DeprecationWarning, match=message) as caught:
        assert getattr(training, name) is getattr(fitting, name)
    assert caught[0].filename == __file__


def test_what_never_was_in_training_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'bn_jax\.training' has no attribute 'fits'"):
        training.fits  # noqa: B018
