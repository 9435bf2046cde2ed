"""What several tasks read: photos, captions, generated scenes, random numbers.

May import `storage`, `config`, `ops` and the root modules.
"""
