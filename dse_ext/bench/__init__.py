"""Timings of dse-ext and of what a user could take instead, on the user's own machine."""
