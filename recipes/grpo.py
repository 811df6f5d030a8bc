"""python -m recipes.grpo model.path=... data.train=[...] reward.function=package.module:name"""

from recipes.main import recipe

if __name__ == "__main__":
    recipe("grpo")()
