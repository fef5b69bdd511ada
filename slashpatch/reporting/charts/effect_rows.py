"""Rows of the charts of effects, from the results of each kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from ...effects.result import Result


def metrics_of(result: Result) -> list[str]:
    """Return the metrics of a result of `measure`, in order."""
    return list(dict.fromkeys(result.frame["metric"]))


def forest_rows(result: Result, metric: str) -> pd.DataFrame:
    """Return one metric's effects in a result of `measure`, each edit before its controls.

    Columns row (the label), effect, low, high, what ("edit" or "control"), edit, of, against, q and
    as_large. A control's effect is the mean over its draws, without an interval; its `q` and
    `as_large` compare the edit with it.
    """
    import pandas as pd

    frame = result.frame[result.frame["metric"] == metric]
    several = frame["edit"].nunique() > 1 or frame["of"].nunique() > 1
    rows: list[dict[str, Any]] = []
    for (edit, of), group in frame.groupby(["edit", "of"], sort=False):
        name = f"{edit} {of}".strip()
        clean = group[group["against"] == "clean"].iloc[0]
        for row in group.to_dict(orient="records"):
            is_edit = row["against"] == "clean"
            label = (
                name if is_edit else f"{row['against']} for {name}" if several else row["against"]
            )
            # The row against a control holds the effect beyond the mean of its draws.
            effect = clean["effect"] - (0.0 if is_edit else row["effect"])
            nothing = float("nan")
            rows.append(
                {
                    "row": name if is_edit else label,
                    "effect": effect,
                    "low": row["low"] if is_edit else nothing,
                    "high": row["high"] if is_edit else nothing,
                    "what": "edit" if is_edit else "control",
                    "edit": edit,
                    "of": of,
                    "against": row["against"],
                    "q": row.get("q", nothing),
                    "as_large": row.get("as_large", nothing),
                }
            )
    return pd.DataFrame(rows)


def draw_rows(result: Result, metric: str) -> pd.DataFrame:
    """Return the effect of each draw of each control: columns row, effect, drawn.

    `row` is the control's label in `forest_rows`. Empty if the result has no draws.
    """
    import pandas as pd

    draws, rows = result.tables.get("draws"), []
    if draws is not None:
        left = draws[draws["metric"] == metric]
        for row in forest_rows(result, metric).to_dict(orient="records"):
            name, _, n = str(row["against"]).rpartition(":")
            same = (left["edit"] == row["edit"]) & (left["of"] == row["of"])
            mine = left[same & (left["control"] == name)].head(int(n) if n.isdigit() else 0)
            left = left.drop(mine.index)
            cells = zip(mine["effect"], mine["drawn"], strict=True)
            rows += [(row["row"], *effect_and_draw) for effect_and_draw in cells]
    return pd.DataFrame(rows, columns=["row", "effect", "drawn"])


def flow_rows(result: Result) -> pd.DataFrame:
    """Return flow by offset: columns edit, offset, flow, low, high."""
    frame = result.frame[["edit", "offset", "flow", "flow_low", "flow_high"]]
    return frame.rename(columns={"flow_low": "low", "flow_high": "high"})


def lag_rows(result: Result) -> pd.DataFrame:
    """Return how often each lag is copied: columns edit, lag, top1, low, high."""
    frame = result.frame[["edit", "lag", "top1", "top1_low", "top1_high"]]
    return frame.rename(columns={"top1_low": "low", "top1_high": "high"})


def path_rows(result: Result, top: int | None = None) -> pd.DataFrame:
    """Return the effect through each input of each reader: columns row, effect, low, high, q.

    The first row is the total effect; `top` is the number of rows after it.
    """
    frame = result.frame if top is None else result.frame.head(top + 1)
    labels = [f"{row.reader} {row.input}".strip() for row in frame.itertuples()]
    return frame[["effect", "low", "high", "q"]].assign(
        row=["all paths" if label == "all" else label for label in labels]
    )


def part_rows(result: Result) -> pd.DataFrame:
    """Return the rows of `activation_patching` or `direct_effect`: row, what, effect, low, high, q.

    `row` is what was patched or edited, `what` the direction or the part. Of activation patching,
    `effect` is the normalized one.
    """
    frame = result.frame
    if result.kind == "pairs":
        frame = frame.assign(
            row=frame["patched"],
            what=frame["direction"],
            effect=frame["normalized"],
            low=frame["normalized_low"],
            high=frame["normalized_high"],
        )
    else:
        frame = frame[frame["part"] != "direct, new norm"]
        labels = [f"{row.edit} {row.of}".strip() for row in frame.itertuples()]
        frame = frame.assign(row=labels, what=frame["part"])
    return frame[["row", "what", "effect", "low", "high", "q"]].reset_index(drop=True)


def quantity_of(result: Result) -> str:
    """Return what `effect` is in `part_rows`, as the title of an axis."""
    if result.kind == "pairs":
        return "logit difference (0: unpatched run, 1: the other run)"
    return f"effect on {result.provenance['metric']}"


def sweep_rows(result: Result) -> pd.DataFrame:
    """Return one row for each head of a sweep or screen: its largest effect over the offsets.

    Columns layer, head, name, effect (NaN where it was not run), low, high, q, and offset if there
    are offsets.
    """
    names = ["layer", "head", "name", "effect", "low", "high", "q"]
    names += ["offset"] if "offset" in result.frame else []
    frame = result.frame.sort_values("effect", key=lambda e: -e.abs(), kind="stable")
    return frame.drop_duplicates("name")[names].sort_values(["layer", "head"], ignore_index=True)


def screen_rows(result: Result) -> pd.DataFrame:
    """Return the rows of a screen that were run: name, estimate, effect, low, high, why, offset."""
    names = ["name", "estimate", "effect", "low", "high", "why"]
    names += ["offset"] if "offset" in result.frame else []
    return result.frame.loc[result.frame["why"] != "", names].reset_index(drop=True)


def dose_rows(result: Result, metric: str) -> pd.DataFrame:
    """Return one metric's effect by dose: columns series ("edit" or a control), dose, effect, ends.

    A control's effect is the mean over its draws, without an interval (low, high).
    """
    import pandas as pd

    frame = result.frame[result.frame["metric"] == metric]
    clean = frame[frame["against"] == "clean"].set_index("dose")["effect"]
    parts = []
    for against, rows in frame.groupby("against", sort=False):
        part = rows[["dose", "effect", "low", "high"]].assign(series="edit")
        if against != "clean":
            # The row against a control holds the effect beyond the mean of its draws.
            mean = rows["dose"].map(clean) - rows["effect"]
            part = part.assign(series=against, effect=mean, low=float("nan"), high=float("nan"))
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def circuit_rows(result: Result) -> pd.DataFrame:
    """Return each share of a circuit: columns row (its label), share, low, high."""
    frame = result.frame
    labels = [f"{row.what} {row.member}".strip() for row in frame.itertuples()]
    return frame[["share", "low", "high"]].assign(row=labels)


def circuit_draws(result: Result) -> pd.DataFrame:
    """Return the share of each random set: columns row (a label of `circuit_rows`), share."""
    import pandas as pd

    draws = result.tables.get("random_sets", pd.DataFrame(columns=["share"]))
    return draws[["share"]].assign(row="random sets")
