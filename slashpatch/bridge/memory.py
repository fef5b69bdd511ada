"""What a model needs of memory, from its configuration, and what there is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, TooLargeError

if TYPE_CHECKING:
    import torch

#: Placements that accelerate chooses by itself.
CHOSEN = ("auto", "balanced", "balanced_low_0", "sequential")
#: Configurations with one of these have experts, whose weights Transformers copies while loading.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class MemoryNeeded:
    """What a model needs of memory, in bytes; estimated from its configuration.

    Attributes:
        source: The model.
        dtype: Of the weights and of the KV cache.
        weights: Parameters and buffers, tied ones once.
        mapped: The part of the weights that the CPU need not hold: weights that are stored in this
            dtype are mapped from their file, and the system reads them again where memory is short.
        n_tokens: Length of a prompt, for `kv_cache`.
        kv_cache: Keys and values of one prompt of that length.
        sums: The sums of a scan of 16 offsets, with those of ranks and profiles, on the CPU.
    """

    source: str
    dtype: str
    weights: int
    mapped: int
    n_tokens: int
    kv_cache: int
    sums: int

    def __str__(self) -> str:
        mapped = f" ({size(self.mapped)} of them mapped from file on a CPU)" if self.mapped else ""
        return (
            f"{self.source} in {self.dtype}: {size(self.weights)} of weights{mapped}, "
            f"{size(self.kv_cache)} of KV cache for a prompt of {self.n_tokens:,} tokens, "
            f"{size(self.sums)} of sums for a scan"
        )


def size(n_bytes: int) -> str:
    """Return a number of bytes in GB, or MB below one."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.0f} MB"


