"""What makes a function a cached stage, and where does it run?"""
