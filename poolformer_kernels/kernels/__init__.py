"""The Triton kernels, one module an op. Nothing here is imported before a call needs it."""
