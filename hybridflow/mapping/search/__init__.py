"""The search over placements, device counts and layouts: the fastest mapping, proved to be the
fastest."""
