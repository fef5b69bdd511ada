# %% [markdown]
# # See a slash head, and remove it
#
# A *slash-dominant head* attends along the Δ-th sub-diagonal: token i reads token i−Δ. Here we find
# such heads in a real language model, watch them during generation, and remove one diagonal of one
# head to see what it carried.
#
# This chapter is a notebook and a script, `python demos/01_see_and_remove_a_slash.py [--figures]`,
# which with `--figures` saves its pictures beside it. `SLASHPATCH_DEMO=small` in the environment
# makes everything small, for a quick look.

# %%
import os
import sys
from pathlib import Path

import slashpatch as sp
from slashpatch.reporting.figures import losses_figure, save_figure

SMALL = os.environ.get("SLASHPATCH_DEMO") == "small"

model = sp.load()


def shown(figure, name):
    """Return the figure, which notebooks show; with --figures, save it beside this script."""
    if "--figures" in sys.argv:
        save_figure(figure, Path(__file__).with_name(name))
    return figure


# %% [markdown]
# ## 1. Which heads attend along a diagonal?
#
# `sp.scan` averages each head's attention i → i−Δ over natural text. Random tokens are the control:
# a head that keeps its slash there does not depend on what the text says. The table has the heads
# whose score reaches κ = 0.1; Δ=0, where a token attends to itself, counts as well.

# %%
size = {"n_prompts": 2, "max_tokens": 64} if SMALL else {"n_prompts": 8, "max_tokens": 512}
natural = sp.scan(model, **size)
random = sp.scan(model, random_tokens=True, **size)
print(natural.table(top=10))

# %% [markdown]
# Heads that look back by one token, on natural text and on random tokens:

# %%
scores = natural.to_dataframe().assign(random=random.scores.flatten().numpy())
previous = scores[scores.offset == 1].sort_values("score", ascending=False)
print(previous.head(8).to_string(index=False))
print(
    "correlation of natural and random over heads:", round(previous.score.corr(previous.random), 2)
)

# %%
shown(natural.plot(control=random), "01_scan.png")

# %% [markdown]
# ## 2. Live, while the model writes
#
# `SlashMonitor` gathers the same scores during generation with the KV cache, one row per new token,
# and reports a head once, when its score is clearly above κ. The model's output stays the same, bit
# for bit.

# %%
prompt = "The secret code is blue-tiger-seven. I repeat, the secret code is"


def report(head, offset, score, n_rows):
    """Print a head whose score is clearly above κ; called once for each."""
    print(f"{head} attends {offset} back with {score:.2f} after {n_rows} rows")


with sp.SlashMonitor(model, offsets=range(1, 16), kappa=0.3, on_detect=report):
    print(model.generate(prompt, max_new_tokens=16, do_sample=False, verbose=False))

# %% [markdown]
# ## 3. Remove one diagonal of one head
#
# `KnockOut` removes the attention i → i−Δ of that head; the rest of each row grows to fill the gap.
# We compare it with ablating the whole head, and, as the control, with ablating random other heads.

# %%
slash = natural.slash_heads(min_offset=1)[0]
print(f"the strongest head that looks back: {slash.head} at Δ={slash.offset}")

edits = {
    "clean": [],
    f"{slash.head} ablated": [sp.AblateHeads(slash.head)],
    f"{slash.head} without its diagonal": [sp.KnockOut(slash.head, slash.offset)],
}
for other in ("L3H4", "L14H2", "L20H1", "L25H5"):
    edits[f"control: {other} ablated"] = [sp.AblateHeads(other)]

copying = {"n_prompts": 2, "n_tokens": 30} if SMALL else {"n_prompts": 8, "n_tokens": 100}
losses = {}
for name, patches in edits.items():
    with sp.patch(model, *patches):
        losses[name] = sp.copying_losses(model, **copying)
    print(f"{name:32} {losses[name].mean():6.2f} nats on the second run of random tokens")

# %%
figure = losses_figure(
    {name: loss.tolist() for name, loss in losses.items()},
    "Copying random tokens: loss on the second run (a dot a prompt)",
)
shown(figure, "01_copying.png")

# %% [markdown]
# ## 4. In a sentence
#
# The same hooks serve TransformerLens' own calls: `sp.hooks` gives `(name, function)` pairs.

# %%
knock_out = sp.KnockOut(slash.head, slash.offset)
with sp.patch(model, knock_out):
    print("edited:", model.generate(prompt, max_new_tokens=16, do_sample=False, verbose=False))

logits = model.run_with_hooks(prompt, fwd_hooks=sp.hooks(model, knock_out))
print("next token:", repr(model.tokenizer.decode(logits[0, -1].argmax())))

# %% [markdown]
# ## 5. Every offset, on a longer prompt
#
# Scans never form the attention matrix where flash attention is exact: the log-sum-exp of each row
# and one dot product give S[i, i−Δ]. So every offset can be asked for. Offsets close to the length
# of the prompt rest on few rows, and most of those attend to the first token.

# %%
length = 128 if SMALL else 2048
every = sp.scan(model, n_prompts=1, max_tokens=length, offsets="all", moments=False)
print(f"engine: {every.provenance['engine']}, {length} tokens")
curve = every.scores[slash.head.layer, slash.head.head]
for offset in (1, 2, 4, 8, 16, 32, 64):
    print(f"{slash.head} at Δ={offset:<3} {float(curve[offset]):.4f}")

# %% [markdown]
# Inside `sp.fused`, the model runs with flash attention. Edits and monitors work, and every hook
# fires as usual, except those of scores and pattern.

# %%
with sp.fused(model), sp.patch(model, knock_out), sp.SlashMonitor(model) as monitor:
    _, cache = model.run_with_cache(prompt, names_filter=f"blocks.{slash.head.layer}.attn.hook_z")
print(
    f"{slash.head} without its diagonal:",
    float(monitor.scores[slash.head.layer, slash.head.head, slash.offset]),
)
