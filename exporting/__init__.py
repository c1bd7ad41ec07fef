"""Networks for other programs, and one file to hand to a colleague."""
