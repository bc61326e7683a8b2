"""What a step really did: the recorder, and `meshwright.audit()`, which puts it around anybody's training step.

    with meshwright.audit() as a:
        step()
    print(a.account.to_json())

The package itself is callable, because the folder and the public function share their name.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.audit.context import Audit


class _CallablePackage(ModuleType):
    def __call__(self) -> AbstractContextManager[Audit]:
        from meshwright.audit.context import audit

        return audit()


sys.modules[__name__].__class__ = _CallablePackage
