"""Our own kernels. Each file imports Triton at its top, so import one only where it is used."""