def empty_model(source: str | Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """Return the Transformers model that a configuration describes, without values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    stored = _dtype_of(config)  # from_config replaces it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.stored_dtype = stored
    return model


def _dtype_of(config: Any) -> torch.dtype:
    """Return the dtype in which a model's weights are stored; older files do not name float32."""
    import torch

    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    found = getattr(torch, named) if isinstance(named, str) else named
    return found if isinstance(found, torch.dtype) else torch.float32


def needed_by(empty: Any, source: str | Path, n_tokens: int) -> MemoryNeeded:
    """Return what an empty model (see `empty_model`) would need with its weights.

    Raises ModelError for a model without attention heads.
    """
    config = empty.config.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        raise ModelError(f"a {type(empty).__name__} has no attention heads, which slashpatch reads")
    dtype: torch.dtype = empty.dtype
    tensors = {id(x): x for x in [*empty.parameters(), *empty.buffers()]}.values()
    weights = sum(x.numel() * x.element_size() for x in tensors)
    kept = empty.stored_dtype == dtype and not any(hasattr(config, name) for name in _EXPERTS)
    n_layers, n_heads = config.num_hidden_layers, config.num_attention_heads
    n_kv = getattr(config, "num_key_value_heads", None) or n_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", 0):
        n_kv = 1  # Falcon
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    rows = d_head * d_head + 2 * d_head + d_head // 2  # gram, sums, amplitudes of pairs
    per_head = 2 * 64 + 2 * 16  # logits and their counts; scores and their squares
    per_layer = (n_heads + n_kv) * rows + 2 * config.hidden_size + n_heads * per_head
    return MemoryNeeded(
        source=Path(source).name if os.path.isdir(source) else str(source),
        dtype=str(dtype).removeprefix("torch."),
        weights=weights,
        mapped=weights if kept else 0,
        n_tokens=n_tokens,
        kv_cache=2 * n_layers * n_kv * d_head * n_tokens * dtype.itemsize,
        sums=8 * n_layers * per_layer,
    )


def available_memory(device: str | int = "cpu") -> int:
    """Return the bytes that can still be used on a device.

    On the CPU: what the system can give without killing a process, files cached in memory counted
    as free, swap included, and no more than the control groups of this process leave (the limit of
    a container).
    """
    import torch

    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if place.type == "cuda":
        free, _ = torch.cuda.mem_get_info(place)
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(free + unused)
    import psutil

    swap = psutil.swap_memory().free
    host = min([psutil.virtual_memory().available + swap, *(_cgroup_rooms(Path("/"), swap))])
    if place.type == "mps":
        return min(host, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return int(host)


def _cgroup_rooms(root: Path, swap: int) -> list[int]:
    """Return what each control group of this process leaves, in bytes; those without limit not.

    Cached files are not counted as used: the system takes them back before it kills.
    """
    rooms = []
    for folder, files, prefix in _cgroup_folders(root):
        try:
            limit, used = ((folder / file).read_text().strip() for file in files)
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdecimal() and int(limit) < 2**60:  # "max", or about 2^63
            names = (f"{prefix}active_file", f"{prefix}inactive_file")
            cached = sum(int(stat.get(name, 0)) for name in names)
            rooms.append(int(limit) - int(used) + cached + _cgroup_swap(folder, swap))
    return [max(room, 0) for room in rooms]


def _cgroup_folders(root: Path) -> list[tuple[Path, tuple[str, str], str]]:
    """Return the folders of this process's control groups up to the topmost, and their files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            base, names, prefix = root / "sys/fs/cgroup", ("memory.max", "memory.current"), ""
        elif "memory" in kinds.split(","):
            base = root / "sys/fs/cgroup/memory"
            names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        folder = base / path.strip("/")
        found += [
            (at, names, prefix) for at in (folder, *folder.parents) if at.is_relative_to(base)
        ]
    return found


def _cgroup_swap(folder: Path, swap: int) -> int:
    """Return how much swap a group of cgroup v2 may still use; none where that is not known."""
    try:
        limit = (folder / "memory.swap.max").read_text().strip()
        used = int((folder / "memory.swap.current").read_text())
    except (OSError, ValueError):
        return 0
    return swap if limit == "max" else max(0, min(swap, int(limit) - used))


def rooms_of(max_memory: Mapping[Any, Any] | None) -> dict[Any, int]:
    """Return the bytes that may be used, by device: as stated, or what is free.

    GPUs have numbers, as accelerate counts them. Stated values are bytes or text such as "10GiB".
    """
    if max_memory is not None:
        from accelerate.utils import convert_file_size_to_int

        return {device: convert_file_size_to_int(value) for device, value in max_memory.items()}
    import torch

    return {place: available_memory(place) for place in (*range(torch.cuda.device_count()), "cpu")}


def stated_or_limited(
    device_map: Any, max_memory: Mapping[Any, Any] | None
) -> Mapping[Any, Any] | None:
    """Return what accelerate may use: as stated, or less where a container has less than the host.

    None leaves it to accelerate, which looks at the host alone.
    """
    import psutil

    if max_memory is not None or device_map not in CHOSEN:
        return max_memory
    if available_memory("cpu") >= psutil.virtual_memory().available:
        return None
    return {place: int(0.9 * room) for place, room in rooms_of(None).items()}


def require_memory(
    needed: MemoryNeeded,
    empty: Any,
    device: str,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None,
) -> None:
    """Raise TooLargeError for a model whose weights do not fit where they are to go.

    Raises ModelError for a map that accelerate cannot follow. Only the weights count: the
    length of the prompts is not known yet.
    """
    rooms = rooms_of(max_memory)
    if isinstance(device_map, Mapping):
        _require_map(empty, device_map)
        for place, bytes_there in _bytes_by_place(empty, device_map).items():
            if place != "disk":
                _require(needed, place, bytes_there, rooms)
    elif device_map in CHOSEN:
        gpus = {place: room for place, room in rooms.items() if place not in ("cpu", "disk")}
        if gpus and needed.weights > sum(gpus.values()):
            raise TooLargeError(
                f"{needed}; the GPUs have {size(sum(gpus.values()))}. TransformerLens runs models "
                "on GPUs or off them, not on both at once: take more GPUs or dtype='bfloat16', or "
                "leave the GPUs out with device_map='cpu' or 'disk'"
            )
    else:
        place = str(device if device_map is None else device_map)
        _require(needed, place, needed.weights, rooms)
        if place != "cpu" and device_map is None:  # they are loaded there first
            _require(needed, "cpu", needed.weights, rooms)


def _require_map(empty: Any, device_map: Mapping[str, Any]) -> None:
    """Raise ModelError for a map that splits a tied weight, or nests modules and differs there."""
    for one, other in (getattr(empty, "all_tied_weights_keys", None) or {}).items():
        if place_of(one, device_map) != place_of(other, device_map):
            raise ModelError(
                f"{one} and {other} are one weight; the device_map must put both on one device"
            )
    for inner, place in device_map.items():
        for outer, other in device_map.items():
            inside = outer == "" or inner.startswith(f"{outer}.")
            if inside and place != other and "disk" in (place, other):
                raise ModelError(
                    f"the device_map puts {inner} on {place} and {outer or 'the whole model'}, in "
                    f"which it lies, on {other}; accelerate needs modules that are not inside one "
                    "another, such as model.embed_tokens, model.layers.0, model.norm, lm_head"
                )


def _require(needed: MemoryNeeded, place: Any, n_bytes: int, rooms: dict[Any, int]) -> None:
    """Raise TooLargeError unless some of the weights fit a device."""
    if place == "cpu":
        n_bytes = max(0, n_bytes - needed.mapped)
    room = rooms[place] if place in rooms else available_memory(place)
    if n_bytes > room:
        half = "" if needed.dtype in ("bfloat16", "float16") else "dtype='bfloat16', "
        raise TooLargeError(
            f"{needed}; {size(n_bytes)} of weights do not fit {place}, which has {size(room)}. "
            f"Take {half}device_map='auto' (several GPUs, or CPU and disk) or device_map='disk'; "
            "if more memory may be used than this, say so with device_map and max_memory="
            f"{{{place!r}: '{-(-n_bytes // 2**30)}GiB'}}"
        )


def _bytes_by_place(empty: Any, device_map: Mapping[str, Any]) -> dict[Any, int]:
    """Return the bytes of weights that a map puts on each device."""
    total: dict[Any, int] = {}
    for name, weight in empty.named_parameters():  # tied ones once
        place = place_of(name, device_map)
        if place is not None:
            total[place] = total.get(place, 0) + weight.numel() * weight.element_size()
    return total


def place_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """Return where a map puts a weight: by the longest module name that holds it, or None."""
    inside = [key for key in device_map if key == "" or f"{name}.".startswith(f"{key}.")]
    return device_map[max(inside, key=len)] if inside else None
