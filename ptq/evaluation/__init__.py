"""How good and how fast is a candidate, and is it published?"""
