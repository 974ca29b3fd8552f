"""FREE-Merging's light experts: extracted from task vectors, stored compactly, switched on and off exactly."""

from .. import lazy

__all__, __getattr__, __dir__ = lazy.attach(__name__, __file__)
