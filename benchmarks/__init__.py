"""Scripts that measure what the README and the design claim."""
