"""Kills processes of runs and compares what comes of it with the undisturbed run."""
