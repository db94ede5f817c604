"""The benchmark of the method against every peer: utility, peers at equal wall time, speed, GPU.

`python -m benchmarks.method --help` says how it is run; `benchmarks.method.cells` what a cell is.
"""
