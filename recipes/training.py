"""The main of every recipe that is a YAML: python -m recipes.NAME model.path=... data.train=...
reward.function=package.module:name"""

from recipes.main import recipe

if __name__ == "__main__":
    assert __spec__ is not None, "run it as a module: python -m recipes.NAME"
    recipe(__spec__.name.rpartition(".")[2])()
