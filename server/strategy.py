"""LipschitzFedAvg: federated averaging of norm-projected decoder updates under a certified Lipschitz bound.

A round: certify and send the global decoder; drop by name every reply that is not what the protocol says, or whose
ledger does not extend the one the coordinator has seen; add the weighted updates; project every layer onto its spectral
ball; certify; hand the round to the observer (checkpoint and `rounds.jsonl`). Weights are fixed before round 1 from
declared patient numbers and are not renormalised when a site is missing, so that no site's influence ever exceeds
2 w_k C (privacy.md, T1 and T2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import FederationError
from common.messages import TRAIN, TrainReply, TrainRequest
from common.model.vae import Decoder
from common.privacy.update import NORM_TOLERANCE, update_norm
from common.privacy.update_noise import largest_noisy_norm, require_useful_noise
from common.records import MessageError, arrays_digest
from common.study import Protocol
from server.replies import check_reply, collect_replies
from server.roll import Roll
from server.witness import Witness


@dataclass(frozen=True)
class Member:
    """A site that joined: its node in Flower, its name and its declared number of patients.

    `enrolment` is the fingerprint of the keys under which it was enrolled then, "" in a simulation.
    """

    node_id: int
    site: str
    patients: int
    enrolment: str = ""


@dataclass(frozen=True)
class RoundReport:
    """One line of `rounds.jsonl`: what the coordinator may know about a round. Times are in seconds."""

    round: int
    answered: tuple[str, ...]
    dropped: Mapping[str, str]
    certificate: float
    step_norm: float
    seconds: float
    server_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "round": self.round,
            "answered": list(self.answered),
            "dropped": dict(self.dropped),
            "certificate": self.certificate,
            "step_norm": self.step_norm,
            "seconds": round(self.seconds, 4),
            "server_seconds": round(self.server_seconds, 4),
        }


Observer = Callable[[RoundReport, Decoder], None]


@dataclass
class LipschitzFedAvg(Strategy):
    """Weighted mean of validated updates, then P_s on every layer. `decoder` is global and changed in place.

    `witness` must know the ledger of every member. `completed` rounds are behind a study that is resumed. Before and
    after every round `roll` says who is enrolled still: others are not asked, and what they sent meanwhile is dropped.
    """

    protocol: Protocol
    decoder: Decoder
    members: tuple[Member, ...]
    observer: Observer
    witness: Witness
    completed: int = 0
    roll: Roll = field(default_factory=Roll)
    _started: float = field(default=0.0, init=False)
    _preparation: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        names = [member.site for member in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"site names must be unique (found {sorted(names)})")
        if len({member.node_id for member in self.members}) != len(self.members):
            raise ValueError("every member needs a node of its own")
        if any(member.patients < 1 for member in self.members):
            raise ValueError("every member must declare at least one patient, else it has no weight")
        training = self.protocol.study.training
        if len(self.members) < training.min_sites:
            raise ValueError(f"{len(self.members)} members, but min_sites is {training.min_sites}")
        patients = sum(member.patients for member in self.members)
        require_useful_noise(self.protocol.study, self.decoder.size, {m.site: m.patients for m in self.members})
        self.weights = {member.site: member.patients / patients for member in self.members}
        self.shapes = {name: tuple(value.shape) for name, value in self.decoder.named_parameters()}
        self.constrained = training.mode != "none"

    def summary(self) -> None:
        """Nothing to print: the observer reports every round."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Certify the global decoder and address it to every member; Flower counts from 1, a resumed study goes on.

        `FederationError` before anything is sent, and spent, if fewer than `min_sites` members are enrolled still.
        """
        number = self.completed + server_round
        self._started = time.perf_counter()
        self._certify()
        decoder = self.decoder.arrays()
        lapsed = self._lapsed()
        self._require_enough(number, len(self.members) - len(lapsed), "members that may be asked", lapsed)
        self._preparation = time.perf_counter() - self._started
        for member in self.members:
            if member.site in lapsed:
                continue
            weight, seen = self.weights[member.site], self.witness.request_fields(member.site)
            request = TrainRequest(self.protocol.digest, number, weight, decoder, **seen)
            yield Message(content=request.to_record(), message_type=TRAIN, dst_node_id=member.node_id)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Validate, add, project, certify, report; `FederationError` if fewer than `min_sites` replies are valid."""
        arrived, number = time.perf_counter(), self.completed + server_round
        updates, dropped = self.collect(number, replies)
        self._require_enough(number, len(updates), "valid replies", dropped)
        step = self.aggregate(updates)
        measured = self._certify()
        now = time.perf_counter()
        self.observer(
            RoundReport(
                round=number,
                answered=tuple(sorted(updates)),
                dropped=dropped,
                certificate=measured,
                step_norm=step,
                seconds=now - self._started,
                server_seconds=self._preparation + now - arrived,
            ),
            self.decoder,
        )
        return ArrayRecord(), None  # the decoder is the strategy's own; Flower need not carry it

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No federated evaluation during training: a site's losses never leave it."""
        return ()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to aggregate."""
        return None

    def collect(
        self, number: int, replies: Iterable[Message]
    ) -> tuple[dict[str, Mapping[str, torch.Tensor]], dict[str, str]]:
        """Valid updates by site, and for every other member the reason why it is missing from this round."""
        nodes = {member.node_id: member.site for member in self.members}
        return collect_replies(
            replies, nodes, lambda site, message: self._validated(site, number, message), self.witness, self._lapsed()
        )

    def _lapsed(self) -> dict[str, str]:
        return self.roll.lapsed({member.site: member.enrolment for member in self.members})

    def _require_enough(self, number: int, found: int, what: str, reasons: Mapping[str, str]) -> None:
        minimum = self.protocol.study.training.min_sites
        if found < minimum:
            listed = "; ".join(f"{site}: {reason}" for site, reason in sorted(reasons.items()))
            raise FederationError(
                f"round {number}: {found} {what}, min_sites is {minimum} ({listed})",
                fix="see the logs of the sites named, or lower training.min_sites in a new study",
            )

    def _validated(self, site: str, number: int, message: Message) -> Mapping[str, torch.Tensor]:
        reply = TrainReply.from_record(message.content, self.shapes)
        check_reply(reply, site, self.protocol.digest)
        if reply.round != number:
            raise MessageError(f"answers round {reply.round}")
        assert reply.update is not None  # `from_record` has read one, since the status is ok
        # Before the update is looked at: a head once shown stays shown, whatever becomes of the update.
        self.witness.spent(
            site,
            (reply.ledger_length, reply.ledger_head, reply.ledger_signature),
            reply.study,
            reply.round,
            arrays_digest(reply.update),
        )
        study = self.protocol.study
        radius = largest_noisy_norm(study.training.update_norm, study.privacy.update_noise, self.decoder.size)
        if self.constrained and update_norm(reply.update) > radius * (1.0 + NORM_TOLERANCE):
            raise MessageError(f"the update's norm exceeds C = {radius:g}")
        return reply.update

    @torch.no_grad()
    def aggregate(self, updates: Mapping[str, Mapping[str, torch.Tensor]]) -> float:
        """decoder ← P_s(decoder + Σ_k w_k u_k), summed in float64 in order of site names; returns ‖Σ_k w_k u_k‖₂."""
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        for site in sorted(updates):
            for name, array in updates[site].items():
                total[name] += self.weights[site] * array.to(torch.float64)
        for name, parameter in self.decoder.named_parameters():
            parameter.copy_(parameter.to(torch.float64) + total[name])
        self.decoder.network.project(exact=True)
        return update_norm(total)

    def _certify(self) -> float:
        """The certificate of the global decoder; `CertificateError` if it exceeds the study's bound."""
        if not self.constrained:
            return self.decoder.certificate()
        return self.decoder.require_certificate(self.protocol.study.model.decoder_lipschitz)
