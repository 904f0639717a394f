"""A device that stands in for CUDA where there is none: its tensors lie in the host's memory and say that they do not.

What is computed there is computed by torch's CPU kernels, so results can be compared. As on CUDA, operators refuse tensors
of both sides (but for numbers, (), and indices), and numpy refuses those that lie there. Code that asks whether it is on a
CPU is told that it is not.

A process has it from the import of this module on, and for good: import it in one of its own.
"""

import contextlib
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Module:
    """What torch asks of a kind of device."""

    def __getattr__(self, name: str) -> Any:
        known = {
            "is_initialized": True,
            "is_available": True,
            "_is_in_bad_fork": False,
            "device_count": 1,
            "current_device": 0,
        }
        known |= {"manual_seed_all": None, "get_amp_supported_dtype": [torch.bfloat16]}
        if name not in known:
            raise AttributeError(name)
        return lambda *_: known[name]


_setup_privateuseone_for_python_backend("elsewhere", backend_module=_Module())
DEVICE = torch.device("elsewhere", 0)

_OWN = {
    **dict.fromkeys(("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"), (0, 2)),
    **dict.fromkeys(("aten::_pack_padded_sequence", "aten::_pack_padded_sequence_backward"), (0,)),
    "aten::_pad_packed_sequence": (0,),
}
"""Arguments that must be on the device, of operators that take others, indices and lengths, from the host on CUDA, too."""


class Elsewhere(torch.Tensor):
    """A tensor of the device.

    Attributes:
        host: the same numbers, of the CPU.
    """

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, device=DEVICE
        )
        made.host = host
        return made

    def tolist(self) -> Any:
        return self.host.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        asked = kwargs.get("device")
        goes = asked is not None and torch.device(asked).type != DEVICE.type
        if asked is not None:
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if name == "aten::_to_copy":
            found = func(_host(args[0]), **kwargs)
            return found if goes or (asked is None and not isinstance(args[0], Elsewhere)) else Elsewhere(found)
        if name == "aten::copy_":
            func(_host(args[0]), _host(args[1]), *args[2:], **kwargs)
            return args[0]
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in _OWN:
            tensors = [args[place] for place in _OWN[name] if place < len(args)]
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
        if strangers:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise RuntimeError(f"{func}: tensors of two devices, {shapes} on the CPU and others elsewhere")
        found = func(*pytree.tree_map(_host, args), **pytree.tree_map(_host, kwargs))
        if goes:
            return found
        if name == "aten::_pack_padded_sequence":
            return Elsewhere(found[0]), found[1]  # how many rows each place has stays with the host, on CUDA, too
        return return_and_correct_aliasing(func, args, kwargs, pytree.tree_map(_there, found))


def _host(value: Any) -> Any:
    return value.host if isinstance(value, Elsewhere) else value


def _there(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, torch.Tensor) and not isinstance(value, Elsewhere) else value


_made = torch.library.Library("aten", "IMPL")


def _implement(name: str, make: Any) -> None:
    """Registers what makes tensors of nothing; all else is told by its arguments."""

    def on_device(*given: Any, **named: Any) -> Elsewhere:
        kept = {key: value for key, value in named.items() if key == "dtype"}
        return Elsewhere(make(*given, **kept))

    with contextlib.suppress(RuntimeError):
        _made.impl(name, on_device, "PrivateUse1")


_implement("empty.memory_format", torch.empty)
_implement("empty_strided", torch.empty_strided)
for overload in ("arange", "arange.start", "arange.start_step"):
    _implement(overload, torch.arange)


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _host(target).copy_(_host(source))
    return target


_made.impl("_copy_from", _copied, "PrivateUse1")
