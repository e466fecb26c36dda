"""Deltas made and applied on disk: two releases to a delta, a delta and its base to a full release."""
