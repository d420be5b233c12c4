"""By how much did a language model's policy entropy change? Exact, fast, with an error bar.

Importing this package loads torch and nothing heavier; transformers and matplotlib load when they are used.
"""

from __future__ import annotations

import importlib
from typing import Any

from entropy_fast._version import __version__

# name -> the module that defines it; resolved on first use, so that the import stays light
_PUBLIC = {
    "EntropyFastWarning": "errors",
    "InputError": "errors",
    "NonFiniteLogitsError": "errors",
    "TokenStats": "functional",
    "SequenceStats": "functional",
    "token_stats": "functional",
    "sequence_stats": "functional",
    "linear_token_stats": "functional",
    "Rollouts": "rollouts",
    "Scores": "scoring",
    "score": "scoring",
    "ImportanceSampler": "sampler",
    "ProbeComponents": "probe",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = globals()[name] = getattr(importlib.import_module(f"entropy_fast.{_PUBLIC[name]}"), name)
        return value
    raise AttributeError(f"module 'entropy_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
