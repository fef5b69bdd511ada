"""Constants of optimal ablation: the edit that uses them, and their file."""

import pytest
import torch

import slashpatch as sp
from slashpatch.errors import EditError

from ..tiny import random_tokens, tiny_model

HEADS = ("L0H1", "L1H0", "L1H2")


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def constants(heads=HEADS, d_head=8, seed=0):
    z = torch.randn(len(heads), d_head, generator=torch.Generator().manual_seed(seed))
    return sp.Constants(sp.heads(*heads), z, (3.0, 2.5), provenance={"seen": []})


def logits(model, tokens, *edits):
    with torch.no_grad(), sp.patch(model, *edits):
        return model(tokens)


@pytest.mark.parametrize("engine", ["bridge", "fused"])
def test_each_head_writes_its_own_constant(tiny, engine):
    made, seen, tokens = constants(), {}, random_tokens(2, 9)
    edit = sp.AblateHeads(["L1H2", "L1H0"], "optimal", constants=made)

    def keep(z, hook):
        seen["z"] = z.clone()

    fused = sp.fused(tiny) if engine == "fused" else torch.no_grad()
    with torch.no_grad(), fused, sp.patch(tiny, edit):
        tiny.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", keep)])
    z = seen["z"].unflatten(-1, (4, 8)) if seen["z"].ndim == 3 else seen["z"]
    torch.testing.assert_close(z[:, :, 0], made.z[1].expand(2, 9, 8))
    torch.testing.assert_close(z[:, :, 2], made.z[2].expand(2, 9, 8))
    assert not torch.allclose(z[:, :, 1], made.z[0])


def test_constants_of_zero_are_zero_ablation(tiny):
    zeros = sp.Constants(sp.heads(*HEADS), torch.zeros(3, 8), ())
    tokens = random_tokens(2, 9)
    optimal = logits(tiny, tokens, sp.AblateHeads(HEADS, "optimal", constants=zeros))
    assert torch.equal(optimal, logits(tiny, tokens, sp.AblateHeads(HEADS)))


def test_cached_generation_equals_one_pass(tiny):
    edit = sp.AblateHeads(HEADS, "optimal", constants=constants())
    with torch.no_grad(), sp.patch(tiny, edit):
        out = tiny.generate(
            random_tokens(2, 6),
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            output_logits=True,
            verbose=False,
        )
        whole = tiny(out.sequences)[:, 5:-1]
    torch.testing.assert_close(torch.stack(list(out.logits), 1), whole, atol=1e-4, rtol=1e-3)


def test_constants_save_load_print_and_parse(tiny, tmp_path):
    made = constants()
    assert "unsaved" in str(sp.AblateHeads(HEADS, "optimal", constants=made))
    file = tmp_path / "c.safetensors"
    made.save(file)
    edit = sp.AblateHeads("L0H1", "optimal", constants=made)
    assert str(edit) == f"AblateHeads(L0H1, mode='optimal', constants={str(file)!r})"
    again = sp.parse_edit(str(edit))
    assert again == edit
    assert hash(again) == hash(edit)
    loaded = sp.Constants.load(file)
    assert loaded == made
    assert torch.equal(loaded.z, made.z)
    assert (loaded.losses, loaded.provenance) == (made.losses, made.provenance)
    tokens = random_tokens(1, 12)
    assert torch.equal(logits(tiny, tokens, edit), logits(tiny, tokens, again))


def test_constants_differ_by_heads_and_vectors():
    assert constants() == constants()
    assert constants() != constants(seed=1)
    assert constants() != constants(("L0H1", "L1H0", "L1H3"))
    assert constants() != "constants"


@pytest.mark.usefixtures("unchecked")
def test_constants_that_do_not_fit(tiny, tmp_path):
    tokens = random_tokens(1, 4)
    with pytest.raises(EditError, match="go together.*'optimal' without.*fit_ablation"):
        sp.AblateHeads("L0H1", "optimal")
    with pytest.raises(EditError, match="go together.*'mean' with constants"):
        sp.AblateHeads("L0H1", "mean", constants=constants())
    with pytest.raises(EditError, match="what slashpatch.fit_ablation returned, or its file"):
        sp.AblateHeads("L0H1", "optimal", constants=3)
    with pytest.raises(EditError, match="fitted for L0H1, L1H0, L1H2, not for L0H3"):
        logits(tiny, tokens, sp.AblateHeads("L0H1, L0H3", "optimal", constants=constants()))
    with pytest.raises(EditError, match="the constants have d_head 16, the model 8"):
        logits(tiny, tokens, sp.AblateHeads("L0H1", "optimal", constants=constants(d_head=16)))
    with pytest.raises(EditError, match="saved as a .safetensors file"):
        constants().save(tmp_path / "c.pt")
    with pytest.raises(EditError, match="no file"):
        sp.parse_edit("AblateHeads(L0H1, optimal, constants='absent.safetensors')")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(EditError, match="is no file of the format slashpatch-constants"):
        sp.AblateHeads("L0H1", "optimal", constants=tmp_path / "junk.safetensors")
    broken = sp.Constants(sp.heads(*HEADS), torch.full((3, 8), torch.nan), ())
    broken.save(tmp_path / "nan.safetensors")
    with pytest.raises(EditError, match="one finite vector for each of its heads"):
        sp.Constants.load(tmp_path / "nan.safetensors")
