"""What is measured: speed against a baseline, and what a choice brings on a data set."""
