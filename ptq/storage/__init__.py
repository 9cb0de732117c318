"""Where do bytes live?"""
