"""Identification of model files by their bytes, in a confined child. Never imports torch, never executes what it reads.

Callers use `confine.identify_file` and `confine.usable_as_weights`. This file stays empty so that
the child that meets hostile bytes loads nothing it does not need.
"""
