"""Plan, rehearse and run transformer training across a mesh of devices, with one account of every byte and FLOP.

`with meshwright.audit() as a: step()` gives `a.account`, the account of a real step of anybody's code;
`with meshwright.rehearse(world=1024, rank=0) as r: step()` the same on fake tensors, for one rank of any world.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meshwright.audit.context import audit as audit
    from meshwright.rehearsal.context import rehearse as rehearse

__version__ = "0.1.0"
__all__ = ["__version__", "audit", "rehearse"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name == "audit":
        return importlib.import_module("meshwright.audit")
    if name == "rehearse":
        return importlib.import_module("meshwright.rehearsal.context").rehearse
    raise AttributeError(f"module 'meshwright' has no attribute {name!r}")
