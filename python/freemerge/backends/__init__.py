"""Where operations run: one protocol, one registry, one module a backend."""
