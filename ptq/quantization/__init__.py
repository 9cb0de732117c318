"""Where do quantizers go, and what does a network look like that is ready for them?"""
