"""Several devices without their hardware: tensors on the CPU that say that they are elsewhere.

`Devices` notes for each tensor's storage on which device it would be, and raises where PyTorch
would: for an operation on tensors of two devices. `Tensor.device` and `Tensor.to` go by that.
What a kernel on real hardware would compute or cost is not imitated.
"""

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
_DEVICE = torch.Tensor.device.__get__
_MOVING = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
#: They may mix devices, as with real hardware.
_MIXING = {torch.Tensor.copy_, torch.Tensor.type_as, torch.Tensor.set_}


class Devices(TorchFunctionMode):
    """Inside, each tensor has a device of its own, cpu or cuda:0, cuda:1, ...

    Attributes:
        seen: Devices on which something was computed.
    """

    def __init__(self):
        super().__init__()
        self.notes = {}
        self.seen = set()

    def of(self, tensor):
        """The device of a tensor."""
        with torch._C.DisableTorchFunction():
            return self.notes.get(tensor.untyped_storage().data_ptr(), CPU)

    def put(self, tensor, device):
        """Note that a tensor is on a device."""
        with torch._C.DisableTorchFunction():
            pointer = tensor.untyped_storage().data_ptr()
        if pointer:
            self.notes[pointer] = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == _DEVICE:
            return self.of(args[0])
        if getattr(func, "__name__", "") == "__get__" or func is torch.Tensor.untyped_storage:
            return func(*args, **kwargs)
        if torch._C._is_torch_function_enabled():  # our own classes: Keys, and stand-ins
            own = [kind for kind in types if kind.__module__.startswith("slashpatch")]
            if own:
                with self:
                    return own[0].__torch_function__(func, types, args, kwargs)
        if func is torch.autograd.grad:  # gradients are where their tensors are
            result = func(*args, **kwargs)
            inputs = args[1] if len(args) > 1 else kwargs["inputs"]
            for x, gradient in zip(tree_leaves(inputs), result, strict=True):
                if gradient is not None:
                    self.put(gradient, self.of(x))
            return result
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        wanted = [x for x in leaves if isinstance(x, torch.device)]
        wanted += [torch.device(kwargs["device"])] if isinstance(kwargs.get("device"), str) else []
        if func is torch.Tensor.to:
            wanted += [torch.device(x) for x in args[1:] if isinstance(x, str)]
            wanted += [self.of(x) for x in args[1:] if isinstance(x, torch.Tensor)]
        wanted += [CPU] if func is torch.Tensor.cpu else []
        device = wanted[0] if wanted else self._common(func, args, tensors)

        def local(x):
            return CPU if isinstance(x, torch.device) else x

        if func is torch.Tensor.to:
            args = (args[0], *("cpu" if isinstance(x, str) else x for x in args[1:]))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": CPU}
        result = func(*tree_map(local, args), **tree_map(local, kwargs))
        if func in _MOVING and self.of(args[0]) != device:
            result = result.clone()
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not any(x is given for given in tensors):
                self.put(x, device)
        return result

    def _common(self, func, args, tensors):
        """The device of all tensors; those of no dimensions on the CPU go with any."""
        found = [(self.of(x), x) for x in tensors if x.numel()]
        found = [device for device, x in found if x.ndim or device != CPU]
        if func is torch.Tensor.__getitem__ or func is torch.Tensor.__setitem__:
            found = [d for d in found if d != CPU] or found  # indices may be on the CPU
        if not found:
            return CPU
        if len(set(found)) > 1 and func not in _MIXING:
            raise RuntimeError(f"{func} got tensors on {sorted(set(map(str, found)))}")
        self.seen.add(found[0])
        return found[0]


def spread(devices, hf_model, first="cuda:0", second="cuda:1"):
    """Put a Llama's second half on another device, with accelerate's own hooks between."""
    half = len(hf_model.model.layers) // 2
    later = [*hf_model.model.layers[half:], hf_model.model.norm, hf_model.lm_head]
    at_second = {id(module) for top in later for module in top.modules()}
    for module in hf_model.modules():
        place = second if id(module) in at_second else first
        for weight in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            devices.put(weight, place)
    for module in [hf_model.model.embed_tokens, *hf_model.model.layers, *later[-2:]]:
        place = second if id(module) in at_second else first
        add_hook_to_module(module, AlignDevicesHook(torch.device(place), place_submodules=False))
    return hf_model
