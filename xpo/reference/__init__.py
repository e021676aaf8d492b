"""The reference: the frozen model, and its answers. `python -m xpo.reference fill` computes these ahead."""

from xpo.reference.draws import ReferenceDraws
from xpo.reference.model import Reference, base_model

__all__ = ["Reference", "ReferenceDraws", "base_model"]
