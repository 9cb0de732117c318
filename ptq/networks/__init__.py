"""What is in a PyTorch network, and how is it changed?"""
