from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import FederationError
from server.checkpoint import build_decoder
from server.recording import RecordingFedAvg, recorded_rounds
from server.run import RunSettings
from server.strategy import LipschitzFedAvg, Member
from server.witness import Witness
from tests.server.test_audit_modes import make_protocol

PROTOCOL = make_protocol("constrained")
MEMBERS = (Member(1, "anna", 60), Member(2, "berta", 40))


def updates(seed: int, *sites: str) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in build_decoder(PROTOCOL, 0).named_parameters()}
    return {site: {n: 0.01 * torch.randn(s, generator=generator) for n, s in shapes.items()} for site in sites}


def test_what_the_site_was_sent_and_sent_is_kept_and_aggregation_is_the_same(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "heads.json", Ed25519PrivateKey.generate())
    common = (MEMBERS, lambda report, decoder: None, witness)
    recording = RecordingFedAvg(PROTOCOL, build_decoder(PROTOCOL, 1), *common, site="berta", folder=tmp_path)
    plain = LipschitzFedAvg(PROTOCOL, build_decoder(PROTOCOL, 1), *common)
    sent, starts = [updates(1, "anna", "berta"), updates(2, "anna"), updates(3, "anna", "berta")], []
    for given in sent:
        starts.append(recording.decoder.arrays())
        assert recording.aggregate(given) == plain.aggregate(given)
    assert all(
        torch.equal(a, b) for a, b in zip(recording.decoder.parameters(), plain.decoder.parameters(), strict=True)
    )
    found = list(recorded_rounds(tmp_path))
    assert len(found) == 2  # the site missed the second round
    for (start, update), number in zip(found, (0, 2), strict=True):
        assert start.keys() == update.keys() == starts[0].keys()
        for name in start:
            assert torch.equal(start[name], starts[number][name])
            assert torch.equal(update[name], sent[number]["berta"][name])


def test_messages_of_real_sites_are_never_kept(tmp_path: Path) -> None:
    """The settings of a deployment that ask for it are not read at all."""
    path = tmp_path / "run.json"
    RunSettings(PROTOCOL, tmp_path, 2, simulation=True, record="berta").save(path)
    assert RunSettings.load(path).record == "berta"
    RunSettings(PROTOCOL, tmp_path, 2, simulation=True).save(path)
    assert RunSettings.load(path).record is None
    RunSettings(PROTOCOL, tmp_path, 2, simulation=False, record="berta").save(path)
    with pytest.raises(FederationError, match="not the settings of a run"):
        RunSettings.load(path)
