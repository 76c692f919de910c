"""What is written down about what happened: bytes, time and causes."""
