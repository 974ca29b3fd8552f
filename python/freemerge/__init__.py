"""Merge fine-tuned models in the frequency domain: FR-Merging and FREE-Merging.

What most people need is listed in ``__all__``. Families have modules of their own: :mod:`freemerge.responses`,
:mod:`freemerge.errors` and :mod:`freemerge.methods`, of which all but the methods can be imported from here, too.
"""

from . import lazy

__version__ = "0.1.0"
__all__, __getattr__, __dir__ = lazy.attach(__name__, __file__)
