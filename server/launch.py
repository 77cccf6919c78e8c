"""`cohortium launch`, `resume` and `stop`: submit a study to the consortium's SuperLink and follow it to its release.

The run belongs to the SuperLink and not to the command: Ctrl-C, or a command that is killed, leaves it going on, and
`resume` follows it again. After a run that ended early `resume` starts a new one from the last complete round.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.certificates import check_dates, read_certificates
from common.errors import CohortiumError, ExitCode, FederationError, OutputError, UsageError
from common.files import write_atomic
from common.study import Protocol
from server.bundle import RUN_KEY, build_bundle
from server.consortium import audit_of, load_facts, load_release_key
from server.enrol import load_registry
from server.processes import StateFolder
from server.run import RunFiles, RunSettings, claim_output
from server.runs import Runs, RunState

LAUNCH = "launch.json"
POLL_SECONDS = 0.5
STATE_SECONDS = 2.0
UNREACHABLE_SECONDS = 120.0
QUEUED_SECONDS = 5.0
LEAST_FREE_BYTES = 1 << 20
ABANDONED_SECONDS = 15.0  # a run that counts as running, and that no executor has in hand


class DetachedError(CohortiumError):
    """Ctrl-C: the command ends, the run goes on."""

    exit_code = ExitCode.INTERRUPTED


@dataclass(frozen=True)
class Launch:
    """What OUT/launch.json says: the run at the SuperLink, and the settings it was given."""

    files: RunFiles
    consortium: Path
    run: str
    settings: str
    bundle: str

    def save(self) -> None:
        """Write it."""
        document = {
            "run": self.run,
            "settings": self.settings,
            "bundle": self.bundle,
            "consortium": str(self.consortium),
        }
        write_atomic(self.files.out / LAUNCH, json.dumps(document, indent=1))

    @classmethod
    def load(cls, out: Path, consortium: Path) -> Launch:
        """Read it; `UsageError` if `out` was not launched, or from another consortium's folder."""
        path = out / LAUNCH
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found = cls(
                RunFiles(out),
                Path(document["consortium"]),
                str(int(document["run"])),
                str(document["settings"]),
                str(document["bundle"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path}: no readable record of a launch", fix="name the --out of a `cohortium launch`"
            ) from None
        if found.consortium.resolve() != consortium.resolve():
            raise UsageError(
                f"{out}: was launched with --consortium {found.consortium}, not {consortium}", fix="name that folder"
            )
        return found

    def runs(self) -> Runs:
        """The SuperLink's Control API."""
        return runs_of(self.consortium)

    def protocol(self) -> Protocol:
        """The study as it was launched."""
        return self.load_settings().protocol

    def load_settings(self) -> RunSettings:
        """What the ServerApp was given."""
        return RunSettings.load(StateFolder(self.consortium).runs / f"{self.settings}.json")

    @property
    def in_hand(self) -> bool:
        """Whether the executor is at it."""
        try:
            serving = json.loads(StateFolder(self.consortium).serving.read_text(encoding="utf-8"))
            return str(serving["run"]) == self.run
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @property
    def continuation(self) -> str:
        """The command that goes on with it."""
        return f"`cohortium resume {self.files.out} --consortium {self.consortium}`"


def runs_of(consortium: Path) -> Runs:
    """The Control API of the SuperLink that was started from this folder."""
    return Runs(StateFolder(consortium).read_addresses()["private"], consortium / "ca.pem")


def launch(protocol: Protocol, consortium: Path, out: Path, sites: int | None = None) -> Launch:
    """Check everything, claim `out` and submit the study; `sites` to wait for, by default every enrolled one."""
    consortium = consortium.resolve()
    load_facts(consortium)
    load_release_key(consortium)
    sites = check_study(protocol, consortium, sites)
    runs_of(consortium).require_up()
    require_space(StateFolder(consortium).path, "free space, then launch again")
    bundle = build_bundle()
    files = claim_output(out.resolve())
    try:
        write_atomic(files.study, json.dumps(protocol.to_json(), indent=1))
        settings = RunSettings(protocol, files.out, sites, simulation=False, key=consortium / "release.key")
        return _submit(settings, consortium, "launch", bundle.content, bundle.digest)
    except CohortiumError:
        shutil.rmtree(files.out, ignore_errors=True)  # it was empty when it was claimed
        raise


def resume(out: Path, consortium: Path) -> Launch:
    """The run of `out`: the one that is going on, or a new one from the last complete round, or the finished one."""
    consortium, out = consortium.resolve(), out.resolve()
    load_facts(consortium)
    load_release_key(consortium)
    last = Launch.load(out, consortium)
    state = last.runs().state(last.run)
    if state is not None and not state.over and not _is_abandoned(last, state):
        return last
    if last.files.complete(last.protocol().study):
        return last  # only the release is missing, if anything
    for folder in (out, StateFolder(consortium).path):
        require_space(folder, f"free space, then {last.continuation}")
    last.runs().stop(last.run)
    settings = last.load_settings()
    bundle = build_bundle()
    try:
        last.files.failure.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{last.files.failure}: cannot be removed ({error.strerror})") from None
    again = RunSettings(
        settings.protocol, out, settings.sites, simulation=False, resume=True, key=consortium / "release.key"
    )
    return _submit(again, consortium, "resume", bundle.content, bundle.digest)


def stop(out: Path, consortium: Path) -> None:
    """End the run of `out` at the SuperLink; it can be resumed."""
    last = Launch.load(out.resolve(), consortium.resolve())
    last.runs().stop(last.run)
    protocol = last.protocol()
    audit_of(last.consortium).append("stop", study=protocol.study.study.name, digest=protocol.digest, run=last.run)


def require_space(folder: Path, fix: str) -> None:
    """`OutputError` with `fix` if the disk under `folder` is full."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # not there: who needs it says so
        return
    if free < LEAST_FREE_BYTES:
        raise OutputError(f"{folder}: the disk is full", fix=fix)


def require_valid_certificate(consortium: Path) -> None:
    """`OutputError` if the server's certificate is out of date: then nobody speaks with the SuperLink."""
    path = consortium / "server.pem"
    for certificate in read_certificates(path, OutputError):
        try:
            check_dates(path, certificate, OutputError)
        except OutputError as error:
            fix = "`cohortium renew-certificate`, restart `cohortium start-superlink`, then `cohortium resume`"
            raise OutputError(error.message, fix=fix) from None


def _is_abandoned(last: Launch, state: RunState) -> bool:
    """Whether the executor gave a run up and could not say so, on a full disk for instance."""
    deadline = time.monotonic() + STATE_SECONDS
    while state.status == "running" and not last.in_hand:
        if time.monotonic() > deadline:
            return True
        time.sleep(POLL_SECONDS)
    return False


def check_study(protocol: Protocol, consortium: Path, sites: int | None) -> int:
    """How many sites to wait for; `FederationError` or `UsageError` if the study cannot run in this consortium."""
    study = protocol.study
    enrolled = sorted(name for name, entry in load_registry(consortium).sites.items() if entry.active)
    if study.study.seed is not None:
        raise UsageError(
            f"[study] seed = {study.study.seed}: hospitals refuse a study that fixes their randomness",
            fix="remove the seed from study.toml; it is for `simulate`",
        )
    if study.training.mode == "none":
        raise UsageError(
            '[training] mode = "none" sends unprojected updates; hospitals refuse it', fix="choose another mode"
        )
    unknown = sorted(set(study.sites) - set(enrolled))
    if unknown:
        raise FederationError(
            f"[sites] names {', '.join(unknown)}, not enrolled in {consortium}", fix="enrol them or correct study.toml"
        )
    wanted = sites if sites is not None else len(study.sites) or len(enrolled)
    if not study.training.min_sites <= wanted <= len(enrolled):
        raise FederationError(
            f"{len(enrolled)} site(s) are enrolled in {consortium}, the study would wait for {wanted} and"
            f" training.min_sites is {study.training.min_sites}",
            fix="enrol more sites, or correct --sites or training.min_sites",
        )
    return wanted


def _submit(settings: RunSettings, consortium: Path, action: str, bundle: bytes, digest: str) -> Launch:
    name = uuid.uuid4().hex
    path = StateFolder(consortium).runs / f"{name}.json"
    study = settings.protocol
    facts = {"study": study.study.study.name, "digest": study.digest, "bundle": digest, "out": str(settings.out)}
    log = audit_of(consortium)
    settings.save(path)
    log.append(action, **facts)  # before it happens: what cannot be logged is not done
    runs = runs_of(consortium)
    try:
        run = runs.start(bundle, {RUN_KEY: name})
        started = Launch(RunFiles(settings.out), consortium, run, name, digest)
        try:
            started.save()
        except CohortiumError:
            runs.stop(run)
            raise
    except CohortiumError as error:
        path.unlink(missing_ok=True)
        log.append(f"{action} failed", outcome=error.message, **facts)
        raise
    return started


Listener = Callable[[dict[str, Any]], None]


def follow(
    started: Launch, on_round: Listener, on_waiting: Callable[[dict[str, str]], None], on_state: Callable[[str], None]
) -> None:
    """Report rounds and waiting sites until the run is over; raises what the ServerApp failed with.

    Ctrl-C raises `DetachedError`: the run goes on. A SuperLink that is away is waited for UNREACHABLE_SECONDS.
    """
    runs, files = started.runs(), started.files
    seen, waiting, asked, last_heard, queued = 0, {}, 0.0, time.monotonic(), False
    refused: dict[str, str] = {}
    state: RunState | None = None
    began = held = last_heard
    try:
        while True:
            now = time.monotonic()
            if now - asked >= STATE_SECONDS:
                asked = now
                try:
                    state, last_heard = runs.state(started.run), now
                except FederationError:
                    require_valid_certificate(started.consortium)
                    on_state("the SuperLink does not answer; waiting for it")
                    if now - last_heard > UNREACHABLE_SECONDS:
                        raise
            over = state is not None and state.over
            if (
                state is not None
                and not queued
                and not over
                and state.status != "running"
                and now - began > QUEUED_SECONDS
            ):
                queued = True
                on_state("submitted; it begins when the study before it is over")
            reports = complete_lines(files.rounds)
            for report in reports[seen:]:
                on_round(report)
            seen = len(reports)
            for name, reason in read_waiting(files, "refused").items():
                if refused.get(name) != reason:
                    on_state(f"{name} takes no part: {reason}")
                    refused[name] = reason
            found = {} if over else read_waiting(files)
            if found != waiting:
                waiting = found
                on_waiting(waiting)
            if started.in_hand or state is None or state.status != "running":
                held = now
            if over or (state is None and last_heard == asked) or now - held > ABANDONED_SECONDS:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise DetachedError(
            f"no longer following; the study goes on at the SuperLink ({seen} round(s) finished)",
            fix=f"follow it again with {started.continuation}, or end it with `cohortium stop {files.out} --consortium"
            f" {started.consortium}`",
        ) from None
    raise_failure(started, state, seen)


def raise_failure(started: Launch, state: RunState | None, rounds: int) -> None:
    """Nothing if the run left all that is released; otherwise why it did not."""
    files = started.files
    made = files.complete(started.protocol().study)
    if not made:  # whatever the ServerApp stumbled over then
        for folder in (files.out, StateFolder(started.consortium).path):
            require_space(folder, f"free space, then {started.continuation}")
    if files.failure.exists():
        failure = json.loads(files.failure.read_text(encoding="utf-8"))
        error = FederationError(failure["message"], fix=failure["fix"])
        error.exit_code = ExitCode(failure["exit_code"])
        raise error
    if made:
        return
    outcome = (
        "is not known to the SuperLink" if state is None else f"ended early ({state.outcome or 'no reason given'})"
    )
    raise FederationError(
        f"run {started.run} {outcome} after {rounds} finished round(s)",
        fix=f"{started.continuation} goes on from there; what the executor"
        " said is in the output of `cohortium start-superlink`",
    )


def read_waiting(files: RunFiles, which: str = "waiting") -> dict[str, str]:
    """The sites that have not decided, with what they wait for, or those "refused", with their reasons.

    Empty once nobody is waited for any more.
    """
    try:
        return dict(json.loads(files.waiting.read_text(encoding="utf-8"))[which])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def complete_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that another process may be appending to; none if there is no file yet."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
