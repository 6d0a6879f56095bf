"""bittern shrinks a language-model checkpoint and proves what it kept.

``bittern.convert``, ``bittern.quantize``, ``bittern.uptrain`` and ``bittern.load`` are the functions that the commands
call. They are imported on first use, so that ``import bittern`` and ``bittern --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "load", "quantize", "uptrain"]

if TYPE_CHECKING:
    from bittern.convert.pipeline import convert
    from bittern.quantize.pipeline import quantize
    from bittern.runtime.load import load
    from bittern.uptrain.pipeline import uptrain
else:
    # Three of the functions are named as the packages they live in. Python binds a package to its parent once, when it
    # is first imported; with that done here, the names stay free for the functions.
    from bittern import convert, quantize, uptrain

    del convert, quantize, uptrain

_HOMES = {
    "convert": "bittern.convert.pipeline",
    "load": "bittern.runtime.load",
    "quantize": "bittern.quantize.pipeline",
    "uptrain": "bittern.uptrain.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public function when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bittern' has no attribute {name!r}")
    function = getattr(import_module(_HOMES[name]), name)
    globals()[name] = function
    return function
