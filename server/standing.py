"""How a launched study stands with every site: whether it takes part, its rounds, and what is stated to be spent.

All of it is read from the files that the ServerApp leaves in OUT, which the SuperLink's restarts do not touch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.errors import CohortiumError
from common.privacy.events import ChannelRelease
from common.privacy.statement import epsilon_in_words, privacy_statement
from common.study import Protocol
from server.launch import complete_lines, read_waiting
from server.run import RunFiles
from server.spending import planned_events

# A statement on these takes seconds of accounting; `cohortium status --spend` waits for it.
SLOW = "the accounting takes seconds: `cohortium status --spend` does it"
UNDECIDED = "not waited for: it has decided, or was not online when it was asked last"


@dataclass(frozen=True)
class Standing:
    """One launch's files; `going` while its run is not over, `begun` once the run no longer waits in the queue."""

    protocol: Protocol
    files: RunFiles
    going: bool
    begun: bool = True

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """The complete lines of rounds.jsonl."""
        return complete_lines(self.files.rounds)

    @cached_property
    def waiting(self) -> dict[str, str] | None:
        """Whom the study waits for before its first round, with what for; None if it is not waiting."""
        return read_waiting(self.files) if self.going and self.files.waiting.exists() else None

    @cached_property
    def gathered(self) -> dict[str, Any] | None:
        """sites.json: who joined and who did not; None before everybody was asked."""
        try:
            document = json.loads(self.files.sites.read_text(encoding="utf-8"))
            patients = {str(name): int(site["patients"]) for name, site in document["joined"].items()}
            return {"joined": patients, "not_joined": dict(document["not_joined"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def patients(self) -> dict[str, int]:
        """Declared patients of every site that joined."""
        return self.gathered["joined"] if self.gathered else {}

    @property
    def current(self) -> int | None:
        """The round that the sites have been asked for and that is not over; None if there is none."""
        asking = self.going and self.begun and self.waiting is None and self.files.decoder.exists()
        done = len(self.rounds)
        return done + 1 if asking and self.patients and done < self.protocol.study.training.rounds else None

    @property
    def asked(self) -> int:
        """The most rounds that sites can have been asked for: one more than are over, unless all are.

        The round after the last line of rounds.jsonl may have been sent even if the run has ended since.
        """
        sent = bool(self.patients) and self.files.decoder.exists()
        return min(len(self.rounds) + 1, self.protocol.study.training.rounds) if sent else 0

    def participation(self, labels: Collection[str]) -> dict[str, str]:
        """Whether a site takes part; `labels` are its name and "node ID", under which it stands until it answers.

        `state` is joined, waiting (`reason` says what for), not joined (`reason` is its refusal), asked, not asked or
        unknown.
        """
        for label in labels:
            if self.waiting and label in self.waiting:
                return _state("waiting", self.waiting[label])
        if self.gathered:
            for label in labels:
                if label in self.gathered["joined"]:
                    return _state("joined")
                if self.waiting is None and label in self.gathered["not_joined"]:
                    return _state("not joined", str(self.gathered["not_joined"][label]))
        if self.waiting is not None:
            return _state("asked", UNDECIDED)
        if self.gathered:
            return _state("not asked", "it was not online while sites were asked, or was enrolled later")
        return _state("not asked") if self.going else _state("unknown", "the run ended while sites were asked")

    def training(self, site: str) -> dict[str, Any] | None:
        """What a member did in the last round that is over, and the round it is asked for now; None for others."""
        if site not in self.patients:
            return None
        found: dict[str, Any] = {"round": None, "state": "none yet", "reason": "", "asked_for": self.current}
        if self.rounds:
            last = self.rounds[-1]
            dropped = last["dropped"].get(site)
            state = "answered" if site in last["answered"] else "dropped" if dropped else "not asked"
            found |= {"round": last["round"], "state": state, "reason": str(dropped or "")}
        return found

    def spent(self, site: str) -> dict[str, int] | None:
        """Rounds that a member was asked for, which all count as spent, and those it answered; None for others."""
        if site not in self.patients:
            return None
        return {"asked": self.asked, "answered": sum(site in line["answered"] for line in self.rounds)}

    def privacy(self, *, slow: bool) -> dict[str, Any]:
        """What this study is stated to have spent: `source` is privacy.json once released, before that the protocol.

        `rounds` is how many the statement covers, `statement` is of the form of privacy.json, `in_words` its ε. Without
        `slow` a statement that takes seconds is left out, with `why`.
        """
        released = _released(self.files.privacy, self.protocol.digest)
        if released is not None:
            return _stated("privacy.json", len(self.rounds), released)
        study, asked = self.protocol.study, self.asked
        left_out: dict[str, Any] = {"source": None, "rounds": asked, "statement": None, "in_words": ""}
        if asked == 0:
            return left_out | {"why": "no round was asked for"}
        if not slow and (study.training.mode == "dpsgd" or study.release.method == "channel"):
            return left_out | {"why": SLOW}
        try:
            events = planned_events(self.protocol, self.patients, asked)
            if len(self.rounds) < study.training.rounds:  # the rows are asked for once all rounds are over
                events = {
                    site: [event for event in spent if not isinstance(event, ChannelRelease)]
                    for site, spent in events.items()
                }
            statement = privacy_statement(self.protocol, events, self.patients)
        except CohortiumError as error:
            return left_out | {"why": error.message}
        return _stated("protocol", asked, statement)


def _state(state: str, reason: str = "") -> dict[str, str]:
    return {"state": state, "reason": reason}


def _released(path: Path, digest: str) -> dict[str, Any] | None:
    try:
        statement = json.loads(path.read_text(encoding="utf-8"))
        return statement if statement["study_digest"] == digest and statement["entries"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stated(source: str, rounds: int, statement: Mapping[str, Any]) -> dict[str, Any]:
    found = {"source": source, "rounds": rounds, "statement": dict(statement)}
    return found | {"in_words": epsilon_in_words(statement), "why": ""}
