"""Which images are there, and which pixels do they have?"""
