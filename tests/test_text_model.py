"""The second real model: 1 million parameters that learnt from text, in tests/text_model.

`benchmarks/emergence.py` made it. L1H3 reads the previous token; L2H3 finds earlier copies.
"""

from pathlib import Path

import pytest
import torch

import slashpatch as sp

SLASH, INDUCTION = "L1H3", "L2H3"


@pytest.fixture(scope="module")
def model():
    return sp.load(Path(__file__).parent / "text_model", device="cpu")


@pytest.fixture(scope="module")
def found(model):
    return sp.scan(model, n_prompts=6)


def test_one_head_reads_the_previous_token(model, found):
    best = [head for head in found.slash_heads(0.5) if head.offset]
    assert [(str(head.head), head.offset) for head in best] == [(SLASH, 1)]
    assert best[0].score > 0.9
    random = sp.scan(model, n_prompts=6, random_tokens=True)
    assert float(random.scores[1, 3, 1]) > 0.9


def test_scores_are_means_over_the_pattern(model):
    tokens = torch.randint(1, 1024, (3, 60), generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(3, 4, 4)

    def add(pattern, hook):
        for offset in range(4):
            diagonal = pattern.diagonal(-offset, dim1=-2, dim2=-1)
            expected[hook.layer(), :, offset] = diagonal.mean((0, -1))

    hooks = [(f"blocks.{layer}.attn.hook_pattern", add) for layer in range(3)]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    scores = sp.scan(model, tokens, offsets=range(4)).scores
    assert scores == pytest.approx(expected, abs=1e-5)


def test_its_slash_is_made_by_rope(model):
    explained = sp.explain(model, SLASH)
    assert explained.verdict == "RoPE-made slash"
    assert min(explained.rank[name][0] for name in ("r1_q", "r1_k")) > 0.85


def test_what_the_slash_is_for(model):
    """Copying goes with the diagonal, and with no other head's; shifted, it copies further on."""
    intact = copying_loss(model)
    without = copying_loss(model, sp.KnockOut(SLASH, 1))
    others = [copying_loss(model, sp.KnockOut(f"L1H{head}", 1)) for head in range(3)]
    assert without > intact + 1
    assert max(others) < intact + 0.5
    before = sp.copied_lags(model, n_prompts=6, n_tokens=60).mean(0)
    with sp.patch(model, sp.ShiftSlash(SLASH, by=1)):
        after = sp.copied_lags(model, n_prompts=6, n_tokens=60).mean(0)
    assert before[0] > 5 * before[1]
    assert after[1] > 5 * after[0]


def copying_loss(model, *edits):
    with sp.patch(model, *edits):
        return float(sp.copying_losses(model, n_prompts=6, n_tokens=60).mean())


def test_the_claims_on_it(model):
    judged = sp.evidence(model, quick=True, progress=False)
    verdicts = dict(zip(judged.frame["claim"], judged.frame["verdict"], strict=True))
    assert verdicts[1] == "supported"
    assert verdicts[4] == "supported"
    # Twelve heads leave too few to compare with.
    assert verdicts[7] == "cannot tell"


def test_generation_with_a_cache(model):
    ids = torch.tensor([[0, 5, 17, 300, 42, 512]])
    with sp.patch(model, sp.ShiftSlash(SLASH, by=1)):
        cached = model.generate(ids, max_new_tokens=12, do_sample=False, verbose=False)
        plain = ids
        for _ in range(12):
            plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], dim=1)
    assert cached.tolist() == plain.tolist()


def test_it_passes_the_contract(model):
    assert sp.check(model, progress=False).ok
