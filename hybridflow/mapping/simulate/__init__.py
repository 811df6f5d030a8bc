"""How long a call takes and how much memory it needs, for one model with one layout."""
