"""What a GPU achieves: published laws, tables, calibrations, and the grade of each."""
