"""The public checkpoint formats: one module for each, with its config fields and weight names."""
