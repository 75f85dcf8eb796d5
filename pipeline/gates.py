"""Gates: a figure against a limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgepress.pipeline.recipe import Budget

PASS, FAIL, UNVERIFIED = "pass", "fail", "unverified"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one gate.

    Attributes:
        gate: `outputs`, `accuracy_drop`, `sqnr_db`, `size_bytes` or `latency_ms`.
        verdict: `pass`, `fail`, or `unverified` where nothing was measured.
        value: the measured figure, or None.
        limit: what was allowed.
        detail: one sentence: what was compared, or why nothing was measured.
    """

    gate: str
    verdict: str
    value: float | None
    limit: float | None
    detail: str


def judge(
    gate: str,
    value: float | None,
    limit: float,
    detail: str,
    *,
    at_least: bool = False,
) -> Verdict:
    """Hold a figure to a limit. A figure that was not measured is unverified, never a pass."""
    if value is None:
        verdict = UNVERIFIED
    else:
        verdict = PASS if (value >= limit if at_least else value <= limit) else FAIL
    return Verdict(gate=gate, verdict=verdict, value=value, limit=limit, detail=detail)


def judge_budget(
    budget: Budget,
    *,
    size_bytes: int,
    accuracy_drop: tuple[float | None, str],
    sqnr_db: tuple[float | None, str],
    latency_ms: tuple[float | None, str],
) -> list[Verdict]:
    """Judge every line of a budget; figures come with the sentence that explains them."""
    verdicts = []
    if budget.accuracy_drop is not None:
        verdicts.append(
            judge("accuracy_drop", accuracy_drop[0], budget.accuracy_drop, accuracy_drop[1])
        )
    if budget.sqnr_db is not None:
        verdicts.append(judge("sqnr_db", sqnr_db[0], budget.sqnr_db, sqnr_db[1], at_least=True))
    if budget.size_bytes is not None:
        detail = "the executable and the coded weights"
        verdicts.append(judge("size_bytes", size_bytes, budget.size_bytes, detail))
    if budget.latency_ms is not None:
        verdicts.append(judge("latency_ms", latency_ms[0], budget.latency_ms, latency_ms[1]))
    return verdicts


def all_passed(verdicts: Iterable[Verdict]) -> bool:
    """Whether every gate passed; an unverified one did not."""
    return all(verdict.verdict == PASS for verdict in verdicts)
