"""Models that nobody here wrote: what every tool does with each of them."""

import jax
import pytest

from benchmarks.zoo.checks import CHECKS
from benchmarks.zoo.measuring import MODELS, specimen
from benchmarks.zoo.table import expected_exception

pytestmark = pytest.mark.usefixtures("compile_quickly", "promoted_ranks")


@pytest.fixture(scope="module")
def promoted_ranks():
    """Other packages need not do without."""
    with jax.numpy_rank_promotion("allow"):
        yield


def cases():
    for name, entry in MODELS.items():
        for check in CHECKS:
            # All checks of a model run in one process, which makes the model once.
            marks = [pytest.mark.xdist_group(name)]
            expected = expected_exception(check, name, entry.library)
            if expected is not None and expected.status == "absent":
                continue
            if expected is not None:
                marks.append(
                    pytest.mark.xfail(strict=True, raises=AssertionError, reason=expected.text)
                )
            yield pytest.param(name, check, marks=marks, id=f"{name}: {check}")


@pytest.mark.parametrize("name, check", [*cases()])
def test_the_model_passes_the_check(name, check):
    assert CHECKS[check](specimen(name))
