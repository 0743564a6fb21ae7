"""Benchmarks: what hive promises in figures, measured beside its peers. `python bench/first_light.py` runs them."""
