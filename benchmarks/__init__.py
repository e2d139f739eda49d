"""What is measured: programs that print a table."""
