# %% [markdown]
# # Why a head is a slash head
#
# The paper behind this project (arXiv 2601.08297) says that slash heads come from two conditions:
# pre-RoPE queries and keys that are almost rank one, and RoPE frequencies that add up at an offset.
# Here both are measured on a real head, tested by intervention, and then used to move the slash.
#
# `python demos/02_why_a_slash.py [--figures]`; `SLASHPATCH_DEMO=small` makes everything small.

# %%
import os
import sys
from pathlib import Path

import slashpatch as sp
from slashpatch.reporting.figures import profile_figure, save_figure

SMALL = os.environ.get("SLASHPATCH_DEMO") == "small"
SIZE = {"n_prompts": 2, "max_tokens": 64} if SMALL else {"n_prompts": 4, "max_tokens": 256}

model = sp.load()


def shown(figure, name):
    """Return the figure, which notebooks show; with --figures, save it beside this script."""
    if "--figures" in sys.argv:
        save_figure(figure, Path(__file__).with_name(name))
    return figure


# %% [markdown]
# ## 1. One head, explained
#
# `sp.explain` compares the head with all others, drops bands of frequencies, projects queries and
# keys to rank one, and gives a verdict with its rule.

# %%
explanation = sp.explain(model, "L16H0", **SIZE)
print(explanation)

# %% [markdown]
# The same as a picture: the slash score under each edit, the mean logit by offset, and the cosine
# that each rotary pair adds to that logit.

# %%
shown(explanation.plot(), "02_explanation.png")

# %% [markdown]
# ## 2. Slash heads as a group
#
# r1 is the share of the largest squared singular value of the tokens × d_head matrix of queries (or
# keys): 1 means that the queries of all tokens differ in length only.

# %%
scan = sp.scan(model, **SIZE)
ranks = scan.rank_one.set_index("name")
slash = {str(entry.head) for entry in scan.slash_heads(min_offset=1)}
print(ranks.assign(slash=ranks.index.isin(slash)).groupby("slash")[["r1_q", "r1_k"]].mean())

# %% [markdown]
# ## 3. The profile that two mean vectors predict
#
# If every token had the mean query and the mean key, the logit would be a sum of cosines of the
# offset. How well does that predict the measured mean logits?

# %%
profile = scan.profile("L16H0")
print(f"correlation {profile.correlation:.4f}, peak predicted at {profile.predicted_peak}")
correlations = sorted(scan.profile(head).correlation for head in slash)
above = sum(value > 0.99 for value in correlations) / len(correlations)
print(f"{above:.0%} of {len(correlations)} slash heads with Δ ≥ 1 correlate above 0.99")

# %%
shown(profile_figure(profile, "L16H0"), "02_profile.png")

# %% [markdown]
# ## 4. Move the slash
#
# Rotations commute, so rotating each pair of the query back by its θ, one position, moves every
# logit from Δ to Δ + 1, exactly. The model that copied the next token now copies the one after it.

# %%
eight = [entry.head for entry in scan.slash_heads() if entry.offset == 1][:8]
copying = {"n_prompts": 2, "n_tokens": 30} if SMALL else {"n_prompts": 8, "n_tokens": 100}
for name, edits in (("clean", []), ("shifted by 1", [sp.ShiftSlash(eight, by=1)])):
    with sp.patch(model, *edits):
        peak = int(sp.scan(model, **SIZE).scores[16, 0].argmax())
        next_token, one_after, _ = sp.copied_lags(model, **copying).mean(0).tolist()
    print(
        f"{name:14} L16H0 peaks at Δ={peak}; "
        f"copies the next token {next_token:.2f}, the one after {one_after:.2f}"
    )

# %% [markdown]
# ## 5. Make one from nothing
#
# The other way round: give a head that has no slash one constant direction for all queries and
# keys, rotated by the offset that it should attend to. Its pattern no longer depends on any token.

# %%
with sp.patch(model, sp.PlantSlash("L3H4", offset=5, strength=60.0)):
    planted = sp.scan(model, **SIZE)
best = planted.scores[3, 4]
print(f"L3H4, planted: {float(best[5]):.2f} of its attention at Δ=5; peak at Δ={best.argmax()}")
