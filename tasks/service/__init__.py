"""What the flows need that run by themselves."""
