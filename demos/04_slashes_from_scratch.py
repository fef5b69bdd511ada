# %% [markdown]
# # Slash heads from scratch
#
# The paper (arXiv 2601.08297) says that two conditions suffice: a shallow RoPE transformer trained
# by gradient descent grows a slash head if its embeddings share a direction and its frequencies add
# up, and the slash holds out of distribution. Here such a model is trained, in seconds on a CPU;
# then each condition is taken away. The claim is the paper's; model, tasks and numbers are ours.
#
# `python demos/04_slashes_from_scratch.py [--figures]`; `SLASHPATCH_DEMO=small` makes it small.

# %%
import os
import sys
from pathlib import Path

import slashpatch as sp
from slashpatch.reporting.figures import save_figure
from slashpatch.reporting.tables import plain
from slashpatch.reporting.theory import phase_figure, phase_report, training_figure, training_report

SMALL = os.environ.get("SLASHPATCH_DEMO") == "small"
SIZE = {"vocabulary": 32, "length": 40, "segment": 12, "n_pairs": 12, "steps": 150} if SMALL else {}
SEEDS = (0,) if SMALL else (0, 1, 2)
KAPPA = 0.3


def show(report):
    """Print a report as the command does."""
    print(plain(report))


def shown(figure, name):
    """Return the figure, which notebooks show; with --figures, save it beside this script."""
    if "--figures" in sys.argv:
        save_figure(figure, Path(__file__).with_name(name))
    return figure


def runs(**knobs):
    """Return one training run per seed."""
    return [sp.theory.train(**{**SIZE, **knobs, "seed": seed}) for seed in SEEDS]


# %% [markdown]
# ## 1. It emerges, in stages
#
# A segment of random tokens comes twice; the second time, each next token is to be predicted. For
# that, layer 1 must bring each token to the position after it (a slash at Δ=1), and layer 2 must
# find the position to which the current token was brought. First the queries and keys become rank
# one, then the slash forms, then layer 2 matches.

# %%
trained = runs()
show(training_report(trained, KAPPA))

# %%
shown(training_figure(trained, KAPPA), "04_training.png")

# %% [markdown]
# ## 2. Without a condition
#
# Without the common direction, or with low frequencies only, plain gradient descent finds no slash
# in the same number of steps.

# %%
show(training_report(runs(cone=0.0), KAPPA))
show(training_report(runs(frequencies="low"), KAPPA))

# %% [markdown]
# ## 3. The slash stands where the data reward it
#
# Now the token to predict is the one Δ positions after the earlier occurrence of the current token,
# so layer 1 has to bring tokens Δ positions on. The offset with the highest score, for each seed:

# %%
for offset in (2, 3):
    last = [run.history.filter(like="score_").iloc[-1] for run in runs(offset=offset)]
    print(f"rewarded Δ={offset}: highest score at", [one.idxmax()[len("score_") :] for one in last])

# %% [markdown]
# ## 4. Both conditions at once
#
# The strength of the common direction and the band of frequencies, varied together.

# %%
knobs = {
    "rows": ("cone", (0.0, 1.0) if SMALL else (0.0, 0.25, 0.5, 1.0, 2.0)),
    "columns": ("frequencies", ("low", "all") if SMALL else ("high", "medium", "low", "all")),
}
phase = sp.theory.phase_diagram(sp.theory.Settings(**SIZE), **knobs, seeds=SEEDS)
show(phase_report(phase, KAPPA))

# %%
shown(phase_figure(phase, KAPPA), "04_phase.png")

# %% [markdown]
# ## 5. The same measurement on a real head
#
# The margin that trained runs end with is the logit of the rewarded offset over all others, if all
# tokens had the mean query and key. `explain` gives it for heads of a real model.

# %%
model = sp.load()
size = {"n_prompts": 2, "max_tokens": 64} if SMALL else {"n_prompts": 4, "max_tokens": 256}
explanation = sp.explain(model, "L16H0", **size)
print(f"L16H0 at Δ={explanation.offset}: predicted margin {explanation.margin:+.2f}")
