"""A made-up run on text: a slash forms, then induction, then the copying loss falls."""

import pandas as pd
import torch

from slashpatch.data.files import save_tensors
from slashpatch.scanning.emergence_result import Emergence, columns_of
from slashpatch.theory.text.run import TextRun
from slashpatch.theory.text.settings import TextSettings

OFFSETS = (0, 1, 2)
MEASURES = ("slash", "rank", "cone", "prefix", "copying")
#: Head L0H1 slashes at Δ=1 from step 20, and L1H0 matches from step 40.
STEPS = (0, 10, 20, 30, 40, 50)


def _emergence(measures, slash):
    rows = []
    for step in STEPS:
        for layer in range(2):
            for head in range(2):
                here = (layer, head) == (0, 1) and step >= 20
                row = {"step": step, "checkpoint": f"step {step}", "fingerprint": "f"}
                row |= {"loss": 7 - step / 20, "eval_loss": 7.2 - step / 20}
                row |= {"layer": layer, "head": head, "name": f"L{layer}H{head}"}
                row |= {"score_0": 0.04, "score_1": slash if here else 0.03, "score_2": 0.02}
                row |= {"r1_q": 0.9 if here else 0.1, "r1_k": 0.9 if here else 0.2}
                row |= {"cone_q": 0.8 if here else 0.1, "cone_k": 0.8 if here else 0.1}
                row |= {"cone_x": 0.3}
                matches = (layer, head) == (1, 0) and step >= 40
                row |= {"prefix_matching": 0.6 if matches else 0.01}
                row |= {"copying_loss": 4.0 if step >= 50 else 9.0}
                rows.append(row)
    frame = pd.DataFrame(rows)[columns_of(OFFSETS, measures)]
    provenance = {
        "model": "made", "offsets": list(OFFSETS), "measures": list(measures),
        "layers_heads_vocabulary": [2, 2, 300],
        "prompts": {"source": "made", "n": 2, "digest": ""}, "n_tokens": 80,
    }  # fmt: skip
    return Emergence(frame, provenance)


def text_run(folder, steps_with_patterns=STEPS):
    """The run, with its patterns in a folder; the pattern of head h has 1/(1+h) on Δ=1."""
    (folder / "patterns").mkdir(parents=True)
    for step in steps_with_patterns:
        slash = torch.diag(torch.ones(8), -1)
        patterns = torch.stack([slash, slash / 2]).expand(2, 2, 9, 9) * (step >= 20)
        save_tensors(
            folder / "patterns" / f"step-{step:08d}.safetensors",
            {"format": "slashpatch-patterns-1", "step": step},
            {"patterns": (255 * patterns).round().to(torch.uint8)},
        )
    settings = TextSettings(layers=2, heads=2, d_model=8, steps=50, every=10)
    return TextRun(folder, settings, _emergence(MEASURES, 0.7), _emergence(MEASURES[:3], 0.5))
