"""The whole pipeline on a tiny model: supervised fine-tuning, a reward model from preferences,
PPO against it."""
