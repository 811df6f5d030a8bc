"""The first hour on a GPU: what no rehearsal can know."""
