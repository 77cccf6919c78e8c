"""Commands of `cohortium` for keys and certificates: init-consortium, renew-certificate, enrol, revoke and others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import results, write_json
from common.errors import UsageError

if TYPE_CHECKING:
    from server.consortium import Given
    from server.nodes import Control

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Folder = Annotated[Path, typer.Argument(help="The consortium's folder.")]
Consortium = Annotated[Path, typer.Option(help="The consortium's folder.")]
SuperLink = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="The SuperLink's Control API; without it only sites.json changes."),
]
Certificate = Annotated[
    Path | None,
    typer.Option(help="The server's certificate from a CA of your own, then intermediate ones, PEM."),
]
ServerKey = Annotated[Path | None, typer.Option(help="Its private key, PEM, mode 0600.")]
OwnCa = Annotated[Path | None, typer.Option("--ca", help="The root certificate of that CA, PEM.")]


@app.command("init-consortium")
def init_consortium(
    directory: Annotated[
        Path, typer.Argument(help="New folder for keys and certificates; back it up, keep it private.")
    ],
    name: Annotated[str, typer.Option(help="Name of the consortium.")],
    address: Annotated[
        list[str], typer.Option(help="Host name or IP address under which sites reach the server; may be repeated.")
    ],
    permit: Annotated[
        list[str] | None,
        typer.Option(help="A further name, with all below it, that the CA may certify later; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=36500, help="Days until the server's certificate expires.")] = 825,
    ca_days: Annotated[int, typer.Option(min=1, max=36500, help="Days until the CA expires.")] = 3650,
    server_certificate: Certificate = None,
    server_key: ServerKey = None,
    ca: OwnCa = None,
    as_json: AsJson = False,
) -> None:
    """Make the consortium's CA, the server's certificate and the coordinator's release key."""
    from server.consortium import init_consortium as make

    given = _given(server_certificate, server_key, ca)
    facts = make(directory, name, address, permit=permit or (), days=days, ca_days=ca_days, given=given)
    if as_json:
        write_json(facts)
        return
    results.print(
        f"{directory} holds the keys of {name}; nobody else may read it.\n"
        f"Give every site {directory / 'ca.pem'} and {directory / 'release.pub'}, and read out these fingerprints:\n"
        f"  ca.pem       {facts['ca'][0]['sha256']}\n"
        f"  release.pub  {facts['release_key']['key_id']}\n"
        f"The server's certificate expires at {facts['server']['not_after']}.",
        soft_wrap=True,
    )


@app.command("renew-certificate")
def renew_certificate(
    directory: Folder,
    address: Annotated[
        list[str] | None, typer.Option(help="Names and addresses; default: those it has. May be repeated.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=36500, help="Days until it expires.")] = 825,
    server_certificate: Certificate = None,
    server_key: ServerKey = None,
    as_json: AsJson = False,
) -> None:
    """A new server key and certificate under the same CA; the old ones stay as .old-<date>."""
    from server.consortium import renew_certificate as renew

    given = None
    if server_certificate or server_key:
        given = _given(server_certificate, server_key, directory / "ca.pem")
    facts = renew(directory, address or (), days=days, given=given)
    if as_json:
        write_json(facts)
        return
    results.print(f"New certificate until {facts['server']['not_after']}; restart the SuperLink.", soft_wrap=True)


@app.command("rotate-release-key")
def rotate_release_key(directory: Folder, as_json: AsJson = False) -> None:
    """A new release key, and a statement signed by the old one that sites can follow."""
    from server.consortium import rotate_release_key as rotate

    facts = rotate(directory)
    if as_json:
        write_json(facts)
        return
    results.print(
        f"New release key {facts['release_key']['key_id']}.\n"
        f"Send every site {directory / 'release.pub'} and {directory / facts['handover']}.",
        soft_wrap=True,
    )


@app.command()
def enrol(
    request: Annotated[Path, typer.Argument(help="The site's enrolment-NAME.json.")],
    consortium: Consortium,
    superlink: SuperLink = None,
    replace: Annotated[bool, typer.Option(help="Accept new keys for a site that is enrolled.")] = False,
    as_json: AsJson = False,
) -> None:
    """Accept a site's public keys and register its node key at the SuperLink."""
    from common.keys import key_id
    from server.enrol import enrol as accept

    entry = accept(request, consortium, _control(superlink, consortium), replace=replace)
    if as_json:
        write_json(entry.model_dump(mode="json") | {"ledger_key_id": key_id(entry.ledger_key)})
        return
    where = f"registered at {superlink} as node {entry.node_id}" if entry.node_id else "not registered at a SuperLink"
    results.print(
        f"enrolled, {where}\n"
        f"Compare with the site over the telephone: {entry.fingerprint}\n"
        f"Its ledger's key, as `cohortium-site ledger verify` names it there: {key_id(entry.ledger_key)}",
        soft_wrap=True,
    )


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.")],
    consortium: Consortium,
    superlink: SuperLink = None,
    as_json: AsJson = False,
) -> None:
    """Accept a site no longer; its node key can never be enrolled again."""
    from server.enrol import revoke as withdraw

    entry = withdraw(site, consortium, _control(superlink, consortium))
    if as_json:
        write_json(entry.model_dump(mode="json"))
        return
    results.print(f"{site} is revoked since {entry.revoked_at}", soft_wrap=True)


def _control(superlink: str | None, consortium: Path) -> Control | None:
    from server.nodes import Control

    return Control(superlink, consortium / "ca.pem") if superlink else None


def _given(certificate: Path | None, key: Path | None, ca: Path | None) -> Given | None:
    from server.consortium import Given

    if certificate is None and key is None and ca is None:
        return None
    if certificate is None or key is None or ca is None:
        raise UsageError(
            "--server-certificate, --server-key and --ca belong together",
            fix="give all of them to use a CA of your own, or none",
        )
    return Given(certificate, key, ca)
