"""Makes ``domains.json``: what norms by domain of PyTorch and timm compute, train and learn.

``pip install torch==2.13.0``, ``pip install --no-deps timm==1.0.31``, then
``PYTHONPATH=tests python tests/golden/make_domains.py``
"""

import json
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from golden.make_convert import described, drawn

FEATURES, DOMAINS = 4, 3


def batches():
    """Two batches of 6 images [2, 2, 3], the offset and scale of each third its own."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 6, 2, 2, FEATURES))
    part = np.arange(6)[:, None, None, None] // 2
    return (x * (1 + part) + 3 * part).astype(np.float32)


def run(model, domains):
    """Trains on both batches, evaluates the first, and returns outputs and arrays."""
    import torch

    arrays = described({key: value.numpy() for key, value in model.state_dict().items()})
    model.load_state_dict({one[0]: torch.tensor(drawn(*one)) for one in arrays})
    model = model.double()
    inputs = torch.tensor(np.moveaxis(batches(), -1, 2), dtype=torch.float64)
    with torch.no_grad():
        trained = [model.train()(x).tolist() for x in inputs]
        evaluated = [model.eval()(inputs[0], *domain).tolist() for domain in domains]
        after = {key: value.tolist() for key, value in model.state_dict().items()}
    return {"arrays": arrays, "trained": trained, "evaluated": evaluated, "after": after}


def split_batch_norm(momentum):
    """The `SplitBatchNorm2d` of timm, between two convolutions."""
    # This module of timm needs PyTorch alone, the package torchvision as well.
    package: Any = util.find_spec("timm")
    path = Path(package.submodule_search_locations[0]) / "layers" / "split_batchnorm.py"
    spec: Any = util.spec_from_file_location("split_batchnorm", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return net(module.SplitBatchNorm2d(FEATURES, momentum=momentum, num_splits=DOMAINS))


def list_of_norms(momentum):
    """A list of norms, as in the code of Chang et al. 2019; each third of a batch is a domain."""
    from torch import cat, nn

    class DomainSpecific(nn.Module):
        def __init__(self):
            super().__init__()
            norms = (nn.BatchNorm2d(FEATURES, momentum=momentum) for _ in range(DOMAINS))
            self.bns = nn.ModuleList(norms)

        def forward(self, x, domain=None):
            if domain is not None:
                return self.bns[domain](x)
            parts = zip(self.bns, x.chunk(DOMAINS), strict=True)
            return cat([norm(part) for norm, part in parts])

    return net(DomainSpecific())


def net(norm):
    """A convolution, a norm by domain, and a second convolution."""
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(FEATURES, FEATURES, 1)
            self.bn = norm
            self.head = nn.Conv2d(FEATURES, 2, 1)

        def forward(self, x, *domain):
            return self.head(self.bn(self.conv(x), *domain).relu())

    return Net()


def main():
    """Writes the file."""
    cases: dict[str, Any] = {}
    for momentum in (0.1, None):
        each: list[Any] = [(domain,) for domain in range(DOMAINS)]
        cases[f"list {momentum}"] = run(list_of_norms(momentum), each)
        cases[f"timm {momentum}"] = run(split_batch_norm(momentum), [()])
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    Path(__file__).with_name("domains.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
