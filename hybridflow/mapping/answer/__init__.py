"""The chosen mapping as plain data: predicted, judged, explained, drawn."""
