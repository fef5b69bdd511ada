"""Tests the claims on the default model and on hand-built ones, and writes docs/evidence.md.

`make evidence`. Finished models are kept in results/ and build/evidence/; --again runs them anew.
"""

import argparse
import sys

import torch
from common import HERE, write_table

import slashpatch as sp
from slashpatch.claims.rules import CLAIMS, RULES, rules_of
from slashpatch.reporting.evidence import MARKS, interval_text

sys.path.insert(0, str(HERE.parent))
from tests.claims.verdicts import EXPECTED, REAL

RESULTS = HERE.parent / "results"
KEPT = HERE.parent / "build" / "evidence"
NAME = "SmolLM2-135M-Instruct"


def default(again):
    """The evidence of the default model, in results/."""
    path = RESULTS / f"{NAME}.json"
    if again:
        path.unlink(missing_ok=True)
    RESULTS.mkdir(exist_ok=True)
    found = sp.evidence(sp.load(device="cpu"), path=path, resume=True)
    found.save(path.with_suffix(".md"))
    return found


def default_table(found):
    rows = ["| | claim | verdict | first test | |", "|--:|---|---|---|---|"]
    frame = found.frame.set_index("claim")
    tests = {test.test: test for test in found.measured}
    for claim in CLAIMS:
        row = frame.loc[claim.number]
        test = tests[row["test"]]
        rows.append(
            f"| {claim.number} | {claim.says} | {MARKS[row['verdict']]} {row['verdict']} | "
            f"{RULES[test.test].question}: {interval_text(test)} | {row['why']} |"
        )
    where = found.provenance
    versions = where["versions"]
    rows += [
        "",
        f"{where['model']} in {where['dtype']}, {where['machine']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, "
        f"transformer-lens {versions['transformer-lens']}. "
        f"Edited slashes: {', '.join(where['slashes'])}.",
    ]
    return rows


def readme_table(found):
    rows = ["| claim | verdict | |", "|---|---|---|"]
    for claim in CLAIMS:
        came, why = found.verdict(claim.number)
        rows.append(f"| {claim.says} | {MARKS[came]} {came} | {why} |")
    return rows


def rules_table():
    rows = ["| claim | test | what is measured | supported if |", "|--:|---|---|---|"]
    for claim in CLAIMS:
        rows += [
            f"| {claim.number} | {name} | {RULES[name].question} | {RULES[name]} |"
            for name in rules_of(claim.number)
        ]
    return rows


def models_table(again):
    numbers = " | ".join(str(claim.number) for claim in CLAIMS)
    rows = [f"| model | {numbers} |", "|---|" + ":-:|" * len(CLAIMS)]
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, (make, what, expected) in (REAL | EXPECTED).items():
        path = KEPT / f"{name}.json"
        if again:
            path.unlink(missing_ok=True)
        found = sp.evidence(make(), quick=True, path=path, resume=True)
        came = found.frame["verdict"].tolist()
        if came != expected:
            print(f"{name}: the tests expect {', '.join(expected)}")
        rows.append(f"| {what} | {' | '.join(MARKS[verdict] for verdict in came)} |")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", action="store_true", help="run finished models again")
    parser.add_argument("--only", choices=("default", "rules", "models"))
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    if chosen.only in (None, "rules"):
        write_table("evidence", "rules", rules_table())
    if chosen.only in (None, "default"):
        found = default(chosen.again)
        write_table("evidence", "default", default_table(found))
        write_table("../README", "evidence", readme_table(found), "(make evidence) ")
    if chosen.only in (None, "models"):
        write_table("evidence", "models", models_table(chosen.again))
