"""A checkpoint as a handle: found by name, loaded, checked, and asked for text states and noise."""

from conceptzap.base.base import (
    CROSS,
    CROSS_K,
    CROSS_KV,
    CROSS_V,
    SELF,
    Base,
)
from conceptzap.base.cond import Cond
from conceptzap.base.identity import parameters
from conceptzap.base.modules import PREFIX, Model, find_module
from conceptzap.base.opening import from_pipeline, load_base

__all__ = [
    "CROSS", "CROSS_K", "CROSS_KV", "CROSS_V", "PREFIX", "SELF",
    "Base", "Cond", "Model", "find_module", "from_pipeline", "load_base", "parameters",
]  # fmt: skip
