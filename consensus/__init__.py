"""The rules of Countersign: what every party must compute identically.

This package is pure and deterministic. It does no I/O, reads no clock, draws no randomness, logs
nothing, and imports neither numpy nor torch; ``import-linter`` enforces it. ``docs/protocol.md`` is
its specification.
"""
