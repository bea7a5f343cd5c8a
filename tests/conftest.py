import sys

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process and folder, and returns its code and streams."""
    # With devices in place, --devices can only choose among the four of conftest.py.
    assert len(jax.devices()) == 4
    monkeypatch.chdir(tmp_path)

    from bn_jax.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bn-jax", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capsys.readouterr()

    return run
