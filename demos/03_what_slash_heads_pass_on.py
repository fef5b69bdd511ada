# %% [markdown]
# # What slash heads pass on
#
# A head that attends to the token before is a fact about its attention. That information passes
# along that diagonal is a claim about cause and effect, and needs interventions, intervals and
# controls. Here: how far a token's influence reaches, which token the model copies when slashes are
# moved, whether other heads would have the same effect, and which heads read the slash head.
#
# `python demos/03_what_slash_heads_pass_on.py [--figures]`; `SLASHPATCH_DEMO=small` makes all of it
# small.

# %%
import os
import sys
from pathlib import Path

import slashpatch as sp
from slashpatch.reporting.effects import effects_report
from slashpatch.reporting.figures import save_figure
from slashpatch.reporting.tables import plain

SMALL = os.environ.get("SLASHPATCH_DEMO") == "small"

model = sp.load()


def show(result, top=20):
    """Print a result's table and remarks as the command does."""
    print(plain(effects_report(result, top)))


def shown(figure, name):
    """Return the figure, which notebooks show; with --figures, save it beside this script."""
    if "--figures" in sys.argv:
        save_figure(figure, Path(__file__).with_name(name))
    return figure


# %% [markdown]
# ## 1. Flow: how much the token Δ back moves a prediction
#
# Some tokens are replaced, one at a time; the flow at Δ is how far the prediction Δ tokens later
# moves (KL divergence). Without the Δ=1 diagonals of the five strongest such heads, the flow at 1
# falls; the others should stay where they are, and the last line says whether they do.

# %%
FIVE = "(L16H0, L11H1, L1H2, L19H3, L2H1)"
size = {"n_prompts": 2, "n_replaced": 3, "max_tokens": 24} if SMALL else {"n_prompts": 16}
flow = sp.flow(model, edits=f"KnockOut({FIVE}, 1)", offsets=range(1, 9 if SMALL else 17), **size)
show(flow, top=40)

# %%
shown(flow.plot(), "03_flow.png")

# %% [markdown]
# ## 2. The copied lag
#
# On random tokens, twice over, the model predicts the token that came next the first time. Rotate
# those heads' queries so that each attends one token further back, and it predicts the one after
# that; the induction heads that read them match one token further on.

# %%
size = {"n_prompts": 3, "n_tokens": 12} if SMALL else {"n_prompts": 16}
copying = sp.copying(model, [f"ShiftSlash({FIVE}, 1)", "KnockOut(L16H0, 1)"], **size)
show(copying)

# %%
shown(copying.plot(), "03_copied_lag.png")

# %% [markdown]
# ## 3. Would any other head have the same effect?
#
# The same edit on random heads of the same layer, on heads that write as much to the residual
# stream, and on the same head at other offsets. `against` says what the edit is compared with;
# "draws as large" is the share of draws whose effect is at least as large.

# %%
size = {"n_prompts": 3, "max_tokens": 25} if SMALL else {"n_prompts": 16, "max_tokens": 101}
n = 2 if SMALL else 8
controls = [f"random-heads:{n}", f"matched-heads:{n}", f"other-offsets:{n}"]
effects = sp.measure(model, "KnockOut(L16H0, 1)", ["copying", "kl"], controls=controls, **size)
show(effects)

# %%
shown(effects.plot(), "03_effects.png")

# %% [markdown]
# ## 4. Which heads read it, and how
#
# The edit's effect is passed to one input (query, key or value) of one later head at a time. A
# previous-token head that serves induction should be read through *keys*.

# %%
readers = "L17H3, L18H6" if SMALL else "L17H3, L17H4, L17H5, L18H6, L18H7, L20H6, L23H2"
size = {"n_prompts": 2, "max_tokens": 25} if SMALL else {"n_prompts": 8}
paths = sp.paths(model, "KnockOut(L16H0, 1)", readers, **size)
show(paths)

# %%
shown(paths.plot(), "03_paths.png")
