"""Which numbers follow from which arrays? NumPy, SciPy and Numba alone."""
