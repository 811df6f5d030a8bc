"""The quickstart: a tiny model and a task with verifiable answers, from nothing to a policy
that got better, on a laptop."""
