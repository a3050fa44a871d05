"""The recipe: its schema, how its file is read and checked, and its documentation."""
