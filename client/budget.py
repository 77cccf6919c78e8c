"""The filter: a study's whole schedule, worst case, against the strictest limit on ε, before anything is sent.

Nothing here looks at a patient. The schedule is a function of the study and the number of patients, which is public;
what is spent already, in all studies of the site, stands in its ledger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property

from client.policy import PolicySection
from client.trainers import MODES
from common.encoding import TableEncoding
from common.privacy.accountant import BudgetError, Guarantee, prospective
from common.privacy.anchor import anchor_events
from common.privacy.channel_release import channel_event, fit_patients
from common.privacy.evaluation_release import evaluation_spend
from common.privacy.events import Event
from common.privacy.ledger_entries import Entry
from common.study import Protocol

YEAR = timedelta(days=365)
WORST_WEIGHT = 1.0  # when joining, the weight is not known yet; no accountant's ε depends on it


@dataclass(frozen=True)
class Budget:
    """What a study will spend at this site if it runs to its end, and how much the site may have spent by then.

    The limits are ε at the study's δ, against the coordinator, who sees most; infinity where nobody sets one. `limit`
    is for all studies together, `per_study` for this one, `per_year` for it and all studies of the last 365 days.
    """

    protocol: Protocol
    patients: int
    limit: float
    per_study: float = math.inf
    per_year: float = math.inf

    @classmethod
    def of(cls, protocol: Protocol, policy: PolicySection, patients: int) -> Budget:
        """The budget of `protocol` at a site with this policy and n = `patients`, which is public."""
        limits = [limit for limit in (protocol.study.privacy.max_epsilon, policy.max_epsilon) if limit is not None]
        alone, year = policy.max_epsilon_per_study or math.inf, policy.max_epsilon_per_year or math.inf
        return cls(protocol, patients, min(limits, default=math.inf), alone, year)

    @cached_property
    def planned(self) -> tuple[Event, ...]:
        """Every spend of the study in order: its anchor, its rounds, its channel release and its evaluation, if any.

        The site's share of the rows is not known yet. The channel's noise is calibrated to the same ε for any number;
        here it stands with all rows of the cohort.
        """
        study = self.protocol.study
        planned: list[Event] = [*anchor_events(study)]
        if study.training.rounds > 0:
            trainer, trained = MODES[study.training.mode], fit_patients(study, self.patients)
            rounds = range(1, study.training.rounds + 1)
            planned += [trainer.event(study, number, WORST_WEIGHT, trained) for number in rounds]
        if study.release.method == "channel":
            diameter = TableEncoding(self.protocol.schema).diameter
            planned.append(channel_event(study, diameter, self.patients, study.release.rows))
        if study.evaluation.method != "none":
            planned.append(evaluation_spend(self.protocol))
        return tuple(planned)

    @property
    def limited(self) -> bool:
        """Whether anybody set a limit."""
        return math.isfinite(min(self.limit, self.per_study, self.per_year))

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
        whole = prospective(own, ahead, delta, self.limit, other_studies=spent.values())
        recent = studies_of_the_year(entries, clock())
        for limit, key, others in (
            (self.per_study, "max_epsilon_per_study (this study alone)", []),
            (
                self.per_year,
                "max_epsilon_per_year (with all studies of the last 365 days)",
                [events for study, events in spent.items() if study in recent],
            ),
        ):
            if math.isfinite(limit):
                try:
                    prospective(own, ahead, delta, limit, other_studies=others)
                except BudgetError as error:
                    raise BudgetError(f"{key}: {error.message}", fix=error.fix) from None
        return whole


def clock() -> datetime:
    """Now, by this machine's clock."""
    return datetime.now(UTC)


def studies_of_the_year(entries: Sequence[Entry], now: datetime) -> set[str]:
    """The studies whose last spend is not older than 365 days; each counts with all it ever spent, which is safe.

    The ledger's order is chained and its dates are not corrected: an entry is as young as the youngest before it, so a
    clock that went backwards makes nothing old. An unreadable date is young.
    """
    found, youngest = set[str](), datetime.min.replace(tzinfo=UTC)
    for entry in entries:
        youngest = max(youngest, _moment(entry.recorded_at) or now)
        if now - youngest <= YEAR:
            found.add(entry.study)
    return found


def _moment(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
