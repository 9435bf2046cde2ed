"""What several tasks read: the table of data sets, photos, captions, generated scenes, counter-based random numbers.

May import `storage`, `config`, `ops` and the root modules.
"""
