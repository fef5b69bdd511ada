# %% [markdown]
# # Slashes while a model learns to read
#
# A small Llama learns to predict the text that comes with Python, its help topics and source code,
# with the optimiser and the loss of real models. Every few steps all its heads are measured. Slash
# heads appear within a minute or two on a CPU. What comes after them takes longer: the end says
# what is missing here.
#
# `python demos/07_slashes_while_it_learns.py [--figures]`; `SLASHPATCH_DEMO=small` makes it small.

# %%
import os
import sys
import tempfile
from pathlib import Path

from slashpatch.reporting.figures import save_figure
from slashpatch.reporting.style import new_figure
from slashpatch.theory import train_text

SMALL = os.environ.get("SLASHPATCH_DEMO") == "small"
SIZE = {"layers": 3, "d_model": 96, "d_mlp": 128, "vocabulary": 512, "length": 64, "steps": 400}
SIZE |= {"steps": 20, "every": 5, "length": 32} if SMALL else {"every": 20}


def shown(figure, name):
    """Return the figure, which notebooks show; with --figures, save it beside this script."""
    if "--figures" in sys.argv:
        save_figure(figure, Path(__file__).with_name(name))
    return figure


# %% [markdown]
# ## 1. Train, and ask when things changed
#
# A quantity counts as changed at the step where it crosses half of the way to its final level for
# the last time. "First slash" is the head with the highest slash score, at any offset from 1;
# "slash below induction" is the highest in a layer whose output an induction head could read.

# %%
folder = tempfile.TemporaryDirectory()
run = train_text(Path(folder.name) / "run", progress=False, **SIZE)
print(run.table())

# %% [markdown]
# ## 2. The curves
#
# A vertical line stands at each change, and the band around it goes from a quarter to three
# quarters of it.

# %%
shown(run.plot(), "07_changes.png")

# %% [markdown]
# ## 3. The patterns
#
# The four heads with the highest slash scores at the end, on held-out text and on random tokens:

# %%
last = run.text.best(min_offset=1).iloc[-run.settings.layers * run.settings.heads :]
chosen = last.sort_values("score", ascending=False).head(4)
for head in chosen.itertuples():
    random = float(run.random.scores[-1, head.layer, head.head, head.offset])
    print(f"{head.name} at Δ={head.offset}: text {head.score:.2f}, random tokens {random:.2f}")

# %% [markdown]
# Their patterns on random tokens that come twice: before training, half-way, and at the end. A
# slash at Δ=1 is a line just below the diagonal. An induction head would have a line that begins
# half-way down, where the second copy begins. Colours go with the square root of the attention.

# %%
patterns = run.patterns()
steps = [run.text.steps[place] for place in (0, len(run.text.steps) // 2, -1)]
figure = new_figure(8, 6.3)
for row, axes in zip(steps, figure.subplots(len(steps), len(chosen)), strict=True):
    for axis, head in zip(axes, chosen.itertuples(), strict=True):
        axis.imshow(patterns[row][head.layer, head.head].sqrt(), vmin=0, vmax=1)
        axis.set_title(f"{head.name}, step {row}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
shown(figure, "07_patterns.png")

# %% [markdown]
# ## 4. What such a short run does not reach
#
# Slash heads are the first part of copying: one brings each token to the next position, and a
# head in a later layer finds it there. The second part is missing here: the table says "no
# change" for induction and for the copying loss, which is as high as that of a model that cannot
# copy. The slash itself stands in the last layer, where no later head can read what it brings;
# the layers below have none that passes 0.3. On random tokens it is weaker than on text. So this
# run shows that slashes come early, and by themselves; it does not show that induction needs
# them. [Slashes while a language model learns](../docs/emergence.md) trains longer and larger
# models, with several seeds, and takes the conditions away one at a time.

# %%
folder.cleanup()
