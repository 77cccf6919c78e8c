"""What is claimed and what left: the privacy statement by site, exposures, utility against ε."""

from __future__ import annotations

from server.compare_figure import NO_AXIS, epsilon_terms, epsilon_text, figure_data, spread_text
from server.compare_records import METRICS
from server.report import figures_privacy
from server.report.blocks import Block, Bullets, Heading, Note, Paragraph, Picture, Section, table
from server.report.documents import Documents
from server.report.figures_frontier import utility_against_epsilon
from server.report.words import alike_lines, epsilon, number, released_rows


def privacy(documents: Documents) -> Section:
    """Every ε with unit, δ, relation, adversary and basis; assumptions; what left every site."""
    statement, study = documents.statement, documents.protocol.study
    lines = alike_lines(statement)
    blocks: list[Block] = [
        Paragraph(
            f"Unit: {statement['unit']}. Neighbouring relation: {statement['neighbouring_relation']}."
            f" δ = {study.privacy.delta:g}. Randomness: {statement['randomness']}."
            + (
                " Every site is stated to have spent every round it was asked for, answered or not."
                if documents.consortium is not None
                else ""
            )
        )
    ]
    if statement.get("excludes"):
        blocks.append(Note(f"Not included: {statement['excludes']}."))
    blocks += _chart(documents)
    by_site: dict[str, dict[str, str]] = {}
    for entry in statement["entries"]:
        by_site.setdefault(entry["site"], {})[entry["adversary"]] = epsilon(entry["epsilon"])
    sees = dict.fromkeys((entry["adversary"], entry["adversary_sees"]) for entry in statement["entries"])
    blocks += [
        table(
            f"Privacy ledger: ε of every site against every adversary, at δ = {study.privacy.delta:g}; ∞ is no promise",
            ["site", *(f"#{adversary}" for adversary, _ in sees)],
            [(site, *(found.get(adversary, "") for adversary, _ in sees)) for site, found in by_site.items()],
        ),
        Bullets(tuple(f"{adversary}: {what}" for adversary, what in sees)),
    ]
    bases = dict.fromkeys(entry["basis"] for entry in statement["entries"])
    if lines:
        blocks.append(Paragraph("ε is the largest line that holds without a condition. By patients and conditions:"))
        blocks.append(
            table(
                "Lines of the statement",
                ["site", "against", "applies to", "#ε", "accountant", "basis, and condition if any"],
                [
                    (
                        row["site"],
                        ", ".join(row["adversaries"]),
                        row["line"]["applies_to"] + (", conditional" if row["line"]["conditional"] else ""),
                        epsilon(row["line"]["epsilon"]),
                        row["line"]["accountant"],
                        row["line"]["basis"]
                        + (f". This line {row['line']['condition']}" if row["line"]["conditional"] else ""),
                    )
                    for row in lines
                ],
            )
        )
    else:
        blocks.append(Bullets(tuple(f"Basis: {basis}" for basis in bases)))
    blocks += [Heading("Assumptions"), Bullets(tuple(statement["assumptions"]))]
    return Section("privacy", "Privacy statement: what is claimed", tuple(blocks))


def _chart(documents: Documents) -> list[Block]:
    """ε by site, only where training itself is covered by noise of every patient's gradients: no other run has a place
    on such an axis."""
    statement, study = documents.statement, documents.protocol.study
    entries = [entry for entry in statement["entries"] if entry["adversary"] == "coordinator"]
    if study.training.mode != "dpsgd" or any(isinstance(entry["epsilon"], str) for entry in entries):
        return []
    as_if = ", as if (seeded)" if "seed" in statement["randomness"].split() else ""
    caption = f"ε by site against the coordinator, one patient, replace-one, δ = {study.privacy.delta:g}{as_if}"
    lines = [(entry["site"], entry["epsilon"]) for entry in entries]
    return [
        Picture(figures_privacy.epsilons(lines, caption, "epsilon", f"{caption}; the table has the numbers."), caption)
    ]


ANCHOR_LEAVES = (
    "Two messages of statistics, a Gaussian mechanism of ε = {epsilon:g} together for one patient of the site"
    " (replace-one, δ as stated, against public, member and coordinator alike): counts of every column's levels or"
    " bins, and second moments of rows encoded with the noised counts and clipped to a radius. What is made of them is"
    " post-processing."
)


