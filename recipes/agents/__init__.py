"""Two tasks for a tiny model that acts: sums with a calculator, questions over documents.

The demonstrations that the model imitates first mostly guess where they should look; that looking
pays is left to reinforcement.
"""
