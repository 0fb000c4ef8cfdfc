"""Programs of other projects that do what a bench measures; each runs with an interpreter that has that project."""
