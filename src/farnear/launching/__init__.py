"""Starts trainings: the processes of one machine, what they tell when they fail, and how they end."""
