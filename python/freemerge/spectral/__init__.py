"""The spectral core: a planner, its backends, and the filter they make up."""
