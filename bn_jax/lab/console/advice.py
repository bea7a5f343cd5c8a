"""The advice of an audit in the words of the command line."""

import shlex
from pathlib import Path

from bn_jax._audit import Audit, Finding

__all__ = ["with_commands"]

# By the kind of a finding. The others advise nothing that a command does.
ADVICE = {
    "never updated": "Train for more epochs, or compute them: {recalibrate}",
    "stale": "These images differ from those in training, or there were too few updates. Compute "
    "them anew from all images: {recalibrate}",
    "differs in evaluation": "A running average lags. Compute them in evaluation: {recalibrate}",
    "small batch": "Train with a larger --batch-size, or on fewer --devices if each has batch norm "
    "of its own.",
    "redundant scale": "Nothing has to be done. A model without its norms: {fold}",
}


def with_commands(audit: Audit, run: Path, data_file: Path | None) -> Audit:
    """Returns an audit of a saved run whose advice is what to enter.

    Args:
        audit: what `bn_jax.audit` returned.
        run: the folder of the run.
        data_file: the images that it was audited on; None for those of the run.
    """
    folder = shlex.quote(str(run))
    data = "" if data_file is None else f" --data {shlex.quote(str(data_file))}"
    commands = {
        "recalibrate": f"bn-jax recalibrate {folder}{data}",
        "fold": f"bn-jax fold {folder}",
    }

    def advise(finding: Finding) -> Finding:
        if finding.kind not in ADVICE:
            return finding
        return finding._replace(advice=ADVICE[finding.kind].format(**commands))

    return audit._replace(findings=tuple(map(advise, audit.findings)))
