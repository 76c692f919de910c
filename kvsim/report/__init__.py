"""A page for people: tables and charts of one run or of several."""