def exposure(documents: Documents) -> Section:
    """What left every site, round by round."""
    study, sites = documents.protocol.study, documents.sites
    exposures = documents.exposures
    released = released_rows(documents.statement)
    answered = {name: sum(name in line["answered"] for line in documents.rounds) for name in sites["joined"]}
    joined = [
        (
            name,
            str(site["patients"]),
            number(site["weight"]),
            f"{answered[name]} of {len(documents.rounds)}",
            str(exposures[name]["rounds"]) if name in exposures else "none stated",
            number(exposures[name]["largest_move_of_decoder_per_round"]) if name in exposures else "",
        )
        for name, site in sites["joined"].items()
    ]
    missing = [(name, "", "", "", "", f"did not take part: {why}") for name, why in sites["not_joined"].items()]
    bounded = documents.bound is not None
    blocks: list[Block] = [
        *([Paragraph(ANCHOR_LEAVES.format(epsilon=study.anchor.epsilon))] if study.anchor.epsilon is not None else []),
        Paragraph(
            (
                "A decoder update a round,"
                f" {f'of Euclidean norm at most {study.training.update_norm:g}' if bounded else 'without any bound'}."
                if study.training.rounds > 0
                else "There were no rounds; round 0 below is the anchor."
            )
            + " No patient row, no encoder, no optimiser state and no loss leaves a site."
        ),
        table(
            "Sites, weights and updates. The largest move is 2 w C, with the rest of the round held fixed (T2): it"
            " bounds"
            " influence, which is not differential privacy",
            [
                "site",
                "#patients",
                "#weight",
                "#rounds answered",
                "#updates stated as spent",
                "#largest move of the decoder a round",
            ],
            [*joined, *missing],
        ),
    ]
    caption = "Updates that left every site, by round"
    svg = figures_privacy.rounds_by_site(
        documents.rounds, list(sites["joined"]), "rounds", f"{caption}; see the table."
    )
    blocks.append(Picture(svg, caption))
    incomplete = [
        f"Round {line['round']}: {', '.join(f'{site}: {why}' for site, why in line['dropped'].items())}"
        for line in documents.rounds
        if line["dropped"]
    ]
    if incomplete:
        blocks += [Paragraph("Rounds in which a site was missing:"), Bullets(tuple(incomplete))]
    else:
        blocks.append(Paragraph("Every site answered every round."))
    if released:
        blocks += [
            Heading("Rows through the channel"),
            Bullets(tuple(_released(documents, name) for name in released)),
        ]
    words = [f"{site}: {e['in_words']}" for site, e in exposures.items() if "in_words" in e]
    evaluated = [f"{site}: {e['evaluated_in_words']}" for site, e in exposures.items() if "evaluated_in_words" in e]
    if words:
        blocks += [Heading("Noise of the training"), Bullets(tuple(words))]
    if evaluated:
        blocks += [Heading("Answers about patients"), Bullets(tuple(evaluated))]
    return Section("exposure", "Data ledger: what left each site", (*blocks, *_certificate(documents)))


def _released(documents: Documents, site: str) -> str:
    text = f"{site}: {documents.exposures[site]['released_in_words']}"
    dropped = (documents.channel or {}).get("dropped", {})
    if site in dropped:
        return f"{text} None of them is in the cohort ({dropped[site]}); they are stated as spent."
    return text


def _certificate(documents: Documents) -> list[Block]:
    caption = "Lipschitz certificate of the decoder after every round" + (
        ", under the bound of the study" if documents.bound is not None else "; the study declares no bound"
    )
    return [
        Heading("Certificate"),
        Picture(
            figures_privacy.certificates(documents.rounds, documents.bound, "certificate", f"{caption}."),
            caption,
            table(
                caption,
                ["round", "#certificate", "#sites that answered"],
                [(str(r["round"]), number(r["certificate"]), str(len(r["answered"]))) for r in documents.rounds],
                folded="Numbers",
                screen_only=True,
            ),
        ),
        Paragraph(
            "Upper bound of the Lipschitz constant of the map from the latent code to the parameters of the observation"
            " model, computed from the weights by singular value decomposition in double precision. It bounds how fast"
            " the"
            " decoder's outputs change; it is no protection of patients by itself."
        ),
    ]


def frontier(documents: Documents) -> Section:
    """Utility against ε, from a comparison."""
    title = "Utility against ε"
    found = documents.comparison
    if found is None:
        why = (
            "There is nothing to plot: one run is one point, and a run without a finite ε has no place on an ε axis."
            " “cohortium compare” runs the study in dpsgd mode at several ε; “cohortium report RUN --compare"
            " compare.json” prints the figure here."
        )
        return Section("frontier", title, (Paragraph(why),))
    data = figure_data(found)
    blocks: list[Block] = [Paragraph(f"Every ε is the largest over sites, {epsilon_terms(found)}. {NO_AXIS}")]
    if data is not None:
        blocks.append(Picture(utility_against_epsilon(data), data.in_words))
    shown = [name for name in METRICS if any(line.metrics[name] for line in found.table)]
    rows = []
    for line in found.table:
        if line.finished:
            values = [spread_text(line.metrics[name], line.finished) for name in shown]
            rows.append((line.run, epsilon_text(line), *values))
        else:
            rows.append((f"{line.run}: failed ({'; '.join(line.failed)})", "", *("" for _ in shown)))
    blocks.append(
        table("The runs of the comparison", ["run", "ε of the weights", *(f"#{METRICS[n]}" for n in shown)], rows)
    )
    if found.has_utility:
        blocks.append(
            Paragraph(
                f"Trained on real rows, for scale: {spread_text(found.real.get('gradient_boosting'))} (gradient"
                " boosting),"
                f" {spread_text(found.real.get('logistic_regression'))} (logistic regression)."
            )
        )
    return Section("frontier", title, (*blocks, Note(found.caution)))
