"""The slot: generations, passes, staging and commit."""
