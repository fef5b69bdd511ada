# %% [markdown]
# # Your own model, from a check to a report
#
# What to run on a model that nobody has looked at yet: test that slashpatch reads it rightly, find
# its slash heads, explain the strongest, measure what they do, and put all of it into one HTML file
# that opens in any browser.
#
# Set `SLASHPATCH_MODEL` to your model (a Transformers directory, a .gguf file or a hub id), or
# change the first cell. Otherwise the default model stands in. As a script:
# `SLASHPATCH_MODEL=path/to/model python demos/05_your_own_model.py [--figures]`.
# `SLASHPATCH_DEMO=small` makes everything small.

# %%
import os
import sys
from pathlib import Path

import slashpatch as sp
from slashpatch.explaining.explain import explanations
from slashpatch.reporting.effects import effects_report
from slashpatch.reporting.figures import save_figure
from slashpatch.reporting.tables import plain

SMALL = os.environ.get("SLASHPATCH_DEMO") == "small"
SIZE = {"n_prompts": 2, "max_tokens": 64} if SMALL else {"n_prompts": 6, "max_tokens": 128}


def shown(figure, name):
    """Return the figure, which notebooks show; with --figures, save it beside this script."""
    if "--figures" in sys.argv:
        save_figure(figure, Path(__file__).with_name(name))
    return figure


model = sp.load(os.environ.get("SLASHPATCH_MODEL"))
print(f"{model.cfg.n_layers} layers of {model.cfg.n_heads} heads")

# %% [markdown]
# ## 1. Does slashpatch read this model rightly?
#
# `sp.check` tries every promise on the model itself: that edits act on the heads that they name,
# that leaving them restores the logits bit for bit, that cached generation equals recomputation.
# Do not go on if a check fails.

# %%
checked = sp.check(model)
print(checked)

# %% [markdown]
# ## 2. Which heads attend along a diagonal?
#
# The second scan, on random tokens, tells which heads do so whatever the text says.

# %%
natural = sp.scan(model, **SIZE)
random = sp.scan(model, random_tokens=True, moments=False, **SIZE)
print(natural.table(top=8))

# %%
shown(natural.plot(control=random), "05_scan.png")

# %% [markdown]
# ## 3. Why are they slash heads?
#
# The strongest that look back, explained.

# %%
strongest = [entry.head for entry in natural.slash_heads(min_offset=1)][: 1 if SMALL else 3]
explained = list(explanations(model, strongest, **SIZE))
for one in explained:
    print(f"{one.head} at Δ={one.offset}: {one.verdict}")

# %%
shown(explained[0].plot(), "05_explanation.png")

# %% [markdown]
# ## 4. What do they do for the model?
#
# Their diagonals are removed, one head at a time, and the loss on natural text and on copied random
# tokens is compared with that under the same edit at other heads, matched on what they write.

# %%
edits = [sp.KnockOut(one.head, one.offset) for one in explained]
controls = f"matched-heads:{2 if SMALL else 4}"
effects = [
    sp.measure(model, edits, metric, controls=controls, **SIZE) for metric in ("loss", "copying")
]
for result in effects:
    print(plain(effects_report(result)))

# %%
shown(effects[1].plot(), "05_copying.png")

# %% [markdown]
# ## 5. Where do they look in a text?
#
# `sp.top_keys` keeps each token's largest keys, never the whole matrix. Here is where the strongest
# head looks from the last tokens.

# %%
prompt = "The secret code is blue-tiger-seven. I repeat, the secret code is blue-tiger-seven."
text = sp.top_keys(model, prompt, strongest)
keys = text.to_dataframe()
keys = keys[(keys["name"] == str(strongest[0])) & (keys["rank"] == 1)].tail(10)
print(f"{strongest[0]}, largest key of each of the last tokens")
print(keys[["query_token", "key_token", "offset", "weight"]].to_string(index=False))

# %% [markdown]
# ## 6. The report
#
# One file, `report.html` in the current folder, that needs no server and no network. Objects go in
# as they are, and so do the names of files that their `save` wrote.

# %%
page = sp.report(
    "report.html",
    scan=natural,
    random=random,
    explanations=explained,
    results=effects,
    texts=[text],
)
print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")
