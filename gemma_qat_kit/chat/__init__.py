"""Conversations as data: branches, settings, seeds and timings; saved, replayed, exported, and compared."""
