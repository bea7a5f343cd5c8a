"""Makes ``pytorch.json``: what PyTorch's batch norms compute, step by step, in double precision.

``pip install torch==2.13.0 numpy && python tests/golden/make_pytorch.py``
"""

import json
from pathlib import Path

import numpy as np
import torch

STEPS = 6
SHAPES = {"BatchNorm1d": (8, 3), "BatchNorm2d": (4, 3, 2, 2)}


def train_and_evaluate(name: str, momentum: float | None) -> dict[str, object]:
    """Trains a layer on a few batches that differ in mean and spread, then evaluates it."""
    rng = np.random.default_rng(0)
    layer = getattr(torch.nn, name)(3, eps=1e-3, momentum=momentum).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -0.5, 0.0]))
        layer.bias.copy_(torch.tensor([0.25, 0.0, -1.0]))
    steps = []
    for step in range(STEPS):
        noise = rng.standard_normal(SHAPES[name]).astype(np.float32)
        x = torch.tensor(noise * (step + 1) + 10 * step, dtype=torch.float64, requires_grad=True)
        layer.zero_grad()
        y = layer(x)
        torch.sin(y).sum().backward()
        steps.append(
            {
                "x": x.tolist(),
                "y": y.tolist(),
                "gradients": {
                    "x": x.grad.tolist(),
                    "scale": layer.weight.grad.tolist(),
                    "bias": layer.bias.grad.tolist(),
                },
                "mean": layer.running_mean.tolist(),
                "var": layer.running_var.tolist(),
            }
        )
    return {
        "layer": name,
        "momentum": momentum,
        "epsilon": layer.eps,
        "scale": layer.weight.tolist(),
        "bias": layer.bias.tolist(),
        "steps": steps,
        "num_batches_tracked": int(layer.num_batches_tracked),
        "evaluated": layer.eval()(x).tolist(),
    }


def main() -> None:
    """Writes the file."""
    golden = {
        "command": "python tests/golden/make_pytorch.py",
        "torch": torch.__version__,
        "cases": [
            train_and_evaluate(name, momentum) for name in SHAPES for momentum in (0.1, None)
        ],
    }
    path = Path(__file__).with_name("pytorch.json")
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
