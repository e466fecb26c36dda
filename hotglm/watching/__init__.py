"""Watching: a directory of releases is followed, and what is eligible there goes live by itself."""
