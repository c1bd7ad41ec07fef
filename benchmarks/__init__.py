"""What is measured: speed against what is usual, and what a choice brings on your data."""
