"""What must stay true of deploy/ where neither a container engine, nor systemd, nor Kubernetes is at hand."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import client.cli
import server.cli
from server.processes import SERVICES

DEPLOY = Path(__file__).parents[2] / "deploy"
CONTAINERS = sorted((DEPLOY / "containers").glob("Containerfile.*"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CHART = DEPLOY / "helm" / "cohortium-server"
GUIDES = [DEPLOY.parent / "docs" / name for name in ("coordinator.md", "data-steward.md", "deployment.md")]
PROGRAMS = {"cohortium": server.cli.app, "cohortium-site": client.cli.app}


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words name, and the words after it; fails if the program has none of this name."""
    program = Path(words[0]).name
    assert program in PROGRAMS, words
    found: Any = typer.main.get_command(PROGRAMS[program])
    rest = words[1:]
    while hasattr(found, "commands"):
        assert rest and rest[0] in found.commands, f"{program} has no command {rest[:1]}: {words}"
        found, rest = found.commands[rest[0]], rest[1:]
    return found, rest


def check_command(words: list[str]) -> None:
    """Fail unless the program has this command, and the command these options, with values where they need them."""
    found, rest = find_command(words)
    options = {name: parameter for parameter in found.params for name in parameter.opts if name.startswith("-")}
    given = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert given <= set(options), f"{sorted(given - set(options))} is not an option: {words}"
    valued = {name for name in given if not options[name].is_flag}
    bare = [word for word, after in pairwise([*rest, "--"]) if word in valued and after[:2] == "--"]
    assert not bare, f"{bare} needs a value: {words}"
    required = {parameter.opts[0] for parameter in found.params if parameter.required and parameter.opts[0][:2] == "--"}
    assert required <= given, f"{sorted(required - given)} is missing: {words}"


@pytest.mark.parametrize(
    "line",
    [
        "cohortium start-superlinks --consortium c --public h:1",
        "cohortium start-superlink --consortium c --publick h:1",
        "cohortium start-superlink --consortium c",
        "cohortium start-superlink --consortium --public h:1",
        "cohortium-site audit prove",
        "flower-superlink --insecure",
    ],
)
def test_the_check_of_commands_can_fail(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split(line))


# Containerfiles


def instructions(path: Path) -> list[tuple[str, str]]:
    """Name and argument of every instruction; continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def exec_form(argument: str) -> list[str]:
    """The words of an instruction in exec form; a shell form is an error."""
    found = yaml.safe_load(argument)
    assert isinstance(found, list), argument
    return found


def test_there_is_an_image_for_server_site_and_gpu() -> None:
    assert [path.suffix for path in CONTAINERS] == [".server", ".site", ".site-cuda"]


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_a_container_is_pinned_unprivileged_and_starts_our_commands(path: Path) -> None:
    found = instructions(path)
    names = [name for name, _ in found]
    for name, argument in found:
        if name == "FROM":
            assert argument.split()[0] == "${PYTHON_IMAGE}@${PYTHON_DIGEST}"
    assert ("ARG", "PYTHON_DIGEST") in found, "the digest has no default: a build without it fails"
    users = [argument for name, argument in found if name == "USER"]
    assert users == ["10001:10001"] and "RUN" not in names[names.index("USER") :]
    assert "ADD" not in names and "VOLUME" not in names
    assert re.search(r"--constraint deploy/constraints\.txt", path.read_text())
    program = exec_form(dict(found)["ENTRYPOINT"])
    check_command([*program, *exec_form(dict(found)["CMD"])])
    probe = dict(found)["HEALTHCHECK"].split("CMD", 1)[1].strip()
    check_command(exec_form(probe))
    exposed = [argument for name, argument in found if name == "EXPOSE"]
    assert exposed == (["9443"] if path.suffix == ".server" else [])


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name)
def test_a_container_copies_what_exists_and_what_the_ignore_file_lets_through(path: Path) -> None:
    ignored = (DEPLOY / "containers" / ".containerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {
        source
        for name, argument in instructions(path)
        if name == "COPY" and not argument.startswith("--from")
        for source in argument.split()[:-1]
    }
    assert copied == allowed and all((DEPLOY.parent / source).exists() for source in copied)


# Compose


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", ["server", "site"])
def test_a_service_is_confined(services: dict[str, Any], name: str) -> None:
    service = services[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"] and service["init"] is True
    assert int(service["user"].split(":")[0]) > 0
    assert service["pids_limit"] > 0 and service["mem_limit"] == service["memswap_limit"]
    assert service["restart"] == "always"
    assert all(mount.startswith("/tmp:") and "noexec" in mount for mount in service["tmpfs"])
    assert not {"privileged", "network_mode", "pid", "ipc", "devices", "userns_mode"} & set(service)
    assert re.fullmatch(r"\$\{COHORTIUM_[A-Z]+_IMAGE:\?.*sha256.*\}", service["image"]), "an image has no default"
    assert service["secrets"] and {secret["mode"] for secret in service["secrets"]} == {0o400}
    assert not any(secret["source"] == "ca_key" for secret in service["secrets"])


def test_the_site_publishes_no_port(services: dict[str, Any]) -> None:
    assert not {"ports", "expose"} & set(services["site"])
    assert set(services["site"]["networks"]).isdisjoint(services["server"]["networks"])


def test_the_server_publishes_the_fleet_api_alone(services: dict[str, Any]) -> None:
    (port,) = services["server"]["ports"]
    command = services["server"]["command"]
    assert port.endswith(":9443/tcp") and command[command.index("--public") + 1] == "0.0.0.0:9443"
    assert "--private" not in command, "the Control API stays at its default, the loopback"


def test_the_site_writes_its_state_and_nothing_else(services: dict[str, Any]) -> None:
    mounts = [re.sub(r"\$\{[^}]*\}", "X", mount).split(":") for mount in services["site"]["volumes"]]
    assert {target: mode for _, target, mode in mounts} == {"/site": "ro", "/site/state": "rw", "/patients": "ro"}


@pytest.mark.parametrize(("name", "program"), [("server", "cohortium"), ("site", "cohortium-site")])
def test_a_service_runs_commands_that_exist(services: dict[str, Any], name: str, program: str) -> None:
    check_command([program, *services[name]["command"]])
    assert services[name]["healthcheck"]["test"][0] == "CMD"
    check_command(services[name]["healthcheck"]["test"][1:])
    image = DEPLOY / "containers" / f"Containerfile.{name}"
    assert exec_form(dict(instructions(image))["ENTRYPOINT"]) == [program]


# systemd

HARDENING = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "PrivateUsers": "yes",
    "ProtectProc": "invisible",
    "MemoryDenyWriteExecute": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
    "LimitCORE": "0",
    "Restart": "always",
}


def settings(path: Path) -> dict[str, list[str]]:
    """Every value of every key of a unit."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found.setdefault(key, []).append(value)
    return found


