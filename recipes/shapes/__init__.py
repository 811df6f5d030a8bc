"""A task for a tiny model that sees: the colour of a shape, drawn on the fly (docs/images.md)."""
