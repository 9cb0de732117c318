"""How do images become histograms, and histograms amax?"""
