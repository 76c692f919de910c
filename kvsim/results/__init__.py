"""What came of a run: columns, the summary of them, and the files that hold both."""
