"""YAML and overrides to one validated, frozen object.

May import the root modules only; experiments by name, through `registry`.
"""
