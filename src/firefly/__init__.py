"""Firefly(流萤): prune a multilingual model's vocabulary, build Chinese instruction data, train, evaluate, chat.

The verbs of the command line are the functions of `firefly.api`, with the same names and typed results.
"""

from firefly.errors import FireflyError
from firefly.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["FireflyError", "Recipe", "__version__"]
