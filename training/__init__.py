"""How the demo models are made: a small world, its judge, the teachers and the students.

Not part of the installed pack. Training may print.
"""
