"""What the attack gates read of the sites' own attacks in evaluation.json, all sites together.

Between hospitals no patient is at the coordinator: `common.evaluation.attack_results` gives rates and areas with
intervals over chance and noise, and from these the same quantities are taken that a simulation gives from its counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from common.evaluation.results import ALL
from server.gates import AttackEvidence, Measured

GET = (
    "a study whose [evaluation] has the sites count attacks, with a hold-out of enough patients; or one that does not"
    " declare this gate"
)
SOURCE = "evaluation.json: attacks, all sites"


def sites_evidence(gate: str, evaluation: Mapping[str, Any] | None, secrets: Sequence[str] = ()) -> AttackEvidence:
    """The evidence of one gate. `secrets` are those that inference must have tried."""
    if evaluation is None:
        return AttackEvidence((), ("the study has no evaluation by the sites",), SOURCE, GET)
    found = evaluation["results"][ALL].get("attacks")
    if gate == "singling_out":
        why = evaluation.get("not_measured", {}).get("singling_out", "it is not counted between hospitals")
        return AttackEvidence((), (str(why),), SOURCE, GET)
    if found is None:
        why = evaluation.get("not_measured", {}).get("attacks", "the sites' evaluation holds no attacks")
        return AttackEvidence((), (str(why),), SOURCE, GET)
    measured, missing = list[Measured](), list[str]()
    for name, entry in _entries(gate, found):
        if entry is None or entry["reason"]:
            missing.append(f"{name}: {'not possible' if entry is None else entry['reason']}")
        else:
            measured += _measured(gate, name, entry)
    if gate == "inference":
        missing += [f"the secret {name!r} was not attacked" for name in secrets if name not in found["inference"]]
    return AttackEvidence(tuple(measured), tuple(missing), SOURCE, GET)


def _entries(gate: str, found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    if gate == "linkability":
        yield "linkability", found["linkability"]
        return
    for name, entry in found[gate].items():
        yield f"{gate} ({name})", entry


def _measured(gate: str, name: str, entry: Mapping[str, Any]) -> Iterator[Measured]:
    """Advantages for membership, differences for copies, excess risks (main − control)/(1 − control) otherwise."""
    if gate == "membership":
        area, rate = entry["auroc"], entry["true_positive_rate"]
        level = rate["false_positive_rate"]
        yield Measured(f"{name}, 2 AUROC - 1", 2 * area["value"] - 1, 2 * area["high"] - 1)
        at = f"{name}, at {level:.0%} false positives"
        yield Measured(at, rate["value"] - level, rate["high"] - level)
        return
    difference = entry["difference"]
    if gate == "copies":
        # By chance in one of forty such numbers.
        beyond = difference["low"] > difference["chance"]
        yield Measured(name, difference["value"], difference["high"], beyond_chance=beyond)
        return
    # What is left to be gained: where the control nearly always succeeds the plain difference says more.
    left = 1.0 - min(max(entry["holdout"]["value"], 0.0), 0.99)
    yield Measured(name, difference["value"] / left, difference["high"] / left)
