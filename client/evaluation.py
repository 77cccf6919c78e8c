"""A site's answer to an evaluation: its patients counted against the cohort, noised or under its floor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.patients import roles_of
from client.published import Published
from client.site import SiteConfig
from common.evaluation.counts import Population
from common.evaluation.plan import score_names
from common.evaluation.scores import scores
from common.evaluation.tabulate import tabulate
from common.privacy.evaluation_release import evaluation_spend, noised_counts
from common.privacy.events import GaussianStatistics
from common.study import Protocol
from common.table import Table

PUBLISHED = "published.json"


def aggregates(
    config: SiteConfig, protocol: Protocol, cohort: Table, patients: Table, seed: int | None
) -> NDArray[np.float64]:
    """The values that leave, float64 (1, values): all cells of the plan, then the scores; NaN where hidden.

    `seed=None` draws the noise from the operating system; a seed is for simulations, whose ε is then "as if".
    """
    roles = roles_of(protocol, len(patients))
    taking_part = np.setdiff1d(np.arange(len(patients)), roles.holdout)
    populations: dict[Population, Table] = {"everyone": patients}
    if len(roles.holdout):
        populations["fit"] = Table(patients.schema, patients.values[taking_part])
        populations["holdout"] = Table(patients.schema, patients.values[roles.holdout])
    withheld = config.policy.withheld(protocol.schema)
    plan, counts = tabulate(protocol, cohort, populations, withheld)
    event = evaluation_spend(protocol)
    if isinstance(event, GaussianStatistics):
        return noised_counts(plan.join(counts), plan, event, seed)[None, :]
    floor = max(config.policy.min_count, protocol.study.evaluation.min_count)
    shown = Published(config.site.state / PUBLISHED).publish(plan, counts, protocol.schema, floor)
    found = scores(protocol, cohort, populations, floor, withheld)
    return np.concatenate([plan.join(shown), [found[name] for name in score_names(protocol)]])[None, :]
