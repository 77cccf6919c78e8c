"""The filter: a study's whole schedule, worst case, against the strictest limit on ε, before anything is sent.

Nothing here looks at a patient. The schedule is a function of the study and the number of patients, which is public;
what is spent already, in all studies of the site, stands in its ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from client.site import PolicySection
from client.trainers import MODES
from common.encoding import TableEncoding
from common.privacy.accountant import Guarantee, prospective
from common.privacy.channel_release import channel_event, fit_patients
from common.privacy.events import Event
from common.privacy.ledger_entries import Entry
from common.study import Protocol

WORST_WEIGHT = 1.0  # when joining, the weight is not known yet; no accountant's ε depends on it


@dataclass(frozen=True)
class Budget:
    """What a study will spend at this site if it runs to its end, and how much the site may have spent by then.

    `limit` is an ε at the study's δ, against the coordinator, who sees most; infinity if neither study nor site sets
    one.
    """

    protocol: Protocol
    patients: int
    limit: float

    @classmethod
    def of(cls, protocol: Protocol, policy: PolicySection, patients: int) -> Budget:
        """The budget of `protocol` at a site with this policy and n = `patients`, which is public."""
        limits = [limit for limit in (protocol.study.privacy.max_epsilon, policy.max_epsilon) if limit is not None]
        return cls(protocol, patients, min(limits, default=math.inf))

    @cached_property
    def planned(self) -> tuple[Event, ...]:
        """Every spend of the study in order: its rounds, then its release through the channel, if it has one.

        The site's share of the rows is not known yet. The channel's noise is calibrated to the same ε for any number;
        here it stands with all rows of the cohort.
        """
        study = self.protocol.study
        trainer, trained = MODES[study.training.mode], fit_patients(study, self.patients)
        rounds = range(1, study.training.rounds + 1)
        planned: list[Event] = [trainer.event(study, number, WORST_WEIGHT, trained) for number in rounds]
        if study.release.method == "channel":
            diameter = TableEncoding(self.protocol.schema).diameter
            planned.append(channel_event(study, diameter, self.patients, study.release.rows))
        return tuple(planned)

    @property
    def limited(self) -> bool:
        """Whether anybody set a limit."""
        return math.isfinite(self.limit)

    def approve(self, entries: Sequence[Entry], now: Event | None = None) -> Guarantee:
        """What will hold at the end of the study on top of all `entries` of the ledger, or `BudgetError` with numbers.

        Rounds of this study that are spent already count once. `now` stands in for the planned event of its round.
        """
        spent: dict[str, list[Event]] = {}
        for entry in entries:
            spent.setdefault(entry.study, []).append(entry.event)
        own = spent.pop(self.protocol.digest, [])
        done = {event.round for event in own}
        planned = [now if now is not None and event.round == now.round else event for event in self.planned]
        ahead = [event for event in planned if event.round not in done]
        delta = self.protocol.study.privacy.delta
        return prospective(own, ahead, delta, self.limit, other_studies=spent.values())
