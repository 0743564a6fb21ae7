"""Identification of model files by their bytes, in a confined child. Never imports torch, never executes what it reads.

Callers use `confine`: `identify_path`, `identify_file`, `identify_folder`, `identify_files`, `usable_as_weights` and
`bounds_held`. This file stays empty so that the child that meets hostile bytes loads nothing it does not need.
"""
