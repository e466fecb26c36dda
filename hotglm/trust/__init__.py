"""Who may say that a release is theirs: keys, roots of trust, and what a host remembers. Imports no torch."""
