"""What was measured on a device, or on a fleet of them: `evidence.json`, written and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepress.pipeline.gates import FAIL, PASS, UNVERIFIED, Verdict, all_passed

if TYPE_CHECKING:
    from edgepress.pipeline.fleet import Outcome

_NUMBER = (int, float)
_OPTIONAL_NUMBER = (int, float, type(None))
_OPTIONAL_DICT = (dict, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "device": (dict,),
    "verdicts": (list,),
    "outputs": (dict,),
    "accuracy": _OPTIONAL_DICT,
    "latency": _OPTIONAL_DICT,
    "instructions": (int, type(None)),
    "trials": (list, type(None)),
    "passed": (bool,),
}
_VERDICT_KINDS: dict[str, tuple[type, ...]] = {
    "gate": (str,),
    "verdict": (str,),
    "value": _OPTIONAL_NUMBER,
    "limit": _OPTIONAL_NUMBER,
    "detail": (str,),
}
_LATENCY_KINDS: dict[str, tuple[type, ...]] = {
    "samples_ms": (list,),
    "min_ms": _NUMBER,
    "p50_ms": _OPTIONAL_NUMBER,
    "p90_ms": _OPTIONAL_NUMBER,
    "p99_ms": _OPTIONAL_NUMBER,
    "intervals_ms": (dict,),
    "refused": (list,),
    "windows_ms": (list,),
    "conditions": (dict,),
    "sustained": (list,),
    "mlperf": _OPTIONAL_DICT,
    "threads": (int,),
    "device": (dict,),
}
_POINT_KINDS: dict[str, tuple[type, ...]] = {"at_s": _NUMBER, "p50_ms": _NUMBER}
_MLPERF_KINDS: dict[str, tuple[type, ...]] = {
    "queries": (int,),
    "duration_s": _NUMBER,
    "early_stopping_p90_ms": _OPTIONAL_NUMBER,
    "refused": (list,),
}
#: What evidence of older versions lacks.
_LATER: dict[str, Any] = {
    "intervals_ms": {},
    "refused": [],
    "windows_ms": [],
    "conditions": {},
    "sustained": [],
    "mlperf": None,
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that was measured, and what follows from it.

    Attributes:
        device: facts about the device.
        verdicts: one per gate.
        outputs: how the device's answers compare to the reference.
        accuracy: top-1, agreement, SQNR against the original model, or None without samples.
        latency: all raw samples and their percentiles, or None where it was not measured.
        instructions: per inference, under an emulator, else None.
        trials: what each of the models costs that a search for mixed precision tried, or None where
            there was none.
    """

    device: dict[str, Any]
    verdicts: list[Verdict]
    outputs: dict[str, Any]
    accuracy: dict[str, Any] | None
    latency: dict[str, Any] | None
    instructions: int | None
    trials: list[dict[str, Any]] | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all_passed(self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for `evidence.json` and `--json`."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def fleet_evidence(outcomes: Sequence[Outcome[Evidence]]) -> dict[str, Any]:
    """Return what was measured on a fleet as plain data.

    It is the evidence of the first board that answered, with `fleet`: per board its name as the
    user gave it, its error and its own evidence, one of which is None. `passed` tells whether every
    board passed. Where none answered there is `fleet` and `passed` alone, which is no evidence.
    """
    fleet = [
        {
            "device": outcome.device,
            "error": None if outcome.error is None else str(outcome.error),
            "evidence": None if outcome.value is None else outcome.value.to_json(),
        }
        for outcome in outcomes
    ]
    answered = [outcome.value.to_json() for outcome in outcomes if outcome.value is not None]
    passed = len(answered) == len(outcomes) and all(each["passed"] for each in answered)
    return {**(answered[0] if answered else {}), "fleet": fleet, "passed": passed}


def overall(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Sum verdicts up: `pass`, else the worse of `fail` and `unverified` with the gates' names.

    >>> overall([{"gate": "golden", "verdict": "pass"}, {"gate": "latency_ms", "verdict": "fail"}])
    'fail: latency_ms'
    """
    for kind in (FAIL, UNVERIFIED):
        if gates := [each["gate"] for each in verdicts if each["verdict"] == kind]:
            return f"{kind}: {', '.join(gates)}"
    return PASS


def checked_evidence(data: Mapping[str, Any]) -> dict[str, Any]:
    """Check evidence that was read from a file, and fill in what older versions did not write.

    Raises:
        ValueError: says what is wrong with which key.
    """
    one = {k: v for k, v in data.items() if k not in ("schema", "manifest_sha256", "fleet")}
    result = {**data, **_checked(one, own_verdicts="fleet" not in data)}
    if "fleet" not in data:
        return result
    fleet = data["fleet"]
    if not isinstance(fleet, list) or not fleet:
        raise ValueError("'fleet' is no list of boards")
    result["fleet"] = [_checked_board(entry) for entry in fleet]
    passed = all(e["evidence"] is not None and e["evidence"]["passed"] for e in result["fleet"])
    if result["passed"] != passed:
        raise ValueError("'passed' is not what the boards of 'fleet' say")
    return result


def _checked_board(entry: Any) -> dict[str, Any]:
    kinds = {"device": (str,), "error": (str, type(None)), "evidence": _OPTIONAL_DICT}
    _check_kinds(entry, kinds, "an entry of 'fleet'")
    if (entry["error"] is None) == (entry["evidence"] is None):
        raise ValueError("an entry of 'fleet' has neither an error nor evidence, or both")
    found = entry["evidence"]
    return {**entry, "evidence": None if found is None else _checked(found, own_verdicts=True)}


def _checked(data: Mapping[str, Any], *, own_verdicts: bool) -> dict[str, Any]:
    """Check the evidence of one board; `own_verdicts`: `passed` follows from its verdicts."""
    data = {"trials": None, **data}
    _check_kinds(data, _KINDS, "the evidence")
    for verdict in data["verdicts"]:
        _check_kinds(verdict, _VERDICT_KINDS, "a verdict")
        if verdict["verdict"] not in (PASS, FAIL, UNVERIFIED):
            raise ValueError(f"there is no verdict {verdict['verdict']!r}")
    passed = overall(data["verdicts"]) == PASS
    if own_verdicts and data["passed"] != passed:
        raise ValueError("'passed' is not what 'verdicts' say")
    return {**data, "latency": checked_latency(data["latency"])}


def checked_latency(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Check the latency of one board likewise. Raises ValueError."""
    if data is None:
        return None
    latency = {**_LATER, **data}
    _check_kinds(latency, _LATENCY_KINDS, "'latency'")
    if len({latency[key] is None for key in ("p50_ms", "p90_ms", "p99_ms")}) > 1:
        raise ValueError("'latency' has some percentiles and lacks others")
    times = [*latency["samples_ms"], *latency["windows_ms"]]
    for pair in latency["intervals_ms"].values():
        if pair is not None and (not isinstance(pair, list) or len(pair) != 2):
            raise ValueError("an entry of 'intervals_ms' is malformed")
        times += [bound for bound in pair or () if bound is not None]
    if not latency["samples_ms"] or not all(type(each) in _NUMBER for each in times):
        raise ValueError("a time in 'latency' is no number")
    refused = [*latency["refused"]]
    for point in latency["sustained"]:
        _check_kinds(point, _POINT_KINDS, "an entry of 'sustained'", more=True)
    if latency["mlperf"] is not None:
        _check_kinds(latency["mlperf"], _MLPERF_KINDS, "'mlperf'", more=True)
        refused += latency["mlperf"]["refused"]
    if not all(isinstance(each, str) for each in refused):
        raise ValueError("an entry of 'refused' is no sentence")
    return latency


def _check_kinds(
    data: Any, kinds: Mapping[str, tuple[type, ...]], what: str, *, more: bool = False
) -> None:
    """Check the keys and types of an object; with `more` it may have other keys, too."""
    if not isinstance(data, dict):
        raise ValueError(f"{what} is no JSON object")
    for key in data:
        if key not in kinds and not more:
            raise ValueError(f"unknown key {key!r} in {what}")
    for key, allowed in kinds.items():
        if key not in data:
            raise ValueError(f"{key!r} is missing in {what}")
        if type(data[key]) not in allowed:
            raise ValueError(f"{key!r} in {what} is of another type")
