"""A consortium of real processes: SuperLink with TLS and node authentication, four SuperNodes, commands, and losses.

Each site is in a network namespace of its own where this machine allows it. One deployment serves all tests, in order.
"""

import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from common.audit import read_audit
from tests.federation.consortium import SITES, Consortium, digest_of, running_consortium
from tests.federation.processes import children_of, cohortium, free_port, lines, wait_for

pytestmark = [pytest.mark.federation, pytest.mark.deadlines]

SECOND_ROUNDS = 20  # so many that they outlast the start of a command


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    with running_consortium(tmp_path_factory.mktemp("deployment")) as made:
        yield made


def test_a_study_survives_a_superlink_that_is_killed_in_a_round(consortium: Consortium) -> None:
    out = consortium.launch("first", 4)
    wait_for(lambda: (out / "waiting.json").exists(), 60, lambda: consortium.log("launch-first"))
    wait_for(lambda: "awaiting-approval" in consortium.log("launch-first"), 60, "the command names nobody")
    consortium.approve_all()
    wait_for(lambda: consortium.rounds(out) >= 1, 90, lambda: consortium.log("superlink")[-4000:])
    os.kill(consortium.child("server.superlink"), signal.SIGKILL)
    consortium.finished(out, "launch-first", 120)
    assert consortium.rounds(out) == 4
    # A SuperLink that dies while it takes a reply may lose it: then the round names the site, which has paid once.
    answered = {site: [r["round"] for r in lines(out / "rounds.jsonl") if site in r["answered"]] for site in SITES}
    for site in SITES:
        spent = consortium.spends(site, digest_of(out))
        assert spent == sorted(set(spent)) and set(answered[site]) <= set(spent) <= {1, 2, 3, 4}
    missing = [r["dropped"] for r in lines(out / "rounds.jsonl") if len(r["answered"]) < len(SITES)]
    assert sum(map(len, answered.values())) >= 4 * len(SITES) - 1 and all(missing), missing


def test_a_release_claims_what_the_ledgers_hold(consortium: Consortium) -> None:
    out = consortium.folder / "out-first"
    statement = json.loads((out / "privacy.json").read_text())
    for site in SITES:
        entry = next(e for e in statement["entries"] if e["site"] == site)
        # Every round it was asked for counts, since its reply may have left and been lost.
        assert entry["exposure"]["rounds"] == 4 >= len(consortium.spends(site, digest_of(out)))
    payload = json.loads((out / "manifest.dsse.json").read_text())
    assert payload["signatures"] and not (out / "metrics.json").exists()


def test_a_command_and_then_an_executor_that_are_killed(consortium: Consortium) -> None:
    rounds = SECOND_ROUNDS
    out = consortium.launch("second", rounds)
    consortium.approve_all()
    wait_for(lambda: consortium.rounds(out) >= 1, 90, lambda: consortium.log("superlink")[-4000:])
    consortium.running.end("launch-second", signal.SIGKILL)
    run = json.loads((out / "launch.json").read_text())["run"]
    following = consortium.running.coordinator("follow-second", "resume", out, "--consortium", consortium.home)
    wait_for(lambda: "following run" in consortium.log("follow-second"), 60, "nobody follows")
    os.kill(consortium.child("server.executor"), signal.SIGKILL)
    wait_for(lambda: following.poll() is not None, 90, lambda: consortium.log("superlink")[-4000:])
    assert following.returncode == 8, consortium.log("follow-second")
    assert "ended early" in consortium.log("follow-second") and "cohortium resume" in consortium.log("follow-second")
    assert json.loads((out / "launch.json").read_text())["run"] == run  # followed, not started again
    before = consortium.rounds(out)
    consortium.running.coordinator("resume-second", "resume", out, "--consortium", consortium.home)
    consortium.finished(out, "resume-second", 300)
    assert before < rounds == consortium.rounds(out)
    for site in SITES:
        assert consortium.spends(site, digest_of(out)) == list(range(1, rounds + 1))


def test_a_machine_that_loses_power_goes_on_where_it_was(consortium: Consortium) -> None:
    out = consortium.launch("third", 3)
    consortium.approve_all()
    wait_for(lambda: consortium.rounds(out) >= 1, 90, lambda: consortium.log("superlink")[-4000:])
    time.sleep(1.0)  # the next round is on its way
    children = children_of(consortium.running._running["superlink"].pid)
    consortium.running.end("launch-third", signal.SIGKILL)
    consortium.running.end("superlink", signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children.values()), 20, "children went on")
    consortium.log_file("superlink").unlink()
    consortium.start_superlink()
    consortium.running.coordinator("resume-third", "resume", out, "--consortium", consortium.home)
    consortium.finished(out, "resume-third", 120)
    for site in SITES:
        assert consortium.spends(site, digest_of(out)) == [1, 2, 3]


