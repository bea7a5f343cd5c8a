"""Which norms `freeze` and `unfreeze` have frozen where a module is called."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from bn_jax._paths import matched


@dataclasses.dataclass(eq=False)
class Rule:
    """What one `freeze` or `unfreeze` says, and which of its patterns have matched a norm."""

    paths: tuple[str, ...]
    frozen: bool
    train_params: bool
    unmatched: set[str]
    norms: set[str] = dataclasses.field(default_factory=set)

    def covers(self, path: str) -> bool:
        """Tells whether a pattern matches the path of a norm, and notes both."""
        patterns = matched(self.paths, path)
        self.norms.add(path)
        self.unmatched -= patterns
        return bool(patterns)

    def require_matches(self) -> None:
        """Raises the ValueError for patterns that have matched no norm."""
        if not self.norms and self.unmatched:
            raise ValueError(
                "apply called no batch norm, of Flax's or of bn_jax.linen, that can be frozen or "
                "not: pass a function that calls one, such as model.apply. Norms without running "
                "statistics, such as LayerNorm, have nothing to freeze."
            )
        if self.unmatched:
            raise ValueError(
                f"No batch norm was called whose path matches {sorted(self.unmatched)}; the batch "
                f"norms called have the paths {sorted(self.norms)}. Pass patterns of these, or of "
                "modules around them."
            )


# JAX compiles again what it has compiled under another value of this context.
rules: Any = jax.make_user_context(())


def rule_for(module: nn.Module) -> Rule | None:
    """Returns the outermost rule that covers a norm; all of them note its path."""
    path = "/".join(module.path)
    covering = [rule for rule in rules.value if rule.covers(path)]
    return covering[0] if covering else None
