"""A client of the API of a running process: requests, their errors in words, events across restarts, and rates.

It needs only Python's own library, msgspec, and the classes of the bodies (api/schemas.py), so that commands that use
it start quickly.
"""
