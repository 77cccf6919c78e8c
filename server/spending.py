"""What a study between hospitals spends, from its protocol, which fixes it: the coordinator has no ledger of a site."""

from __future__ import annotations

from collections.abc import Mapping

from common.privacy.anchor import anchor_events
from common.privacy.channel_release import channel_event, fit_patients
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.evaluation_release import evaluation_spend
from common.privacy.events import BoundedInfluence, Event, GaussianUpdate, UnboundedInfluence
from common.study import Protocol, Study


def round_event(study: Study, number: int, weight: float, patients: int) -> Event:
    """What round `number` costs a site with n = `patients`, as its trainer records it; declared constants alone."""
    training, noise = study.training, study.privacy.update_noise
    if training.mode == "dpsgd":
        return dpsgd_schedule(study, fit_patients(study, patients)).event(number)
    if training.mode == "none":
        return UnboundedInfluence(round=number, weight=weight)
    if noise > 0:
        return GaussianUpdate(number, training.update_norm, noise, weight)
    return BoundedInfluence(number, training.update_norm, weight)


def planned_events(protocol: Protocol, patients: Mapping[str, int], rounds: int) -> dict[str, list[Event]]:
    """The spends of every site over the `rounds` it was asked for, the rows and the evaluation it was asked for."""
    study, total = protocol.study, sum(patients.values())
    asked = min(rounds, study.training.rounds)  # an anchored study has a line for round 0 and no round
    events: dict[str, list[Event]] = {
        site: [
            *anchor_events(study),
            *(round_event(study, number, count / total, count) for number in range(1, asked + 1)),
        ]
        for site, count in patients.items()
    }
    if study.release.method == "channel":
        from common.encoding import TableEncoding  # with PyTorch, which `status` does not wait for
        from server.rows import share_rows
        from server.strategy import Member

        diameter = TableEncoding(protocol.schema).diameter
        members = [Member(0, site, count) for site, count in sorted(patients.items())]
        for site, rows in share_rows(study.release.rows, members).items():
            if rows > 0:
                events[site].append(channel_event(study, diameter, patients[site], rows))
    if study.evaluation.method != "none" and rounds >= study.training.rounds:
        for spent in events.values():
            spent.append(evaluation_spend(protocol))
    return events
