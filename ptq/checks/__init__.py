"""Is a Q/DQ file fit for an engine?"""