def test_status_names_everybody(consortium: Consortium) -> None:
    found = consortium.status()
    assert found["superlink"]["up"] and set(found["sites"]) == set(SITES)
    assert {site["status"] for site in found["sites"].values()} == {"online"}
    assert (found["study"]["name"], found["study"]["status"], found["study"]["round"]) == ("third", "completed", 3)
    assert found["health"]["services"] == {"superlink": True, "executor": True}
    for site in found["sites"].values():
        # A round that was cut off may have dropped a site; it has been asked for all three.
        assert site["participation"]["state"] == "joined" and site["spent"]["asked"] == 3 >= site["spent"]["answered"]
        silent = datetime.fromisoformat(found["time"]) - datetime.fromisoformat(site["last_seen"])
        assert silent < timedelta(seconds=60), "a heartbeat every 30 s"
    released = json.loads((consortium.folder / "out-third" / "privacy.json").read_text())
    assert found["study"]["privacy"]["source"] == "privacy.json"
    assert found["study"]["privacy"]["statement"] == released
    probed = cohortium("status", "--consortium", consortium.home, "--probe", "--json")
    assert json.loads(probed.stdout) == {"superlink": True, "executor": True}


def test_the_audit_log_tells_the_story(consortium: Consortium) -> None:
    actions = [entry["action"] for entry in read_audit(consortium.home / "audit.jsonl")]
    assert actions.count("launch") == 3 and actions.count("resume") == 2 and actions.count("release") == 3
    assert actions.count("round") == 4 + SECOND_ROUNDS + 3
    cohortium("audit-log", "verify", "--consortium", consortium.home)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet%2f..%2fcontrol/list-nodes",
        "//v1/control/list-nodes",
        "/health",
        "/docs",
        "/openapi.json",
    ],
)
def test_sites_reach_nothing_but_the_fleet_api(consortium: Consortium, target: str) -> None:
    assert ask(consortium, target) == 404


def test_a_node_without_a_key_is_refused(consortium: Consortium) -> None:
    assert ask(consortium, "/v1/fleet/pull-messages") == 401


def test_secrets_are_private(consortium: Consortium) -> None:
    for path in [*consortium.home.rglob("*.key"), consortium.home / "state" / "executor.secret"]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert (consortium.home / "state").stat().st_mode & 0o077 == 0


def test_no_site_has_an_open_port(consortium: Consortium) -> None:
    if consortium.network is None:
        pytest.skip("this machine does not allow network namespaces (`ip netns add` failed); sites ran on loopback")
    for site in SITES:
        sockets = consortium.network.sockets(site)
        listening = [local for state, local, _ in sockets if state == "0A"]
        assert listening and all(local.startswith("127.0.0.1:") for local in listening), listening
        remote = {far for state, _, far in sockets if state == "01" and not far.startswith("127.0.0.1:")}
        assert remote <= {consortium.public}, remote


def test_a_second_superlink_is_refused(consortium: Consortium) -> None:
    addresses = ("--public", f"127.0.0.1:{free_port()}", "--private", f"127.0.0.1:{free_port()}")
    done = cohortium("start-superlink", "--consortium", consortium.home, *addresses, code=8)
    assert "runs already" in done.stderr


def test_a_superlink_ends_on_sigterm_with_all_it_started(consortium: Consortium) -> None:
    children = children_of(consortium.running._running["superlink"].pid)
    assert set(children) == {"server.superlink", "server.executor"}
    assert consortium.running.end("superlink") == 0
    assert not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()]
    found = consortium.status(code=8)
    assert found["superlink"]["up"] is False and found["health"]["services"] is None
    done = cohortium(
        "launch",
        consortium.study("late", 2),
        "--consortium",
        consortium.home,
        "--out",
        consortium.folder / "late",
        code=8,
    )
    assert "start-superlink" in done.stderr and not (consortium.folder / "late").exists()


def ask(consortium: Consortium, target: str) -> int:
    """The status with which the public port answers a POST for exactly this target."""
    host, port = consortium.public.rsplit(":", 1)
    context = ssl.create_default_context(cafile=str(consortium.home / "ca.pem"))
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        kind = "Content-Type: application/protobuf\r\nContent-Length: 0"
        secure.sendall(f"POST {target} HTTP/1.1\r\nHost: {host}\r\n{kind}\r\n\r\n".encode())
        return int(secure.recv(64).split()[1])
