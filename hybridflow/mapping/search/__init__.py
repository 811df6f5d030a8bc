"""The search over placements, device counts and layouts."""
