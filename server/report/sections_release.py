"""Gates, method, limits and files."""

from __future__ import annotations

from server.release_readme import PURPOSES
from server.report.blocks import BASES, Block, Bullets, Heading, Note, Paragraph, Section, table
from server.report.documents import Documents
from server.report.verdicts_privacy import shown
from server.report.words import mode_in_words


def alarms(documents: Documents) -> tuple[Note, ...]:
    """What stands above the first page's table: an override, failed gates, a page that is not the signed one."""
    found = []
    gates = documents.gates
    if gates is not None:
        failed = [gate["name"] for gate in gates["gates"] if not gate["passed"]]
        override = gates.get("override")
        if override:
            who = ", ".join(f"{key}: {shown(value)}" for key, value in override.items() if key != "reason")
            found.append(
                Note(
                    f"Released by override although gates failed ({', '.join(failed) or 'none is named'}). Reason:"
                    f" {shown(override.get('reason'))}. {who}.",
                    alarm=True,
                )
            )
        elif failed or not gates["passed"]:
            found.append(
                Note(f"Gates failed: {', '.join(failed) or 'see below'}. This cohort must not be released.", alarm=True)
            )
    if documents.again:
        found.append(Note(documents.again))
    if documents.consortium is not None:
        found.append(
            Note(
                "No patient was at hand where this page was made"
                + (
                    ", so nothing here says how close the cohort is to the patients"
                    if documents.evaluation is None
                    else "; what is said of patients comes from what the sites counted"
                )
                + ". Confirm a finding on real patients before acting on it."
            )
        )
    elif documents.metrics is not None:
        found.append(Note(documents.metrics["caution"]))
    return tuple(found)


def gates(documents: Documents) -> Section:
    """Every gate with what was found, the limit and what to do."""
    title = "Gates"
    document = documents.gates
    if document is None:
        return Section("gates", title, (Paragraph("No result of gates was given to this page."),))
    blocks: list[Block] = []
    if document.get("override"):
        override = document["override"]
        blocks.append(table("Override", ["entry", "value"], [(key, shown(value)) for key, value in override.items()]))
    blocks.append(
        table(
            "Gates of the study: every one must pass",
            ["gate", "result", "found", "limit", "evidence", "what to do"],
            [
                (
                    gate["name"],
                    "passed" if gate["passed"] else "FAILED",
                    shown(gate["found"]),
                    shown(gate["limit"]),
                    shown(gate.get("evidence")),
                    shown(gate.get("fix")),
                )
                for gate in document["gates"]
            ],
        )
    )
    return Section("gates", title, tuple(blocks))


def method(documents: Documents) -> Section:
    """How the cohort was made, what nothing here can say, and what lies beside this page."""
    study = documents.protocol.study
    rows = "sampled from the decoder's latent prior"
    if documents.protocol.study.release.method == "channel":
        rows = "made by the sites from their own patients through the stochastic channel"
    blocks: list[Block] = [
        Bullets(
            (
                f"Mode {mode_in_words(study)}.",
                f"Model: variational autoencoder, latent dimension {study.model.latent_dim}, hidden layers"
                f" {', '.join(str(width) for width in study.model.hidden)}"
                + (
                    f", Lipschitz bound of the decoder {study.model.decoder_lipschitz:g}, of the encoder"
                    f" {study.model.encoder_lipschitz:g}."
                    if documents.bound is not None
                    else "."
                ),
                f"Training: {study.training.rounds} rounds of {study.training.local_epochs} passes over a site's rows,"
                " batches"
                f" of {study.training.batch_size}; the coordinator averages the decoder updates with the sites'"
                " weights and"
                " projects every layer back onto its bound.",
                f"Rows: {documents.rows}, {rows}.",
                "Nothing is learned for an encoding: bounds, categories, scales and bins come from the schema.",
            )
        ),
        Heading("What the marks mean"),
        Bullets(tuple(f"{basis}: {meaning}." for basis, meaning in BASES.items())),
        Heading("Limits"),
        Bullets(
            (
                "These rows are drawn from a model. Effects, rare subgroups and interactions can be lost or blurred;"
                " confirm"
                " a finding on real patients before acting on it.",
                "Distances and AUROC describe this table and this outcome. They are measurements, not guarantees, and"
                " the"
                " thresholds behind “survived” are conventions of this page.",
                "ε bounds what an adversary can learn in the worst case. Measurements cannot be exchanged for it.",
                "A successful attack shows a leak; no failed attack is evidence of privacy.",
                "No claim of legal status of the cohort is made. Whether it may be used for a purpose is the"
                " consortium's"
                " decision.",
            )
        ),
        Heading("Files beside this page"),
        Bullets(tuple(f"{name}: {PURPOSES[name]}" for name in _files(documents))),
        Paragraph("“cohortium verify FOLDER” checks their signature without a network."),
    ]
    return Section("method", "Method and limits", tuple(blocks))


def _files(documents: Documents) -> list[str]:
    names = ["cohort.csv", "cohort.parquet", "privacy.json", "rounds.jsonl", "sites.json", "study.json"]
    if documents.metrics is not None:
        names.append("metrics.json")
    if documents.evaluation is not None:
        names.append("evaluation.json")
    if documents.channel is not None:
        names.append("release.json")
    return sorted(name for name in names if name in PURPOSES)
