"""Exploratory Preference Optimization (arXiv 2405.21046)."""

from xpo.config import XPOConfig
from xpo.trainer import XPOTrainer

__all__ = ["XPOConfig", "XPOTrainer"]
