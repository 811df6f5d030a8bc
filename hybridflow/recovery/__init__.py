"""Going on after a failure: settings, the state machine that decides, who may write."""
