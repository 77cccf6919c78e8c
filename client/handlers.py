"""What a site does with a request: check policy, do the work, spend, reply. No Flower in here.

Whatever goes wrong becomes a fixed `Status`; the reason in words goes to the site's own log and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors
from torch import Tensor

from client.admission import (
    RefusedError,
    delta_warning,
    require_allowed,
    require_open,
    require_patients,
    status_of,
)
from client.anchor import exact_statistics, noised_statistics
from client.budget import Budget
from client.device import pick_device
from client.evaluation import aggregates
from client.generation import ChannelInputs, channel_rows, synthetic_encoder
from client.memory import memory_limit
from client.patients import Enrolled, load_patients, load_table, released_patients, require_enrolled, trained_patients
from client.policy import hint_of_withheld
from client.site import SiteConfig
from client.state import (
    Released,
    SiteState,
    StateError,
    load_released,
    load_state,
    save_released,
    save_state,
)
from client.studies import Study, open_study
from client.trainers import MODES, RoundInputs
from common.anchor_messages import AnchorReply, AnchorRequest, read_anchor_header
from common.audit import AUDIT_LOG, AuditError, AuditLog
from common.encoding import EncodedTable
from common.errors import CohortiumError, OutputError
from common.evaluation_messages import EvaluateReply, EvaluateRequest, read_evaluate_header
from common.files import write_atomic
from common.generation import check_rows
from common.messages import (
    Countersigned,
    JoinReply,
    JoinRequest,
    ReleaseReply,
    ReleaseRequest,
    Status,
    TrainReply,
    TrainRequest,
    read_release_header,
    read_train_header,
)
from common.model.training import load_encoder
from common.model.vae import Decoder
from common.privacy.anchor import anchor_event
from common.privacy.channel_release import channel_event
from common.privacy.evaluation_release import evaluation_spend
from common.privacy.events import ChannelRelease, Event
from common.privacy.ledger import Ledger
from common.privacy.ledger_keys import SignedHead, load_key
from common.privacy.memory import remembering
from common.records import MessageError, arrays_digest, values_digest
from common.study import Protocol
from common.table import Table

ENROLLED = "enrolled.json"


@dataclass(frozen=True)
class _Answer:
    """Values that are made once: where they are kept, what they were made from, what they spend, among how many."""

    path: Path
    base: str
    event: Event
    patients: int


class Site:
    """One hospital answering requests under its own policy."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.name = config.site.name

    def join(self, record: Any) -> JoinReply:
        """Accept or refuse a study."""
        try:
            require_open(self.config.policy)
            protocol = Protocol.from_json(JoinRequest.from_record(record).protocol)
            require_allowed(self.config, protocol)
            data = load_patients(self.config, protocol)
            patients = len(data)
            require_patients(self.config, protocol, patients)
            warnings = (
                delta_warning(protocol, patients, self.name),
                hint_of_withheld(self.config.policy, protocol.schema),
            )
            folder = self._folder(protocol.digest)
            with self._ledger() as ledger:
                ledger.require_key()  # a site that could not spend must not join
                head, entries = ledger.head(), ledger.entries()
            if any(entry.study == protocol.digest for entry in entries):  # joins again: with the same table only
                self._enrolled(folder, protocol, data)
            with self._remembering():
                whole = Budget.of(protocol, self.config.policy, patients).approve(entries)
            Enrolled.of(data).save(folder / ENROLLED)
            write_atomic(folder / "protocol.json", json.dumps(protocol.to_json(), indent=1))
            for warning in filter(None, warnings):
                self._log("warning", study=protocol.digest, reason=warning)
            epsilon = whole.epsilon if math.isfinite(whole.epsilon) else "infinity"
            self._log("joined", study=protocol.digest, patients=patients, epsilon=epsilon, delta=whole.delta)
            signed = (head.length, head.head, head.signature, head.key)
            return JoinReply(Status.OK, self.name, protocol.digest, patients, *signed)
        except Exception as error:
            return JoinReply(self._explain(error), self.name)

    def train(self, record: Any) -> TrainReply:
        """Answer one round with a projected update, after the spend is durable."""
        digest, number = "", 0
        try:
            header = read_train_header(record)
            digest, number = str(header["study"]), int(header["round"])
            study = self._accepted(digest)
            if number > study.protocol.study.training.rounds:
                raise RefusedError(Status.WRONG_ROUND, "the study has fewer rounds than the one asked for")
            request = TrainRequest.from_record(record, study.shapes)
            self._require_rounds(study, request)
            with self._remembering():
                update, head = self._answer(study, request)
            signed = (head.length, head.head, head.signature)
            return TrainReply(Status.OK, self.name, digest, number, update, *signed)
        except Exception as error:
            return TrainReply(self._explain(error, round=number), self.name, digest, number)

    def anchor(self, record: Any) -> AnchorReply:
        """Answer with noised statistics of the patients who train, after the spend is durable."""
        digest = ""
        try:
            digest = str(read_anchor_header(record)["study"])
            study = self._accepted(digest)
            request = AnchorRequest.from_record(record, study.cells)
            with self._remembering():
                values, head = self._anchored(study, request)
            return AnchorReply(Status.OK, self.name, digest, values, head.length, head.head, head.signature)
        except Exception as error:
            return AnchorReply(self._explain(error), self.name, digest)

    def release(self, record: Any) -> ReleaseReply:
        """Answer the request for synthetic rows through the site's own channel, after the spend is durable."""
        digest = ""
        try:
            digest = str(read_release_header(record)["study"])
            study = self._accepted(digest)
            request = ReleaseRequest.from_record(record, study.shapes)
            with self._remembering():
                rows, head = self._released(study, request)
            return ReleaseReply(Status.OK, self.name, digest, rows, head.length, head.head, head.signature)
        except Exception as error:
            return ReleaseReply(self._explain(error), self.name, digest)

    def evaluate(self, record: Any) -> EvaluateReply:
        """Answer how the cohort compares with the site's patients, in aggregates, after the spend is durable."""
        digest = ""
        try:
            digest = str(read_evaluate_header(record)["study"])
            study = self._accepted(digest)
            columns, most = len(study.protocol.schema.columns), study.protocol.study.evaluation.rows
            request = EvaluateRequest.from_record(record, columns, most)
            with self._remembering():
                values, head = self._evaluated(study, request)
            return EvaluateReply(Status.OK, self.name, digest, values, head.length, head.head, head.signature)
        except Exception as error:
            return EvaluateReply(self._explain(error), self.name, digest)

    def _answer(self, study: Study, request: TrainRequest) -> tuple[Mapping[str, Tensor], SignedHead]:
        """The update for this round: trained now, or the identical one if it was trained before.

        With it the signed head of the ledger, which holds its spend.
        """
        started = time.perf_counter()
        self._keep_countersignature(request)
        base = arrays_digest(request.decoder)
        state = load_state(study.state_path, request.study)
        training = study.protocol.study.training
        trainer = MODES[training.mode]
        everyone = load_patients(self.config, study.protocol)
        self._enrolled(study.folder, study.protocol, everyone)
        data = trained_patients(everyone, study.protocol)
        event = trainer.event(study.protocol.study, request.round, request.weight, len(data))
        budget = Budget.of(study.protocol, self.config.policy, len(everyone))
        approve = budget.approve if budget.limited else None
        if approve is not None:
            with self._ledger() as ledger:
                approve(ledger.entries())  # now, so that nothing is trained in vain; again when it is spent
        if request.round == state.round and base == state.base:
            update = state.reply
        elif request.round <= state.round:
            raise RefusedError(Status.WRONG_ROUND, f"round {request.round} was answered from another decoder")
        else:
            self._check_continuity(study, state)
            device = pick_device(self.config.site.device)
            inputs = RoundInputs(
                study=study.protocol.study,
                encoding=study.encoding,
                data=data,
                decoder=request.decoder,
                round=request.round,
                state=state.trainer,
                seed=self._seed(study.protocol, request.round),
                device=device,
            )
            with memory_limit(self.config.policy, device):
                result = trainer.train(inputs)
            update = result.update
            save_state(study.state_path, request.study, SiteState(request.round, base, result.state, update))
            seconds = time.perf_counter() - started
            about = {"study": request.study, "digest": arrays_digest(update), "round": request.round}
            self._log("trained", **about, seconds=round(seconds, 3), **dict(result.diagnostics))
        # The spend is on disk before the update exists anywhere outside this process.
        with self._ledger() as ledger:
            ledger.record(request.study, event, arrays_digest(update), approve)
            return update, ledger.head()

    def _require_rounds(self, study: Study, request: TrainRequest) -> None:
        """`RefusedError` while the steward has not looked at the anchored decoder, which is kept for him."""
        if study.protocol.study.anchor.epsilon is None:
            return
        if request.round == 1 and not study.anchored_decoder_path.exists():
            write_atomic(study.anchored_decoder_path, save_tensors(dict(request.decoder)))
        if self.config.policy.stop_after_anchor:
            raise RefusedError(
                Status.REFUSED_BY_POLICY,
                f"stop_after_anchor: look at the decoder with `cohortium-site anchored {request.study[:16]}`, then set"
                " it to false, or leave it and send nothing more",
            )

    def _released(self, study: Study, request: ReleaseRequest) -> tuple[NDArray[np.float64], SignedHead]:
        """The rows, made now or the identical ones made before, and the signed head of the ledger with their spend.

        Nothing here compares a row with a patient: that would be a query. The gate is the schema and the site's policy.
        """
        settings, policy = study.protocol.study, self.config.policy
        if settings.release.method != "channel" or request.rows > settings.release.rows:
            raise RefusedError(Status.BAD_REQUEST, "the study releases no such rows through this site's channel")
        if request.rows > policy.max_release_rows:
            raise RefusedError(
                Status.REFUSED_BY_POLICY,
                f"{request.rows} rows were asked for, max_release_rows is {policy.max_release_rows}",
            )
        self._keep_countersignature(request)
        data = load_patients(self.config, study.protocol)
        self._enrolled(study.folder, study.protocol, data)
        event = channel_event(settings, study.encoding.diameter, len(data), request.rows)

        def make() -> NDArray[np.float64]:
            started = time.perf_counter()
            rows = self._channel_rows(study, request, data, event)
            about = {"study": request.study, "digest": values_digest(rows), "rows": request.rows}
            self._log("released", **about, seconds=round(time.perf_counter() - started, 3))
            return rows

        answer = _Answer(study.released_path, arrays_digest(request.decoder), event, len(data))
        return self._once(study, answer, make, (request.rows, len(study.protocol.schema.columns)))

    def _anchored(self, study: Study, request: AnchorRequest) -> tuple[NDArray[np.float64], SignedHead]:
        """The noised statistics of a step, made now or the identical ones made before, and the ledger's head."""
        protocol = study.protocol
        if protocol.study.anchor.epsilon is None:
            raise RefusedError(Status.BAD_REQUEST, "the study has no anchor")
        self._keep_countersignature(request)
        everyone = load_patients(self.config, protocol)
        self._enrolled(study.folder, protocol, everyone)
        event = anchor_event(protocol.study, request.step)
        if request.step == "moments" and not study.anchored_path("marginals").exists():
            raise RefusedError(Status.WRONG_ROUND, "the second step of the anchor was asked for before the first")

        def make() -> NDArray[np.float64]:
            exact, sensitivity = exact_statistics(
                protocol, trained_patients(everyone, protocol), request.step, request.marginals
            )
            seed = None if protocol.study.study.seed is None else self._seed(protocol, event.round)
            values = noised_statistics(exact, sensitivity, event, seed)[None, :]
            about = {"study": request.study, "digest": values_digest(values), "step": request.step}
            self._log("anchored", **about, values=values.size, sensitivity=sensitivity)
            return values

        base = request.step if request.marginals is None else values_digest(request.marginals[None, :])
        return self._once(study, _Answer(study.anchored_path(request.step), base, event, len(everyone)), make)

    def _evaluated(self, study: Study, request: EvaluateRequest) -> tuple[NDArray[np.float64], SignedHead]:
        """The aggregates, made now or the identical ones made before, and the head of the ledger with their spend."""
        protocol = study.protocol
        if protocol.study.evaluation.method == "none":
            raise RefusedError(Status.BAD_REQUEST, "the study asks for no evaluation")
        self._keep_countersignature(request)
        cohort = Table(protocol.schema, request.cohort)
        try:
            check_rows(cohort)
        except CohortiumError as error:
            raise MessageError(error.message) from None
        patients = load_table(self.config, protocol)
        self._enrolled(study.folder, protocol, study.encoding.encode(patients))
        event = evaluation_spend(protocol)
        base = values_digest(request.cohort)

        def make() -> NDArray[np.float64]:
            seed = None if protocol.study.study.seed is None else self._seed(protocol, event.round)
            return aggregates(self.config, protocol, cohort, patients, seed)

        def log(values: NDArray[np.float64]) -> None:
            # What leaves, value for value (null: hidden); an answer that cannot be logged does not leave.
            sent = [None if math.isnan(value) else value for value in values.ravel().tolist()]
            about = {"study": request.study, "digest": values_digest(values), "cohort": base}
            AuditLog(self.config.site.state / AUDIT_LOG, self.name).append(
                "evaluated", **about, method=protocol.study.evaluation.method, values=sent
            )

        return self._once(study, _Answer(study.evaluated_path, base, event, len(patients)), make, log=log)

    def _once(
        self,
        study: Study,
        answer: _Answer,
        make: Callable[[], NDArray[np.float64]],
        shape: tuple[int, int] | None = None,
        log: Callable[[NDArray[np.float64]], None] | None = None,
    ) -> tuple[NDArray[np.float64], SignedHead]:
        """What `make` gives, or the identical values given before, and the head of the ledger with their spend.

        Values that were made for another request are refused: fresh ones would be a spend of their own.
        """
        protocol, digest = study.protocol, study.protocol.digest
        budget = Budget.of(protocol, self.config.policy, answer.patients)
        approve = functools.partial(budget.approve, now=answer.event) if budget.limited else None
        if approve is not None:
            with self._ledger() as ledger:
                approve(ledger.entries())  # now, so that nothing is made in vain; again when it is spent
        made = load_released(answer.path, digest)
        if made is None:
            with memory_limit(self.config.policy):
                made = Released(answer.base, make())
            save_released(answer.path, digest, made)
        elif made.base != answer.base or (shape is not None and made.rows.shape != shape):
            raise RefusedError(Status.WRONG_ROUND, f"{answer.path.stem}: answered before, for another request")
        if log is not None:
            log(made.rows)
        with self._ledger() as ledger:
            ledger.record(digest, answer.event, values_digest(made.rows), approve)
            return made.rows, ledger.head()

    def _channel_rows(
        self, study: Study, request: ReleaseRequest, data: EncodedTable, event: ChannelRelease
    ) -> NDArray[np.float64]:
        settings = study.protocol.study
        decoder = Decoder(study.encoding, settings.model, initialise=False)
        decoder.load_arrays(request.decoder)
        seed = self._seed(study.protocol, event.round)
        if settings.channel.encoder == "synthetic":
            encoder = synthetic_encoder(decoder, study.encoding, settings, seed)
        else:
            state = load_state(study.state_path, request.study)
            if state.round == 0:
                raise RefusedError(Status.WRONG_ROUND, "the site has no encoder: it answered no round of this study")
            encoder = load_encoder(study.encoding, settings, state.trainer)
        return channel_rows(
            ChannelInputs(
                study=settings,
                encoding=study.encoding,
                data=released_patients(data, study.protocol),
                encoder=encoder,
                decoder=decoder,
                event=event,
                seed=None if settings.study.seed is None else seed,
            )
        )

    def _keep_countersignature(self, request: Countersigned) -> None:
        """Store what the coordinator has seen of this ledger; a ledger that holds less is used no further."""
        if request.witness_key:
            with self._ledger() as ledger:
                ledger.countersigned(
                    request.witness_key, request.witness_length, request.witness_head, request.witness_signature
                )

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Calibration and approval cost their time once a study, and not once a message in a fresh process."""
        key = load_key(self.config.site.state / "ledger.key")  # a site that could not spend must not work in vain
        with remembering(self.config.site.state / "accounting.json", self.name, key):
            yield

    def _ledger(self) -> Ledger:
        return Ledger(self.config.site.state / "ledger.sqlite", self.name)

    def _accepted(self, digest: str) -> Study:
        """The study with this digest, if the site accepted it and its policy still allows it."""
        require_open(self.config.policy)
        path = self._folder(digest) / "protocol.json"
        if not digest.isalnum() or not path.exists():
            raise RefusedError(Status.UNKNOWN_STUDY, "training was asked for a study this site has not accepted")
        study = open_study(path, path.stat().st_mtime_ns)
        if study.protocol.digest != digest:
            raise RefusedError(Status.UNKNOWN_STUDY, f"{path} does not hold the study its folder names")
        require_allowed(self.config, study.protocol)
        return study

    def _enrolled(self, folder: Path, protocol: Protocol, data: EncodedTable) -> None:
        """`DataError` unless these are the patients with whom the site joined."""
        require_enrolled(Enrolled.load(folder / ENROLLED), self.config, protocol, data)

    def _check_continuity(self, study: Study, state: SiteState) -> None:
        """In dpsgd mode encoder and optimiser live here for the whole study; without them the site takes no part."""
        if study.protocol.study.training.mode != "dpsgd" or state.round > 0:
            return
        with self._ledger() as ledger:
            if ledger.entries(study.protocol.digest):
                raise StateError(
                    f"{study.state_path}: the training state is gone, but the ledger has spends of this study",
                    fix="restore it from a backup; without it the site cannot go on with this study",
                )

    def _seed(self, protocol: Protocol, number: int) -> int:
        """A seed from the operating system's CSPRNG; in a seeded simulation a hash of seed, site and round."""
        seed = protocol.study.study.seed
        if seed is None:
            return secrets.randbits(63)
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.name}/{number}".encode()).digest()[:7])

    def _folder(self, digest: str) -> Path:
        return self.config.site.state / "studies" / digest[:32]

    def _explain(self, error: Exception, **fields: Any) -> Status:
        """Log the reason at the site and return the code that may leave it."""
        status = status_of(error)
        # Texts of our own errors hold no patient value; those of libraries might, so only their type is logged.
        ours = isinstance(error, CohortiumError | MessageError)
        self._log("refused", outcome=status.value, reason=str(error) if ours else type(error).__name__, **fields)
        return status

    def _log(self, action: str, **fields: Any) -> None:
        """One line in the site's audit log; a log that cannot be written never changes an answer."""
        with contextlib.suppress(OutputError, AuditError, ValueError):  # ValueError: a diagnostic that is not finite
            AuditLog(self.config.site.state / AUDIT_LOG, self.name).append(action, **fields)
