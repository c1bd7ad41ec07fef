"""Tests, one file a station; helpers are in conftest.py of the root."""
