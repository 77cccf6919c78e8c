"""The filter: a study's whole schedule, worst case, against the strictest limit on ε, before anything is sent.

Nothing here looks at a patient. The schedule is a function of the study, and what is spent already, in all studies of
the site, stands in its ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from client.site import PolicySection
from client.trainers import MODES
from common.privacy.accountant import Guarantee, prospective
from common.privacy.events import Event
from common.privacy.ledger_entries import Entry
from common.study import Protocol

WORST_WEIGHT = 1.0  # when joining, the weight is not known yet; no accountant's ε depends on it


@dataclass(frozen=True)
class Budget:
    """What a study will spend at this site if it runs to its end, and how much the site may have spent by then.

    `limit` is an ε at `delta`, against the coordinator, who sees most; infinity if neither study nor site sets one.
    """

    study: str
    planned: tuple[Event, ...]
    delta: float
    limit: float

    @classmethod
    def of(cls, protocol: Protocol, policy: PolicySection, patients: int) -> Budget:
        """The stricter of the study's and the site's `max_epsilon`, and one event of the study's mode a round.

        `patients` is the number of the site's patients, which is public.
        """
        study = protocol.study
        trainer = MODES[study.training.mode]
        rounds = range(1, study.training.rounds + 1)
        planned = tuple(trainer.event(study, number, WORST_WEIGHT, patients) for number in rounds)
        limits = [limit for limit in (study.privacy.max_epsilon, policy.max_epsilon) if limit is not None]
        return cls(protocol.digest, planned, study.privacy.delta, min(limits, default=math.inf))

    @property
    def limited(self) -> bool:
        """Whether anybody set a limit."""
        return math.isfinite(self.limit)

    def approve(self, entries: Sequence[Entry]) -> Guarantee:
        """What will hold at the end of the study on top of all `entries` of the ledger, or `BudgetError` with numbers.

        Rounds of this study that are spent already count once.
        """
        spent: dict[str, list[Event]] = {}
        for entry in entries:
            spent.setdefault(entry.study, []).append(entry.event)
        own = spent.pop(self.study, [])
        done = {event.round for event in own}
        ahead = [event for event in self.planned if event.round not in done]
        return prospective(own, ahead, self.delta, self.limit, other_studies=spent.values())
