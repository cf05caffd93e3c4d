"""Measurements, one JSON line for each case. Not part of the installed pack; may print."""