def test_there_is_a_unit_for_each_side() -> None:
    assert [path.stem for path in UNITS] == ["cohortium-site", "cohortium-superlink"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_is_hardened(path: Path) -> None:
    found = settings(path)
    assert {key: found.get(key) for key in HARDENING} == {key: [value] for key, value in HARDENING.items()}
    assert found["SystemCallFilter"] == ["@system-service", "~@privileged"]
    (user,) = found["User"]
    assert user in (DEPLOY / "systemd" / "sysusers.conf").read_text().split()
    assert user != "root"
    (written,) = found["ReadWritePaths"]
    assert written == ("/var/lib/cohortium" if "superlink" in path.stem else "/var/lib/cohortium-site/site/state")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_exists(path: Path) -> None:
    (line,) = settings(path)["ExecStart"]
    words = shlex.split(line)
    assert words[0].startswith("/opt/cohortium/bin/")
    check_command(words)


# Helm: these read the templates as text; docs/deployment.md says how the chart was rendered with Helm's own engine


def test_the_chart_stays_restricted() -> None:
    helpers, stateful = ((CHART / "templates" / name).read_text() for name in ("_helpers.tpl", "statefulset.yaml"))
    for line in (
        *("runAsNonRoot: true", "readOnlyRootFilesystem: true", "allowPrivilegeEscalation: false"),
        *("drop: [ALL]", "type: RuntimeDefault", "privileged: false"),
    ):
        assert line in helpers
    assert (
        stateful.count('include "cohortium.container"')
        == 2
        == stateful.count("- name: keys\n") + stateful.count("- name: server\n")
    )
    assert "automountServiceAccountToken: false" in stateful and "replicas: 1" in stateful
    assert not re.search(r"hostNetwork|hostPath|hostPort|hostPID", stateful)
    assert "fsGroupChangePolicy: OnRootMismatch" in stateful
    assert "ca.key" not in stateful


def test_the_chart_serves_the_public_port_alone() -> None:
    service, policy, stateful = (
        (CHART / "templates" / name).read_text() for name in ("service.yaml", "networkpolicy.yaml", "statefulset.yaml")
    )
    assert re.findall(r"targetPort: (\S+)", service) == ["public"]
    assert re.findall(r"containerPort: (\d+)", stateful) == ["9443"] and "0.0.0.0:9443" in stateful
    assert "egress: []" in policy and "policyTypes: [Ingress, Egress]" in policy
    assert re.findall(r"- \{?port: (\S+?),", policy) == ["public"]


def test_the_chart_runs_commands_that_exist() -> None:
    text = (CHART / "templates" / "statefulset.yaml").read_text()
    arguments = text[text.index("args:") : text.index("ports:")].split("args:")[1]
    words = [
        re.sub(r"\{\{.*\}\}", "1", line.strip()[2:]) for line in arguments.splitlines() if line.strip()[:2] == "- "
    ]
    check_command(["cohortium", *words])
    # The health probes are answered on the port that they ask, for services that exist.
    probes = [yaml.safe_load(probe) for probe in re.findall(r"grpc: (\{.*\})", text)]
    assert len(probes) == text.count("Probe:") == 3
    port = int(words[words.index("--health") + 1].rpartition(":")[2])
    assert {probe["port"] for probe in probes} == {port}
    assert {probe.get("service", "") for probe in probes} <= {"", *SERVICES}
    assert str(port) not in (CHART / "templates" / "service.yaml").read_text()


def test_the_chart_asks_for_a_digest() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["image"]["digest"] == "" and "tag" not in values["image"]
    assert "@{{ .Values.image.digest }}" in (CHART / "templates" / "_helpers.tpl").read_text()
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    assert schema["properties"]["image"]["properties"]["digest"]["pattern"] == "^sha256:[0-9a-f]{64}$"
    assert set(values) <= set(schema["properties"])


# Network


def test_nginx_passes_tls_through_to_the_public_listener() -> None:
    text = re.sub(r"#.*", "", (DEPLOY / "nginx" / "stream-443.conf").read_text())
    (upstream,) = re.findall(r"upstream superlink \{\s*server ([^;]+);", text)
    unit = shlex.split(settings(DEPLOY / "systemd" / "cohortium-superlink.service")["ExecStart"][0])
    assert upstream.split(":")[1] == unit[unit.index("--public") + 1].split(":")[1] != "8000"
    assert "ssl" not in text and "proxy_protocol" not in text and "http {" not in text
    assert len(re.findall(r"limit_conn \w+ \d+;", text)) == 2


def test_the_firewalls_begin_with_no() -> None:
    for name in ("server", "site"):
        text = (DEPLOY / "nftables" / f"{name}.nft").read_text()
        assert re.findall(r"hook (\w+) priority filter; policy (\w+);", text) == [
            (chain, "drop") for chain in ("input", "forward", "output")
        ]
    rules = [line.strip() for line in text.splitlines() if "accept" in line and not line.strip().startswith("#")]
    outbound = rules[rules.index("oif lo accept") :]
    assert [line for line in outbound if "tcp dport $superlink_port" in line and 'skuid "cohortium-site"' in line]
    assert not [
        line for line in rules[: rules.index("oif lo accept")] if "dport" in line and "administrators" not in line
    ]


def test_nginx_itself_accepts_the_file(tmp_path: Path) -> None:
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None or not module.exists():
        pytest.skip("no nginx with the stream module here")
    text = (DEPLOY / "nginx" / "stream-443.conf").read_text().replace("/var/log/nginx", str(tmp_path))
    (tmp_path / "nginx.conf").write_text(f"load_module {module};\npid {tmp_path}/pid;\nevents {{}}\n{text}")
    done = subprocess.run([nginx, "-t", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False)
    if "Permission denied" in done.stderr or "permitted" in done.stderr:
        pytest.skip("only root may let nginx check a file with port 443")
    assert done.returncode == 0, done.stderr


# Everything


def texts() -> Iterator[Path]:
    yield from (path for path in DEPLOY.rglob("*") if path.is_file())


def test_nothing_is_latest_and_nothing_is_secret() -> None:
    for path in texts():
        text = path.read_text()
        assert not re.search(r":latest\b", text), path
        assert "PRIVATE KEY" not in text and path.suffix not in {".key", ".pem"}, path


def test_yaml_parses() -> None:
    found = [path for path in texts() if path.suffix in {".yaml", ".json"} and path.parent.name != "templates"]
    assert len(found) == 4
    for path in found:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


BEFORE = r"(?:^|sudo -u \S+ |exec -it \S+ -- |exec site )"


def commands(path: Path) -> Iterator[str]:
    """Commands of ours in the shell blocks of a guide."""
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(BEFORE + r"((?:/opt/cohortium/bin/)?cohortium(?:-site)? [^#|>]*)", line)
            if found:
                yield found[1]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_command_of_a_guide_exists(guide: Path) -> None:
    found = list(commands(guide))
    assert found
    for line in found:
        check_command(shlex.split(line))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_command_that_a_guide_names_exists(guide: Path) -> None:
    text = re.sub(r"```.*?```", "", guide.read_text(), flags=re.DOTALL)
    found = re.findall(r"`(cohortium(?:-site)? [a-z][^`]*)`", text)
    assert found
    for line in found:
        find_command(line.split())


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_link_of_a_guide_leads_somewhere(guide: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", guide.read_text()):
        assert (guide.parent / link).exists(), link
