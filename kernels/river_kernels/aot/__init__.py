"""Every kernel compiled for GPUs that need not be there: `python -m river_kernels.aot`.

* `workloads.py` calls the public functions on tensors without storage, as a trainer of the true size would;
* `programs.py` makes of the launches the programs that Triton would compile for them, each once;
* `compiling.py` compiles one and reads registers, spills, shared memory and matrix instructions;
* `__main__.py` does it for all, prints a table, and fails if one of them is not what it should be.
"""
