"""What two processes must have in common for their numbers to be of one run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...maths.precision import rounding
from ..passes import leaving_no_trace, probe_tokens
from ..provenance import provenance

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Of a configuration, what says where it was read and not what it is.
_PLACES = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")


def identity(model: TransformerBridge) -> dict[str, str]:
    """Return what must be equal in all workers, by name; active edits included."""
    origin = provenance(model)
    cfg = model.cfg
    return {
        "fingerprint": origin["fingerprint"],
        "dtype": origin["dtype"],
        "device": origin["device"],
        "configuration": _digest(_configuration(model)),
        "buffers": _digest_of_buffers(model),
        "compatibility mode": str(bool(model.compatibility_mode)),
        "split q, k, v input": f"{cfg.use_split_qkv_input}, {cfg.use_attn_in}",
        # Functions print where they lie in memory.
        "edits": re.sub(r" at 0x[0-9a-f]+", "", "; ".join(origin["edits"])) or "none",
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        **origin["versions"],
        "slashpatch's code": _digest_of_code(),
    }


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """Return the first difference in words, or "" if there is none."""
    for name, wanted in expected.items():
        if found.get(name) != wanted:
            return f"its {name} is {found.get(name)}, expected {wanted}"
    return ""


def probe(model: TransformerBridge) -> Tensor:
    """Return the logits of one short prompt on the CPU, under the active edits."""
    tokens = probe_tokens(model.cfg.d_vocab).to(model.cfg.device)
    with leaving_no_trace(model):
        return model(tokens).detach().double().cpu()


def difference_of_probes(expected: Tensor, found: Tensor, dtype: torch.dtype) -> str:
    """Return in words how two `probe`s differ, or "" if rounding explains it.

    *Ours*: the root of the dtype's rounding, relative to the spread of the logits. Processors may
    differ in rounding; another rotation, mask or edit changes the logits by more.
    """
    if found.shape != expected.shape:
        return f"its logits have shape {list(found.shape)}, expected {list(expected.shape)}"
    spread = float((expected - expected.mean(-1, keepdim=True)).abs().max())
    off = float((found - expected).abs().max())
    allowed = rounding(dtype) ** 0.5 * max(spread, 1e-3)
    if off <= allowed:
        return ""
    return f"its logits on a short prompt differ by {off:.2g}, expected at most {allowed:.2g}"


def here() -> str:
    """Return this process by name, for messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _configuration(model: TransformerBridge) -> str:
    config = model.original_model.config.to_dict()
    kept = {key: value for key, value in config.items() if key not in _PLACES}
    return json.dumps(kept, sort_keys=True, default=str)


@cache
def _digest_of_code() -> str:
    """Return a hash of slashpatch's files: another machine may have another state of them."""
    sha = hashlib.sha256()
    root = Path(__file__).parents[2]
    for path in sorted(root.rglob("*.py")):
        sha.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest_of_buffers(model: TransformerBridge) -> str:
    """Return a hash of all buffers: the frequencies of RoPE are in no state dict."""
    sha = hashlib.sha256()
    for name, buffer in model.original_model.named_buffers():
        sha.update(f"{name}{list(buffer.shape)}{buffer.dtype}".encode())
        bits = buffer.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        sha.update(bits.numpy().data)
    return sha.hexdigest()[:16]
