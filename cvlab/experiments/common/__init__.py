"""What several tasks share: batches of photos, frozen backbones, weights by name.

May import `engine`, `models`, `reports` and below.
"""
