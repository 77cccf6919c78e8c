"""Run by a Python that has Anonymeter, in the folder of the tables; prints JSON. No part of Cohortium is imported."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def counted(evaluator: Any) -> dict[str, Any]:
    found = evaluator.results(0.95)
    risk = found.risk()
    return {"successes": int(found.n_success), "control": float(found.n_control), "risk": [risk.value, *risk.ci]}


def main(folder: Path) -> None:
    import pandas  # type: ignore[import-not-found]
    from anonymeter import evaluators  # type: ignore[import-not-found]

    spec = json.loads((folder / "spec.json").read_text())
    text = dict.fromkeys(spec["categories"], str)
    synthetic, train, control = (
        pandas.read_csv(folder / f"{name}.csv", dtype=text) for name in ("synthetic", "train", "control")
    )
    found = {}
    for k in spec["k"]:
        attack = evaluators.LinkabilityEvaluator(
            train,
            synthetic,
            aux_cols=(spec["left"], spec["right"]),
            n_attacks=len(train),
            n_neighbors=k,
            control=control,
        )
        found[f"linkability {k}"] = counted(attack.evaluate(n_jobs=1))
    for secret in spec["categories"]:
        attack = evaluators.InferenceEvaluator(
            train,
            synthetic,
            aux_cols=[name for name in train.columns if name != secret],
            secret=secret,
            regression=False,
            n_attacks=len(train),
            control=control,
        )
        found[f"inference {secret}"] = counted(attack.evaluate(n_jobs=1))
    for mode in ("univariate", "multivariate"):
        attack = evaluators.SinglingOutEvaluator(
            train, synthetic, n_attacks=spec["predicates"], n_cols=3, control=control, max_attempts=40000, seed=1
        )
        found[f"singling_out_{mode}"] = counted(attack.evaluate(mode=mode))
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
