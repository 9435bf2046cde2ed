"""One function for each command, usable from Python: plain dictionaries out.

May import everything but `bench` and `cli`.
"""
