"""A device that is not the CPU, on the CPU: what CUDA refuses, it refuses.

Its tensors hold one on the CPU, on which every operation runs. An operation on tensors of both is an error as on CUDA,
but for numbers without dimensions and for copies. Nothing else can go from one to the other: no storage is shared.
"""

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default}
HALF = torch.bfloat16


class FarTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, near: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        made.near = near
        return made

    def __repr__(self):
        return f"Far({self.near})"

    def __deepcopy__(self, memo):
        twin = self.detach().clone().requires_grad_(self.requires_grad)
        twin._is_param = getattr(self, "_is_param", False)
        return memo.setdefault(id(self), twin)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func is torch.Tensor.data.__set__:
            args[0].near = args[1].near
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func not in CROSSING and any(t.dim() and not isinstance(t, FarTensor) for t in given):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu! ({func})")
        asked = kwargs.get("device")
        far = func is not aten._local_scalar_dense.default and (asked is None or asked.type == NAME)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        nears = {id(t.near): t for t in given if isinstance(t, FarTensor)}
        plain = pytree.tree_map_only(FarTensor, lambda t: t.near, (args, kwargs))
        found = func(*plain[0], **plain[1])
        if func is aten.copy_.default:
            return args[0]
        if func is aten._to_copy.default and not far:
            return found.clone() if any(found is t.near for t in given if isinstance(t, FarTensor)) else found

        def out(t):
            return nears.get(id(t)) if id(t) in nears else FarTensor(t) if far else t

        return pytree.tree_map_only(torch.Tensor, out, found)


class _Module:
    """What torch asks a device's module."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [HALF]


def _empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return FarTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return FarTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    """What `torch.tensor(..., device=)` calls."""
    target.near.copy_(source)
    return target


def _cast(name):
    """An operation that autocast computes in 16 bits."""
    op = getattr(aten, name)
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args, **kwargs):
        half = torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(off):
            args = pytree.tree_map_only(torch.Tensor, lambda t: t.to(half) if t.dtype == torch.float32 else t, args)
            return op(*args, **kwargs)

    return run


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
LIBRARY.impl("_local_scalar_dense", lambda tensor: tensor.near.item(), "PrivateUse1")  # of torch.tensor([tensor])
FALLBACK = torch.library.Library("_", "IMPL")
FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _name in ("linear", "conv2d", "matmul", "bmm", "addmm"):
    LIBRARY.impl(_name, _cast(_name), "AutocastPrivateUse1")
