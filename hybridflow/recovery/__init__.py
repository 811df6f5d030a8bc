"""Going on after a failure: settings, the state machine that decides, who may write.

    config.py    recovery.*, the settings
    events.py    what happened: a step ended, a rank died, a flush failed, a notice came
    actions.py   what to do: run a step, stage, flush, rebuild, restore, stop
    budget.py    how often a run may start again, inside a controller and under its supervisor
    attempts.py  who may write: a number for every life of a controller
    state.py     what decisions remember: settings, phase, commits, budget
    machine.py   decide(state, event, now) -> (state, actions): the whole policy on two pages

Carrying actions out is left out (controllers/recovery.py), and so is noticing that something died
(hybridflow/waiting.py).
"""
