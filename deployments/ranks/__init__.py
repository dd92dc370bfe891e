"""Processes of one replica that compute its model together, placed by Ray."""
