"""Two tasks in which a tiny model learns to act: sums with a calculator, questions over documents.

Both are learned by reinforcement alone: the demonstrations that the model imitates first mostly
guess where they should look.
"""
