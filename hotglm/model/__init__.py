"""What a module is: its versions, its contract, its derived state, and structural copies of it."""
