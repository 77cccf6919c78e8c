"""Commands of `cohortium` for a finished release: verify, report, bundle-release and add-signature."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.console import results, write_json

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A folder with manifest.dsse.json, or a release as .tar.zst.")],
    key: Annotated[
        Path | None, typer.Option(help="The coordinator's public key, which must have signed; default: the one beside.")
    ] = None,
    trust: Annotated[Path | None, typer.Option(help="A folder of public keys that you trust, NAME.pub.")] = None,
    revoked: Annotated[
        Path | None, typer.Option(help="A revoked public key, or a folder of them; also: `revoked` in --trust.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say who signed a release, and for every file whether it is as signed, without a network.

    Exit code 11: a file or signature is not what was signed; every one is named.
    """
    from common.bundles import in_words
    from server.release import examine_release

    found = examine_release(bundle, key, trust, revoked)
    if as_json:
        write_json({**found.statement, "verification": found.to_json()})
    else:
        for line in in_words(found):
            results.print(line, soft_wrap=True)
    found.require()
    if not as_json:
        results.print("unchanged since it was signed")
        if key is None and trust is None:
            results.print(
                "The key lies beside the files: this shows that they fit together, not who made them.", soft_wrap=True
            )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, or of an unpacked release.")],
    audit: Annotated[Path | None, typer.Option(help="audit.json of `cohortium audit`, to be shown in it.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="compare.json of `cohortium compare`, to be shown in it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page; default: RUN-report.html in this folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Render the report again from the files of a run, with an audit or a comparison that came later.

    The signed report.html stays as it is. Exit code 4: the folder is no finished run, or the audit or comparison is
    of another study; 11: a signed file was changed.
    """
    from server.report.again import report_again

    written = report_again(run, out, audit, compare)
    if as_json:
        write_json({"out": str(written)})
    else:
        results.print(str(written), soft_wrap=True)


@app.command("add-signature")
def add_signature(
    bundle: Annotated[Path, typer.Argument(help="The folder of the release.")],
    signatures: Annotated[list[Path], typer.Argument(help="countersignature-NAME.json, as many as there are.")],
    trust: Annotated[Path | None, typer.Option(help="A folder of public keys, NAME.pub: the sites' and yours.")] = None,
    consortium: Annotated[Path | None, typer.Option(help="In place of --trust: the consortium's folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put sites' countersignatures into the manifest: all of them or none.

    Exit code 11: one is not of this manifest, or not by the key of a site that took part; it is named.
    """
    from server.countersignatures import add_signatures

    added = add_signatures(bundle, signatures, trust=trust, consortium=consortium)
    if as_json:
        write_json({"added": added})
    else:
        results.print(f"countersigned by {', '.join(added)}", soft_wrap=True)


@app.command("bundle-release")
def bundle_release(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="The archive FILE.tar.zst, or a new folder.")],
    key: Annotated[Path | None, typer.Option(help="The coordinator's public key; default: the one beside.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the signed files and their manifest, and nothing else, as one archive or into a new folder.

    The same files give the same bytes. They are verified first.
    """
    from server.release_bundle import bundle_release as make

    names = make(folder, out, key)
    if as_json:
        write_json({"out": str(out), "files": names})
    else:
        results.print(f"{out}: {', '.join(names)}", soft_wrap=True)
