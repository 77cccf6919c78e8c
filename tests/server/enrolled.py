"""Hospitals with keys of their own, a consortium that enrols them, and Flower's grid as its SuperLink shows it."""

import hashlib
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from common.enrolment import enrolment_text, make_enrolment
from common.keys import new_p384
from common.messages import JoinReply, Status
from common.privacy.ledger_keys import public_hex, sign_head
from server.consortium import init_consortium
from server.enrol import SiteEntry, enrol

NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)


class Hospital:
    """A site: its name, its two keys, and the id that the SuperLink gave its node."""

    def __init__(self, name: str, node_id: int, patients: int = 10) -> None:
        self.name, self.node_id, self.patients = name, node_id, patients
        self.node: EllipticCurvePrivateKey = new_p384()
        self.ledger = Ed25519PrivateKey.generate()

    def joins(self, study: str, *, name: str | None = None, ledger: Ed25519PrivateKey | None = None) -> RecordDict:
        """What it answers, under its own name and with its own ledger's key unless told otherwise."""
        site, key, head = name or self.name, ledger or self.ledger, hashlib.sha256(b"").hexdigest()
        signed = (0, head, sign_head("ledger head", key, site, 0, head), public_hex(key))
        return JoinReply(Status.OK, site, study, self.patients, *signed).to_record()

    @property
    def info(self) -> NodeInfo:
        """Its node as the SuperLink lists it."""
        pem = self.node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return NodeInfo(node_id=self.node_id, public_key=pem, status="online")


class Consortium:
    """The coordinator's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._requests = folder, 0
        init_consortium(folder, "Trial", ["localhost"])

    def enrol(self, hospital: Hospital, *, replace: bool = False) -> SiteEntry:
        """Every request is a minute newer than the one before."""
        self._requests += 1
        made = make_enrolment(
            hospital.name, hospital.node, hospital.ledger, "0.1.0", NOW + timedelta(minutes=self._requests)
        )
        path = self.folder.parent / f"enrolment-{hospital.name}.json"
        path.write_text(enrolment_text(made))
        return enrol(path, self.folder, replace=replace)


class Connected:
    """Flower's grid: who is connected, with public keys, and what each node answers."""

    def __init__(self, answers: dict[Hospital, Callable[[], RecordDict | None]]) -> None:
        self.answers, self.asked = answers, list[int]()

    def get_nodes(self) -> list[NodeInfo]:
        return [hospital.info for hospital in self.answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        nodes = {hospital.node_id: answer for hospital, answer in self.answers.items()}
        replies = []
        for message in messages:
            self.asked.append(message.metadata.dst_node_id)
            answer = nodes[message.metadata.dst_node_id]()
            if answer is not None:
                replies.append(Message(answer, reply_to=message))
        return replies
