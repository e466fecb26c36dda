"""Migrations: from one version's config and state to another's, as data that can be checked without weights."""
