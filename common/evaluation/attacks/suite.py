"""All attacks on one cohort, at one place that holds both the training patients and a control."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.errors import DataError
from common.evaluation.attacks.copies import find_copies
from common.evaluation.attacks.counts import AttackCounts, NotPossible
from common.evaluation.attacks.inference import infer
from common.evaluation.attacks.linkability import link
from common.evaluation.attacks.membership_density import density_attack
from common.evaluation.attacks.membership_distance import distance_attack
from common.evaluation.attacks.report import AttackReport
from common.evaluation.attacks.rows import occurs_in
from common.evaluation.attacks.scores import ScoreCounts
from common.evaluation.attacks.singling_out import single_out
from common.table import Table


def run_attacks(
    synthetic: Table,
    train: Table,
    control: Table,
    rng: np.random.Generator,
    *,
    secrets: Sequence[str] | None = None,
    reference: Table | None = None,
    withheld: Sequence[str] = (),
) -> AttackReport:
    """Run every attack; `train` are patients the cohort was learned from, `control` patients it was not.

    `secrets` are the columns of the inference attack (default: all). `reference` are further held-out patients, in
    neither of the two, for the density ratio. Hospitals whose counts are to be added need the same cohort and the same
    state of `rng`, which must be able to spawn (`numpy.random.default_rng` is).

    `withheld` are the columns that this hospital keeps to itself, in which no patient here has a value. Linking,
    inference and copies then leave them out; otherwise every patient would be far from his own copy. They are declared,
    as what is left out must not depend on the patients. Membership and singling out keep them, since bins and
    predicates must be the same at every hospital.

    Raises `DataError` if schemas differ, a table has no rows or holds what its schema does not allow, or a secret or
    withheld name is no column. An attack that the tables are too small for is reported as not possible.
    """
    tables = {"synthetic": synthetic, "training": train, "control": control}
    if reference is not None:
        tables["reference"] = reference
    check_tables(tables)
    for kind, names in (("secret", secrets or ()), ("withheld", withheld)):
        unknown = [repr(name) for name in names if name not in synthetic.schema.names]
        if unknown:
            raise DataError(
                f"no such column: {', '.join(unknown)}, named as {kind}", fix="name columns as in the study's schema"
            )
    for name in withheld:
        if not all(np.isnan(table[name]).all() for table in (train, control)):
            raise DataError(
                f"column {name!r} is withheld, but patients have values in it",
                fix="read the patients' tables with the same withheld columns",
            )
    blank = [name in withheld for name in synthetic.schema.names]
    held = Table(synthetic.schema, np.where(blank, np.nan, synthetic.values))
    # A generator for each attack: what one of them draws, which may depend on the number of patients, shifts no other.
    own = iter(rng.spawn(6))
    distances, distance_scores = distance_attack(synthetic, train, control, next(own))
    density = density_attack(synthetic, train, control, next(own), reference=reference)
    results: list[AttackCounts | NotPossible | ScoreCounts] = [
        *single_out(synthetic, train, control, next(own)),
        *link(held, train, control, next(own)),
        *infer(held, train, control, next(own), secrets=secrets),
        *distances,
        *find_copies(held, train, control, next(own)),
        distance_scores,
        density,
    ]
    return AttackReport(
        synthetic_rows=len(synthetic),
        train_rows=len(train),
        control_rows=len(control),
        reference_rows=None if reference is None else len(reference),
        control_in_train=int(occurs_in(control, train).sum()),
        reference_in_train=None if reference is None else int(occurs_in(reference, train).sum()),
        counts=tuple(each for each in results if isinstance(each, AttackCounts)),
        scores=tuple(each for each in results if isinstance(each, ScoreCounts)),
        not_possible=tuple(each for each in results if isinstance(each, NotPossible)),
    )


def check_tables(tables: dict[str, Table]) -> None:
    """Raise `DataError` unless all tables have rows, the same schema and values that the schema allows."""
    schemas = {table.schema.digest for table in tables.values()}
    if len(schemas) > 1:
        raise DataError(
            f"the {', '.join(tables)} tables have different schemas and cannot be compared",
            fix="read all with the study's schema.json",
        )
    for name, table in tables.items():
        if len(table) == 0:
            raise DataError(f"the {name} table has no rows", fix="the attacks need at least one row in every table")
        for column, values in zip(table.schema.columns, table.values.T, strict=True):
            known = values[~np.isnan(values)]
            if column.is_numeric:
                fits = np.isfinite(known)
            else:
                fits = (known >= 0) & (known < len(column.levels)) & (known == np.floor(known))
            if not fits.all():
                raise DataError(
                    f"the {name} table holds {int((~fits).sum())} value(s) in column {column.name!r} that its schema"
                    " does not allow",
                    fix="read the table with `common.table.read_table`, which checks every value",
                )
