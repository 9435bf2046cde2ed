"""Shared by several tasks: batch inference over photos, frozen backbones, weights by name.

May import `engine`, `models`, `reports` and below.
"""
