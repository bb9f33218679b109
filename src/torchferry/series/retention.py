"""Which checkpoints of a series are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["Best", "Retention", "score_of"]


@dataclass(frozen=True, slots=True)
class Best:
    """What makes one checkpoint better than another.

    Attributes:
        metric: The name of a metric.
        mode: Whether the smallest or the largest is the best.
    """

    metric: str
    mode: Literal["min", "max"]

    def find(self, metrics: Mapping[int, Mapping[str, object]]) -> list[int]:
        """Those of these steps that have the metric, the best first; of equals, the later."""
        scores = {step: score for step, each in metrics.items() if (score := score_of(each, self.metric)) is not None}
        sign = 1 if self.mode == "min" else -1
        return sorted(scores, key=lambda step: (sign * scores[step], -step))


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints of a series are kept.

    Attributes:
        max_to_keep: So many: the latest, or the best where ``best`` says what that is. The latest is kept in any case.
            None for all.
        keep_period: Those whose step is a multiple of it are kept, and do not count. None for none.
        best: As above.
    """

    max_to_keep: int | None = None
    keep_period: int | None = None
    best: Best | None = None

    def superfluous(self, steps: Iterable[int], metrics: Mapping[int, Mapping[str, object]]) -> list[int]:
        """Those of these steps that go, the oldest first.

        Args:
            steps: Of all whole checkpoints.
            metrics: What is known of them; asked where there is a ``best``.
        """
        ordered = sorted(steps)
        if self.max_to_keep is None or not ordered:
            return []
        counted = [step for step in ordered if not self._is_kept_for_ever(step)]
        ranked = counted[::-1]
        if self.best is not None:
            best = self.best.find({step: metrics.get(step, {}) for step in counted})
            ranked = [*best, *(step for step in ranked if step not in set(best))]
        kept = {ordered[-1], *ranked[: self.max_to_keep]}
        return [step for step in counted if step not in kept]

    def _is_kept_for_ever(self, step: int) -> bool:
        return self.keep_period is not None and step % self.keep_period == 0


def score_of(metrics: Mapping[str, object], name: str) -> float | None:
    """A metric as a number that can be compared; None where there is none, or it is not a number."""
    value = metrics.get(name)
    return value if isinstance(value, int | float) and value == value else None  # noqa: PLR0124 - NaN is not
