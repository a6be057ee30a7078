"""Programs that use poolformer_kernels as its users do: run them with `python -m examples.NAME`."""
