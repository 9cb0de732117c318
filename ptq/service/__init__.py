"""What arrived, and what ran at night?"""
